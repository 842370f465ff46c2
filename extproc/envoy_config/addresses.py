"""Addresses as they are written on a command line, as Envoy's messages."""

import ipaddress

from envoy_data_plane.envoy.config.core.v3 import Address, Pipe, SocketAddress

from extproc.config import Config, is_ip
from extproc.errors import ConfigError


def socket_address(address: str, what: str) -> Address:
    """`host:port` (IPv6 in brackets). Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{what}: expected HOST:PORT, got {address!r}")
    return Address(socket_address=SocketAddress(address=host.strip("[]"), port_value=int(port)))


def target_address(target: str) -> tuple[Address, bool]:
    """The address of the service, and whether it has to be resolved."""
    if target.startswith("unix:"):
        return Address(pipe=Pipe(path=target.removeprefix("unix:"))), False
    address = socket_address(target, "grpc_target")
    host = target.rpartition(":")[0].strip("[]")
    return address, not is_ip(host)


def default_target(config: Config) -> str:
    """The configured gRPC address; the loopback when the service listens on all interfaces."""
    host = config.grpc_host
    if is_ip(host) and ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"{bracketed(host)}:{config.grpc_port}"


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
