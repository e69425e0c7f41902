"""From a URL to a store: `/path` or `file:///path`, `s3://bucket/prefix`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from snapd.errors import ConfigError
from snapd.store.base import Store
from snapd.store.directory import DirectoryStore
from snapd.store.surroundings import Surroundings

S3 = "s3"
FILE = "file"
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_PREFIX = re.compile(r"[A-Za-z0-9!_.*'()@=+-]+(/[A-Za-z0-9!_.*'()@=+-]+)*")
_PREFIX_LENGTH_MAX = 700  # with our keys behind it less than the 1,024 of S3


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How to talk to a store; a directory needs only the last. What each trades: config_tiers.py.

    Attributes:
        endpoint: URL of the server; empty: the one that the AWS chain finds.
        sse: `off`, `s3` or `kms`.
        path_style: None: where an endpoint is given.
        concurrency: requests in flight for one large object.
        deadline_s: of a request with all its repetitions; `stall_s`: without a byte.
    """

    endpoint: str = ""
    region: str = ""
    ca: str = ""
    path_style: bool | None = None
    sse: str = "off"
    sse_kms_key: str = ""
    concurrency: int = 4
    connect_s: float = 5.0
    stall_s: float = 20.0
    deadline_s: float = 120.0
    single_writer: bool = False


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """`scheme`: `file` or `s3`. `path`: of the folder, absolute. `prefix`: empty, or without a slash at either end."""

    scheme: str
    path: Path = Path("/")
    bucket: str = ""
    prefix: str = ""


def parsed_url(text: str) -> StoreUrl:
    """What a URL names.

    Raises:
        ConfigError: kind `store`.
    """
    if text.startswith("/"):
        return StoreUrl(FILE, path=Path(text))
    try:
        parts = urlsplit(text)
        has_login = "@" in parts.netloc
    except ValueError:
        raise _refused(text, "it is no URL") from None
    if has_login or parts.query or parts.fragment:
        raise ConfigError(
            "the URL of a store has no credentials, no query and no fragment",
            kind="store",
            hint="credentials come from the usual chain of AWS: environment, ~/.aws, instance",
        )
    if parts.scheme == FILE and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return StoreUrl(FILE, path=Path(unquote(parts.path)))
    if parts.scheme != S3:
        raise _refused(text, "it begins with neither `/` nor `file:///` nor `s3://`")
    prefix = parts.path.strip("/")
    if not _BUCKET.fullmatch(parts.netloc):
        raise _refused(text, f"{parts.netloc!r} cannot be a bucket")
    is_clean = not any(part in (".", "..") for part in prefix.split("/"))
    if prefix and not (_PREFIX.fullmatch(prefix) and is_clean and len(prefix) <= _PREFIX_LENGTH_MAX):
        raise _refused(text, f"{prefix!r} cannot be the beginning of keys")
    return StoreUrl(S3, bucket=parts.netloc, prefix=prefix)


def open_store(url: str, options: StoreOptions, surroundings: Surroundings) -> Store:
    """A store that nothing was asked of yet: it may be away, or missing. The caller closes it.

    Raises:
        ConfigError: kind `store`: the URL; `store_library`: boto3 is not installed; `store_credentials` and others are
            raised by the first request.
    """
    found = parsed_url(url)
    if found.scheme == FILE:
        return DirectoryStore(found.path, surroundings, single_writer=options.single_writer)
    try:
        from snapd.store.s3 import S3Store
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{url} needs {error.name}, which is not installed",
            kind="store_library",
            hint="pip install snapd[s3]",
        ) from error
    return S3Store(found.bucket, found.prefix, options, surroundings)


def _refused(text: str, why: str) -> ConfigError:
    return ConfigError(
        f"{text!r} names no store: {why}", kind="store", hint="/path, file:///path or s3://bucket/prefix"
    )
