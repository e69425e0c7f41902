"""What a daemon that was killed had written for a snapshot that it did not commit: found by its intents, used again.

Its packs are there, and its intent protects them; which chunks they hold is in their footers. Whoever adopts an intent
keeps it alive until the commit record names the packs, and then removes it. Only intents of the same writer are taken:
a name that the daemon keeps with its arena, and nobody else has. Blocking.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from snapd.core.stored import StoredChunk
from snapd.core.tier_keys import TierKeys
from snapd.errors import IntegrityError, NotFoundError
from snapd.store.base import Store
from snapd.tier.envelope import NBYTES_MAX, Kind
from snapd.tier.intents import WriterIntent
from snapd.tier.notes import decode_intent
from snapd.tier.packs import PACK_HEAD_BYTES, TAIL_BYTES, footer_nbytes, parse_footer

PACKS_MAX = 4096


def adopt_intents(
    store: Store,
    keys: TierKeys,
    node: str,
    *,
    own: str,
    condemned: Collection[str],
    ttl_s: float,
    monotonic_s: Callable[[], float],
) -> list[WriterIntent]:
    """The intents of `node` that a daemon before this one left, put again as a sign of life. `own`: the key of ours."""
    adopted = []
    for info in store.list(keys.intents):
        if info.key == own or info.key in condemned or keys.intent_of(info.key) is None:
            continue
        try:
            data = store.read(info.key, max_nbytes=NBYTES_MAX[Kind.INTENT])
            intent = decode_intent(data, key=info.key, job=keys.job)
        except IntegrityError:
            continue  # a collector's matter
        except NotFoundError as error:
            if error.kind != "object":
                raise
            continue
        if intent.node == node:
            found = WriterIntent(store, keys, intent, ttl_s=ttl_s, monotonic_s=monotonic_s)
            found.publish(intent.id, intent.bases, intent.revision)
            adopted.append(found)
    return adopted


def chunks_of_packs(
    store: Store, keys: TierKeys, write_ids: Collection[str], packs: Mapping[str, int]
) -> list[StoredChunk]:
    """What lies in the packs of these writers; `packs`: name -> size of all there are. Broken ones are left out."""
    found: list[StoredChunk] = []
    names = sorted(name for name in packs if name.partition("-")[0] in write_ids)
    for name in names[:PACKS_MAX]:
        try:
            found.extend(_chunks_of(store, keys, name, packs[name]))
        except IntegrityError:
            continue
        except NotFoundError as error:
            if error.kind != "object":
                raise
    return found


def _chunks_of(store: Store, keys: TierKeys, name: str, nbytes: int) -> tuple[StoredChunk, ...]:
    key = keys.pack(name)
    if nbytes < PACK_HEAD_BYTES + TAIL_BYTES:
        return ()
    tail = bytearray(TAIL_BYTES)
    store.read_into(key, nbytes - TAIL_BYTES, memoryview(tail))
    footer = bytearray(footer_nbytes(bytes(tail), key=key, pack_nbytes=nbytes))
    store.read_into(key, nbytes - len(footer), memoryview(footer))
    return parse_footer(bytes(footer), key=key, name=name, pack_nbytes=nbytes)
