"""A large object on its way to S3: parts, some in flight while the next is filled; a small one goes in one request."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from io import RawIOBase
from typing import Any

from snapd.errors import IntegrityError, NotFoundError, SnapdError, UnavailableError
from snapd.store.base import Buffer
from snapd.store.s3_errors import Refused
from snapd.store.s3_requests import S3Requests
from snapd.store.surroundings import view_of
from snapd.units import MIB

PART_BYTES = 16 * MIB
PARTS_MAX = 10_000
_PARTS_OF_A_SIZE = 1000  # of an object of unknown size; then they double
_ABORT_WITHIN_S = 10.0
UPLOAD_ID = "snapd-upload"  # metadata: whose object it is that is there


def part_nbytes(number: int, nbytes: int | None) -> int:
    """Size of part `number` (from 1) of an object of `nbytes`, so that no object needs more than 10,000 parts."""
    if nbytes is None:
        return PART_BYTES << ((number - 1) // _PARTS_OF_A_SIZE)
    needed = -(-nbytes // PARTS_MAX)
    return max(PART_BYTES, -(-needed // MIB) * MIB)


class PartBuffers:
    """Buffers of parts that were sent, for the next ones: making them costs more than filling them. All uploads of a
    store share them, so that there are no more than uploads and parts in flight; without uploads there are none.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spare: list[bytearray] = []
        self._uploads = 0

    def enter(self) -> None:
        with self._lock:
            self._uploads += 1

    def leave(self) -> None:
        with self._lock:
            self._uploads -= 1
            if self._uploads == 0:
                self._spare.clear()

    def take(self, nbytes: int) -> bytearray:
        with self._lock:
            found = self._spare.pop() if self._spare else b""
        return found if isinstance(found, bytearray) and len(found) == nbytes else bytearray(nbytes)

    def give(self, buffer: bytearray) -> None:
        with self._lock:
            if self._uploads:
                self._spare.append(buffer)


