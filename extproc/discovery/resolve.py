"""Host name -> the `ip:port` that Envoy dials.

Envoy's ORIGINAL_DST cluster takes an address, not a name, so names are resolved here, and again every now and then.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

from extproc.config import is_ip

Lookup = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> its addresses, in the resolver's order. Raises OSError when there are none."""


async def system_lookup(host: str, port: int) -> Sequence[str]:
    """Asks the operating system's resolver (in a thread: it blocks)."""
    answers = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in answers]


async def resolve(url: str, previous: str | None, lookup: Lookup, timeout_s: float) -> str | None:
    """The endpoint of a worker's base URL; None when the name cannot be resolved within `timeout_s`.

    `previous` is kept while it is still one of the host's addresses: a name with several must not flap.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 80
    if is_ip(host):
        return _endpoint(host, port)
    try:
        async with asyncio.timeout(timeout_s):
            addresses = await lookup(host, port)
    except (OSError, UnicodeError):  # TimeoutError is an OSError; a name that is no IDNA is a UnicodeError
        return None
    return choose(addresses, port, previous)


def choose(addresses: Sequence[str], port: int, previous: str | None) -> str | None:
    """One endpoint of several addresses: the previous one if it is among them, else the first IPv4, else the first."""
    # An address with a zone (`fe80::1%eth0`) means nothing outside this machine, and Envoy does not read it.
    usable = [address for address in addresses if is_ip(address) and "%" not in address]
    endpoints = [_endpoint(address, port) for address in sorted(usable, key=lambda address: ":" in address)]
    if previous in endpoints:
        return previous
    return endpoints[0] if endpoints else None


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ipaddress.ip_address(address).version == 6 else f"{address}:{port}"
