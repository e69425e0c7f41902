"""`etcd://HOST:PORT,HOST:PORT` as a store. The client library is an extra, loaded only when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapd.errors import ConfigError

if TYPE_CHECKING:
    from snapd.coordination.etcd_kv import EtcdKeyValue

SCHEMES = ("etcd://", "etcds://")
ENDPOINTS_MAX = 16


def endpoints_of(url: str) -> tuple[str, ...]:
    """The endpoints that a coordinator's URL names.

    Raises:
        ConfigError: kind `etcd_url`.
    """
    _, _, rest = url.partition("://")
    endpoints = tuple(part.strip() for part in rest.rstrip("/").split(","))
    good = [host and port.isdigit() and 0 < int(port) < 1 << 16 for host, _, port in map(_split, endpoints)]
    if not url.startswith(SCHEMES) or not all(good) or len(endpoints) > ENDPOINTS_MAX:
        raise ConfigError(
            f"bad coordinator {url[:128]!r}",
            kind="etcd_url",
            hint="etcd://HOST:PORT,HOST:PORT (etcds:// with TLS)",
        )
    return endpoints


def open_etcd(
    url: str,
    *,
    ca: bytes | None = None,
    cert: bytes | None = None,
    key: bytes | None = None,
    user: str = "",
    password: str = "",
) -> EtcdKeyValue:
    """A client for the URL; nothing is connected yet. `etcds://` is with TLS: PEMs of the authority, and of a client
    certificate where etcd asks for one.

    Raises:
        ConfigError: kinds `etcd_url`, `etcd_missing`.
    """
    endpoints = endpoints_of(url)
    try:
        from snapd.coordination.etcd_kv import EtcdAccess, EtcdKeyValue
    except ImportError as error:
        raise ConfigError(
            f"etcd is the coordinator, but its client is not installed: {error}",
            kind="etcd_missing",
            hint="pip install 'snapd[etcd]'",
        ) from error
    access = EtcdAccess(
        is_tls=url.startswith("etcds://"), ca=ca, cert=cert, key=key, user=user, password=password
    )
    return EtcdKeyValue(endpoints, access=access)


def _split(endpoint: str) -> tuple[str, str, str]:
    return endpoint.rpartition(":")