class Body(RawIOBase):
    """Bytes as a file: sent piece by piece, so that each piece has the time-out, not all of them together."""

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self._view = view
        self._at = 0

    def __len__(self) -> int:
        return self._view.nbytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._view.nbytes)[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self._view.nbytes if size is None or size < 0 else self._at + size
        piece = self._view[self._at : end]
        self._at += piece.nbytes
        return piece.tobytes()

    def readinto(self, buffer: Any) -> int:
        into = memoryview(buffer).cast("B")
        piece = self._view[self._at : self._at + into.nbytes]
        into[: piece.nbytes] = piece
        self._at += piece.nbytes
        return piece.nbytes


class S3Upload:
    """See base.Upload. Memory: one part, and those in flight, whose number the store bounds."""

    def __init__(
        self,
        requests: S3Requests,
        key: str,
        full_key: str,
        *,
        nbytes: int | None,
        pool: ThreadPoolExecutor,
        in_flight: threading.BoundedSemaphore,
        buffers: PartBuffers,
        put_arguments: dict[str, str],
        checksum: str,
        is_conditional: bool,
    ) -> None:
        self._requests = requests
        self._key = key
        self._object = {"Bucket": requests.bucket, "Key": full_key}
        self._nbytes = nbytes
        self._pool = pool
        self._in_flight = in_flight
        self._checksum = checksum
        self._condition = {"IfNoneMatch": "*"} if is_conditional else {}
        self._token = requests.surroundings.random_token()
        self._beginning = {
            **self._object,
            **put_arguments,
            "ChecksumAlgorithm": checksum,
            "Metadata": {UPLOAD_ID: self._token},
        }
        self._buffer: bytearray | None = None
        self._filled = 0
        self._buffers = buffers
        buffers.enter()
        self._parts: list[Future[dict[str, Any]]] = []
        self._upload_id = ""
        self._sent = 0
        self._is_over = False
        self._give_up = threading.Event()

    def write(self, buffers: Sequence[Buffer]) -> None:
        for view in map(view_of, buffers):
            at = 0
            while at < view.nbytes:
                if self._buffer is not None and self._filled == len(self._buffer):
                    self._send_part()  # not before there is more: what fits into one part needs no parts
                buffer = self._buffer if self._buffer is not None else self._new_buffer()
                count = min(len(buffer) - self._filled, view.nbytes - at)
                buffer[self._filled : self._filled + count] = view[at : at + count]
                self._filled += count
                at += count

    def commit(self) -> int:
        assert not self._is_over
        nbytes = self._sent + self._filled
        if not self._upload_id:
            self._settled(self._put_whole, "put", nbytes)
        else:
            if self._filled:
                self._send_part()
            done = [future.result() for future in self._parts]
            listed = {"Parts": sorted(done, key=lambda part: int(part["PartNumber"]))}
            self._settled(lambda client: self._complete(client, listed), "complete", nbytes)
        self._is_over = True
        self._let_go()
        return nbytes

    def abort(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._give_up.set()
        for future in self._parts:
            if future.cancel():
                self._in_flight.release()
        wait(self._parts)  # a part that arrives after the abort would stay for ever
        self._let_go()
        if self._upload_id:
            abort_upload(self._requests, self._object, self._key, self._upload_id)

    def _let_go(self) -> None:
        self._buffer = None
        self._buffers.leave()

    # parts

    def _new_buffer(self) -> bytearray:
        size = part_nbytes(len(self._parts) + 1, self._nbytes)
        if self._nbytes is not None:
            size = max(1, min(size, self._nbytes))
        self._buffer = self._buffers.take(size)
        self._filled = 0
        return self._buffer

    def _send_part(self) -> None:
        """Hand the buffer over to the pool, as soon as one of the parts in flight has arrived."""
        assert self._buffer is not None
        if not self._upload_id:
            self._upload_id = self._begun()
        self._in_flight.acquire()
        self._raise_failed()
        buffer, filled = self._buffer, self._filled
        self._buffer, self._filled = None, 0
        self._sent += filled
        number = len(self._parts) + 1
        try:
            sending = self._requests.submit(self._pool, self._part_sent, number, buffer, filled)
        except UnavailableError:
            self._in_flight.release()
            raise
        self._parts.append(sending)

    def _raise_failed(self) -> None:
        for future in self._parts:
            if future.done() and (error := future.exception()) is not None:
                self._in_flight.release()
                raise error

    def _part_sent(self, number: int, buffer: bytearray, filled: int) -> dict[str, Any]:
        try:
            return self._send(number, memoryview(buffer)[:filled])
        finally:
            self._buffers.give(buffer)
            self._in_flight.release()

    def _send(self, number: int, view: memoryview) -> dict[str, Any]:
        def send(client: Any) -> dict[str, Any]:
            answer = client.upload_part(
                **self._object,
                UploadId=self._upload_id,
                PartNumber=number,
                Body=Body(view),
                ContentLength=view.nbytes,
                ChecksumAlgorithm=self._checksum,
            )
            self._requests.heard(answer)
            name = f"Checksum{self._checksum}"
            return {"PartNumber": number, "ETag": answer["ETag"]} | (
                {name: answer[name]} if name in answer else {}
            )

        doing = f"cannot write part {number} of {self._key}"
        try:
            part = self._requests.ask("part", doing, self._requests.patience(None, self._give_up), send)
        except NotFoundError as missing:
            raise self._vanished(doing, missing) from None
        self._requests.meter.add(sent_nbytes=view.nbytes)
        return part

    # the beginning and the end

    def _begun(self) -> str:
        def begin(client: Any) -> str:
            answer = client.create_multipart_upload(**self._beginning)
            self._requests.heard(answer)
            return str(answer["UploadId"])

        return self._requests.ask("begin", f"cannot begin {self._key}", self._requests.patience(None), begin)

    def _put_whole(self, client: Any) -> None:
        view = memoryview(self._buffer or b"")[: self._filled]
        answer = client.put_object(
            **self._beginning, Body=Body(view), ContentLength=view.nbytes, **self._condition
        )
        self._requests.heard(answer)
        self._requests.meter.add(sent_nbytes=view.nbytes)

    def _complete(self, client: Any, parts: dict[str, Any]) -> None:
        answer = client.complete_multipart_upload(
            **self._object, UploadId=self._upload_id, MultipartUpload=parts, **self._condition
        )
        self._requests.heard(answer)

    def _settled(self, request: Any, kind: str, nbytes: int) -> None:
        """Make the object appear; after a refusal or a lost answer see whose it is that is there."""
        doing = f"cannot publish {self._key}"
        try:
            self._requests.ask(kind, doing, self._requests.patience(None), request)
        except Refused:
            if not self._is_ours(nbytes):
                raise IntegrityError(
                    f"{self._requests.description} has another object {self._key} already", kind="store_bytes"
                ) from None
        except NotFoundError as missing:
            if missing.kind != "object":
                raise
            if not self._is_ours(nbytes):  # else completed by a request whose answer was lost
                raise self._vanished(doing, missing) from None

    def _vanished(self, doing: str, missing: NotFoundError) -> SnapdError:
        """An upload that is not there any more: a collector took it for a dead writer's."""
        if missing.kind != "object":
            return missing
        return UnavailableError(f"{doing}: its parts were removed by somebody else", kind="store_failing")

    def _is_ours(self, nbytes: int) -> bool:
        """Whether our object is there. False: another, or none."""

        def look(client: Any) -> dict[str, Any]:
            answer: dict[str, Any] = client.head_object(**self._object)
            self._requests.heard(answer)
            return answer

        try:
            found = self._requests.ask(
                "head", f"cannot look at {self._key}", self._requests.patience(None), look
            )
        except NotFoundError:
            return False
        return bool(
            found["ContentLength"] == nbytes and found.get("Metadata", {}).get(UPLOAD_ID) == self._token
        )


def abort_upload(requests: S3Requests, where: dict[str, str], key: str, upload_id: str) -> None:
    """Never raises: what stays is listed among the unfinished."""
    try:
        requests.ask(
            "abort",
            f"cannot abort {key}",
            requests.patience(min(_ABORT_WITHIN_S, requests.options.deadline_s)),
            lambda client: client.abort_multipart_upload(**where, UploadId=upload_id),
        )
    except SnapdError:
        return
