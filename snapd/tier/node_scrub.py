"""Reading again what lies on a node's own disk: a manifest, or some chunks of a pack. Blocking; nothing is written.

It is read from the disk and not from the kernel's memory: what that has of the file is dropped before, and again
afterwards, so that training keeps its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from snapd.codec.compress import ChunkDecoder
from snapd.core.stored import Encoding, Spot, StoredChunk, StoredShard
from snapd.core.tier_keys import TierKeys
from snapd.errors import IntegrityError, NotFoundError, UnavailableError
from snapd.store.base import Store
from snapd.tier.envelope import NBYTES_MAX, Kind
from snapd.tier.manifests import decode_shard

GONE = "it is not there"


class ScrubReader:
    """One thread at a time. `root`: the store's folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._decoder = ChunkDecoder()
        self._stored, self._raw = bytearray(), bytearray()

    def check_chunks(
        self, store: Store, keys: TierKeys, chunks: Sequence[StoredChunk], witness: str
    ) -> dict[Spot, str]:
        """Read chunks of one pack; what is wrong with those that are bad, `GONE` where the pack is missing.

        `witness`: key of another object. A chunk that the disk has an error of its own for is bad if that can be read;
        if it cannot, nothing is proved.

        Raises: what a store raises that does not answer.
        """
        found: dict[Spot, str] = {}
        key = keys.pack(chunks[0].pack)
        self._cool(key)
        for chunk in chunks:
            try:
                self._check(store, key, chunk)
            except IntegrityError as error:
                found[chunk.spot] = error.message
            except NotFoundError as error:
                if error.kind != "object":
                    raise
                return {chunk.spot: GONE for chunk in chunks}
            except UnavailableError as error:
                if error.kind != "store_failing" or not self._can_read(store, witness):
                    raise
                found[chunk.spot] = error.message
        self._cool(key)
        return found

    def find_unreadable(
        self, store: Store, keys: TierKeys, chunks: Sequence[StoredChunk], witness: str
    ) -> dict[Spot, str]:
        """The first of `chunks` that is bad; empty: all can be read by now. As `check_chunks`."""
        for chunk in chunks:
            found = self.check_chunks(store, keys, [chunk], witness)
            if found:
                return found
        return {}

    def check_manifest(self, store: Store, key: str, job: str, shard: StoredShard) -> str:
        """What is wrong with a manifest, which should say `shard`; empty: nothing. Raises as `check_chunks`."""
        self._cool(key)
        try:
            data = store.read(key, max_nbytes=NBYTES_MAX[Kind.SHARD])
            return (
                "" if decode_shard(data, key=key, job=job) == shard else "it says something else than before"
            )
        except IntegrityError as error:
            return error.message
        except NotFoundError as error:
            if error.kind != "object":
                raise
            return GONE
        except UnavailableError as error:
            if error.kind != "store_failing":
                raise
            return error.message

    def _check(self, store: Store, key: str, chunk: StoredChunk) -> None:
        stored = self._room("_stored", chunk.stored_nbytes)
        store.read_into(key, chunk.offset, stored)
        raw = stored if chunk.encoding is Encoding.RAW else self._room("_raw", chunk.nbytes)
        self._decoder.decode(stored, chunk, raw)

    def _room(self, name: str, nbytes: int) -> memoryview:
        if len(getattr(self, name)) < nbytes:
            setattr(self, name, bytearray(nbytes))
        return memoryview(getattr(self, name))[:nbytes]

    def _can_read(self, store: Store, key: str) -> bool:
        self._cool(key)
        try:
            store.read(key, max_nbytes=NBYTES_MAX[Kind.SHARD])
        except (UnavailableError, NotFoundError):
            return False
        except IntegrityError:
            return True
        return True

    def _cool(self, key: str) -> None:
        """Drop what the kernel keeps of the file; a file system that does not know how loses nothing by it."""
        with contextlib.suppress(OSError):
            descriptor = os.open(self._root / key, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
