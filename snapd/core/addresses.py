"""HOST:PORT, read and written."""

from __future__ import annotations

import ipaddress

from snapd.errors import ConfigError

PORT_MAX = 65535


def join(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split(address: str, what: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT. `what` it is the address of, for the error's text.

    Raises:
        ConfigError: kind `address`.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) <= PORT_MAX:
        raise ConfigError(f"{what} = {address[:80]!r}: must be HOST:PORT", kind="address")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can be reached at, or reach, that address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
