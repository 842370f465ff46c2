"""Addresses as they are written on a command line, as Envoy's messages."""

import ipaddress
import os

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
    return address, not is_ip(target_host(target))


def target_host(target: str) -> str:
    """The host of a `host:port`, without brackets."""
    return target.rpartition(":")[0].strip("[]")


def default_target(config: Config) -> str:
    """The configured unix socket or gRPC address; the loopback when the service listens on all interfaces."""
    if config.grpc_uds:
        return f"unix:{os.path.abspath(config.grpc_uds)}"
    host = config.grpc_host
    if is_ip(host) and ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"{bracketed(host)}:{config.grpc_port}"


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
