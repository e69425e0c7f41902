"""Reading from S3: ranges, several at once where much is wanted, each taken up again where it broke off."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from typing import Any

from snapd.errors import IntegrityError
from snapd.store.s3_requests import Patience, S3Requests
from snapd.units import MIB

PIECE_BYTES = 8 * MIB  # larger reads are split
_RECEIVE_BYTES = MIB // 2
_RANGE = re.compile(r"bytes ([0-9]+)-([0-9]+)/([0-9]+|\*)")


class S3Reading:
    def __init__(self, requests: S3Requests, pool: ThreadPoolExecutor) -> None:
        self._requests = requests
        self._pool = pool

    def whole(self, key: str, full_key: str, max_nbytes: int, patience: Patience) -> bytes:
        """The object, checked against the store's checksum where it has one."""
        doing = f"cannot read {key}"

        def read(client: Any) -> bytes:
            answer = client.get_object(Bucket=self._requests.bucket, Key=full_key, ChecksumMode="ENABLED")
            self._requests.heard(answer)
            with closing(answer["Body"]) as body:
                if answer["ContentLength"] > max_nbytes:
                    raise IntegrityError(
                        f"{key} in {self._requests.description} has {answer['ContentLength']} bytes,"
                        f" more than {max_nbytes}",
                        kind="store_bytes",
                    )
                data: bytes = body.read()
            self._requests.meter.add(received_nbytes=len(data))
            return data

        return self._requests.ask("get", doing, patience, read)

    def into(self, key: str, full_key: str, offset: int, view: memoryview, patience: Patience) -> None:
        if view.nbytes <= PIECE_BYTES + PIECE_BYTES // 2:
            _Range(self._requests, key, full_key, offset, view, patience, threading.Event()).fill()
            return
        give_up = threading.Event()
        pieces: list[Future[None]] = []
        for at in range(0, view.nbytes, PIECE_BYTES):
            piece = view[at : at + PIECE_BYTES]
            part = _Range(self._requests, key, full_key, offset + at, piece, patience, give_up)
            pieces.append(self._requests.submit(self._pool, part.fill))
        try:
            wait(pieces, return_when=FIRST_EXCEPTION)
        finally:
            give_up.set()
            for future in pieces:
                future.cancel()
            wait(pieces)  # none may write into the caller's buffer any more
        for future in pieces:
            if not future.cancelled():
                future.result()


class _Range:
    """One range on its way into its part of the buffer."""

    def __init__(
        self,
        requests: S3Requests,
        key: str,
        full_key: str,
        offset: int,
        view: memoryview,
        patience: Patience,
        give_up: threading.Event,
    ) -> None:
        self._requests = requests
        self._key = key
        self._full_key = full_key
        self._offset = offset
        self._view = view
        self._patience = patience
        self._give_up = give_up
        self._done = 0

    def fill(self) -> None:
        if not self._give_up.is_set():
            self._requests.ask("get", f"cannot read {self._key}", self._patience, self._receive)

    def _receive(self, client: Any) -> None:
        first, last = self._offset + self._done, self._offset + self._view.nbytes - 1
        answer = client.get_object(
            Bucket=self._requests.bucket, Key=self._full_key, Range=f"bytes={first}-{last}"
        )
        self._requests.heard(answer)
        before = self._done
        with closing(answer["Body"]) as body:
            self._check(answer, first, last)
            while self._done < self._view.nbytes:
                if self._patience.left_s() <= 0:
                    raise TimeoutError("no time left")
                if self._give_up.is_set():
                    return
                count = body.readinto(self._view[self._done : self._done + _RECEIVE_BYTES])
                if not count:
                    raise ConnectionResetError(f"it ended {self._view.nbytes - self._done} bytes early")
                self._done += count
        self._requests.meter.add(received_nbytes=self._done - before)

    def _check(self, answer: Mapping[str, Any], first: int, last: int) -> None:
        """See that what comes is what was asked for."""
        length = answer["ContentLength"]
        found = _RANGE.fullmatch(answer.get("ContentRange", ""))
        got = (int(found[1]), int(found[2])) if found else (0, length - 1)
        if got != (first, last) or length != last - first + 1:
            raise IntegrityError(
                f"{self._key} in {self._requests.description}: bytes {first} to {last} were asked for,"
                f" {got[0]} to {got[1]} came ({length} bytes)",
                kind="store_bytes",
            )
