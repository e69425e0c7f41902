"""A pack's own index, read from a store: what lies in it, without any manifest; whether that is what manifests say."""

from __future__ import annotations

from collections.abc import Iterable

from snapd.core.stored import StoredChunk
from snapd.core.tier_keys import TierKeys
from snapd.errors import IntegrityError, NotFoundError
from snapd.store.base import Store
from snapd.tier.packs import PACK_HEAD_BYTES, TAIL_BYTES, check_header, footer_nbytes, parse_footer


def read_index(store: Store, keys: TierKeys, name: str) -> tuple[StoredChunk, ...]:
    """All chunks of the pack, in the order in which they lie; header and index are checked, the chunks are not.

    Raises:
        IntegrityError: kinds `tier_pack`, `tier_version`, `tier_manifest`; names the key. What the store raises.
    """
    key = keys.pack(name)
    nbytes = store.head(key).nbytes
    check_header(_read(store, key, 0, min(PACK_HEAD_BYTES, nbytes)), key=key, name=name)
    tail = _read(store, key, max(0, nbytes - TAIL_BYTES), min(TAIL_BYTES, nbytes))
    size = footer_nbytes(tail, key=key, pack_nbytes=nbytes)
    footer = _read(store, key, nbytes - size, size)
    return parse_footer(footer, key=key, name=name, pack_nbytes=nbytes)


def index_problem(store: Store, keys: TierKeys, name: str, chunks: Iterable[StoredChunk]) -> str:
    """What is wrong with the header or the index of a pack, in words that name it; empty: nothing.

    `chunks`: some that manifests say lie in it; those of other packs are passed over. A pack that is not there has no
    index that could be wrong: who reads the chunks finds that, and where they are now.
    """
    try:
        found = {chunk.offset: chunk for chunk in read_index(store, keys, name)}
    except IntegrityError as error:
        return error.message
    except NotFoundError as error:
        if error.kind != "object":
            raise
        return ""
    for chunk in chunks:
        if chunk.pack == name and found.get(chunk.offset) != chunk:
            return f"{keys.pack(name)}: a manifest has another chunk at byte {chunk.offset} than its index"
    return ""


def _read(store: Store, key: str, offset: int, nbytes: int) -> bytes:
    buffer = bytearray(nbytes)
    if nbytes:
        store.read_into(key, offset, memoryview(buffer))
    return bytes(buffer)
