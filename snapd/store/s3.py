"""A durable tier in S3-compatible storage. Only here and beside (s3_*.py) boto3 is known.

Nothing is ever renamed, and no key written twice but intents and pins. What a commit rests upon is `IfNoneMatch: *`; a
server may ignore it, which `probe` finds. Credentials come from the usual chain of AWS, and are in no text.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from botocore.compat import HAS_CRT

from snapd.errors import ConfigError, IntegrityError, NotFoundError, SnapdError
from snapd.store.base import Buffer, Created, ObjectInfo, Probe, Requests
from snapd.store.opening import StoreOptions
from snapd.store.probing import PROBE, probe_conditional
from snapd.store.s3_errors import Refused
from snapd.store.s3_reading import S3Reading
from snapd.store.s3_requests import Patience, S3Requests
from snapd.store.s3_upload import Body, PartBuffers, S3Upload
from snapd.store.surroundings import Surroundings, checked_key, checked_prefix, view_of

_DELETED_AT_ONCE = 1000
_SKEW_NOTED_S = 30.0
_CHECKSUM = "CRC32C" if HAS_CRT else "CRC32"
_SSE = {"s3": "AES256", "kms": "aws:kms"}


class S3Store:
    """See base.Store."""

    def __init__(self, bucket: str, prefix: str, options: StoreOptions, surroundings: Surroundings) -> None:
        self._prefix = f"{prefix}/" if prefix else ""
        where = f" at {options.endpoint}" if options.endpoint else ""
        self._description = f"s3://{bucket}/{prefix}{where}"
        self._options = options
        self._surroundings = surroundings
        self._requests = S3Requests(bucket, self._description, options, surroundings)
        self._pool = ThreadPoolExecutor(options.concurrency, thread_name_prefix="snapd-s3")
        self._in_flight = threading.BoundedSemaphore(options.concurrency)
        self._buffers = PartBuffers()
        self._reading = S3Reading(self._requests, self._pool)
        self._knows_conditions = True
        self._deletes_many = True

    @property
    def description(self) -> str:
        return self._description

    @property
    def requests(self) -> Requests:
        return self._requests.meter.requests

    # what it can do

    def probe(self) -> Probe:
        problems: list[str] = []
        skew_s = self._asked_clock_s(None) - self._surroundings.wall_s()
        refuses, found = self._probed_conditions()
        problems += found
        keeps = self._refuses_wrong_checksum()
        if not keeps:
            problems.append(
                f"{self._description} takes objects whose checksum is wrong: damage on the way is found"
                " by snapd's own digests only, when they are read"
            )
        if abs(skew_s) > _SKEW_NOTED_S:
            problems.append(f"the clock of {self._description} is {skew_s:+.0f} s from this machine's")
        return Probe(refuses, keeps, skew_s, tuple(problems))

    def _probed_conditions(self) -> tuple[bool, list[str]]:
        try:
            return probe_conditional(
                self,
                self._surroundings.random_token(),
                lambda key, data: self._created(key, data, self._patience(None)),
            )
        except ConfigError as error:
            if error.kind != "store":
                raise
            self._knows_conditions = False
            return False, [f"{self._description} does not know conditional creation: {error.message}"]

    def _refuses_wrong_checksum(self) -> bool:
        key = f"{PROBE}{self._surroundings.random_token()}"
        wrong = base64.b64encode(b"\0\0\0\1").decode()  # no text that is sent has this one

        def put(client: Any) -> None:
            arguments = {**self._put_arguments, "ChecksumCRC32": wrong}
            client.put_object(**self._named(key), Body=key.encode(), **arguments)

        try:
            self._requests.ask("put", f"cannot write {key}", self._patience(None), put, tries_max=1)
        except (IntegrityError, ConfigError):  # bad digest, invalid request
            return True
        self.delete([key])
        return False

    def now_s(self) -> float:
        now = self._requests.clock.now_s()
        return self._asked_clock_s(None) if now is None else now

    def _asked_clock_s(self, deadline_s: float | None) -> float:
        """By the Date header of an answer, whole seconds."""

        def ask(client: Any) -> None:
            answer = client.list_objects_v2(
                Bucket=self._requests.bucket, Prefix=f"{self._prefix}{PROBE}", MaxKeys=1
            )
            self._requests.heard(answer)

        self._requests.ask("list", "cannot ask the clock", self._patience(deadline_s), ask)
        now = self._requests.clock.now_s()
        if now is None:
            raise ConfigError(
                f"{self._description} does not say what time it is (no Date header)", kind="store_clock"
            )
        return now

    # writing

    def create(self, key: str, data: Buffer, *, deadline_s: float | None = None) -> Created:
        patience = self._patience(deadline_s)
        if self._options.single_writer:  # the store may not look; nobody else writes between this and that
            found = self._compared(key, data, patience)
            if found is not None:
                return found
        return self._created(key, data, patience)

    def _created(self, key: str, data: Buffer, patience: Patience) -> Created:
        while True:
            try:
                self._put(key, data, patience, is_conditional=self._knows_conditions)
                return Created.OURS
            except Refused:
                found = self._compared(key, data, patience)
            if found is not None:
                return found
            # deleted since it was refused: once more

    def _compared(self, key: str, data: Buffer, patience: Patience) -> Created | None:
        """Read back what is there; None: nothing."""
        view = view_of(data)
        try:
            there = self._reading.whole(key, self._full(key), view.nbytes, patience)
        except NotFoundError as error:
            if error.kind != "object":
                raise
            return None
        except IntegrityError:
            return Created.ANOTHERS  # larger
        return Created.OURS if there == view else Created.ANOTHERS

    def put(self, key: str, data: Buffer, *, deadline_s: float | None = None) -> None:
        self._put(key, data, self._patience(deadline_s), is_conditional=False)

    def _put(self, key: str, data: Buffer, patience: Patience, *, is_conditional: bool) -> None:
        view = view_of(data)
        arguments = {**self._put_arguments, "ChecksumAlgorithm": _CHECKSUM}
        if is_conditional:
            arguments["IfNoneMatch"] = "*"

        def put(client: Any) -> None:
            answer = client.put_object(
                **self._named(key), Body=Body(view), ContentLength=view.nbytes, **arguments
            )
            self._requests.heard(answer)

        self._requests.ask("put", f"cannot write {key}", patience, put)
        self._requests.meter.add(sent_nbytes=view.nbytes)

    def upload(self, key: str, *, nbytes: int | None = None) -> S3Upload:
        return S3Upload(
            self._requests,
            key,
            self._full(key),
            nbytes=nbytes,
            pool=self._pool,
            in_flight=self._in_flight,
            buffers=self._buffers,
            put_arguments=self._put_arguments,
            checksum=_CHECKSUM,
            is_conditional=self._knows_conditions,
        )

    # reading

    def read(self, key: str, *, max_nbytes: int, deadline_s: float | None = None) -> bytes:
        return self._reading.whole(key, self._full(key), max_nbytes, self._patience(deadline_s))

    def read_into(
        self, key: str, offset: int, buffer: memoryview, *, deadline_s: float | None = None
    ) -> None:
        view = view_of(buffer)
        if not view.nbytes:  # no range is empty
            self.head(key, deadline_s=deadline_s)
            return
        self._reading.into(key, self._full(key), offset, view, self._patience(deadline_s))

    def head(self, key: str, *, deadline_s: float | None = None) -> ObjectInfo:
        def look(client: Any) -> ObjectInfo:
            answer = client.head_object(**self._named(key))
            self._requests.heard(answer)
            return ObjectInfo(key, answer["ContentLength"], answer["LastModified"].timestamp())

        def why(client: Any) -> ObjectInfo:
            answer = client.get_object(**self._named(key))
            self._requests.heard(answer)
            answer["Body"].close()
            return ObjectInfo(key, answer["ContentLength"], answer["LastModified"].timestamp())

        patience = self._patience(deadline_s)
        doing = f"cannot look at {key}"
        try:
            return self._requests.ask("head", doing, patience, look)
        except SnapdError as error:
            if error.kind not in ("object", "store_denied", "store"):
                raise
        return self._requests.ask("get", doing, patience, why)  # an answer to HEAD has no words

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        start = f"{self._prefix}{checked_prefix(prefix)}"
        token = ""
        while True:
            page = self._page(start, token)
            for found in page.get("Contents", ()):
                key = _own_key(found["Key"], start, self._prefix)
                if key is not None:
                    yield ObjectInfo(key, found["Size"], found["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            token = _next(token, page.get("NextContinuationToken"), self._description)

    def _page(self, start: str, token: str) -> dict[str, Any]:
        def ask(client: Any) -> dict[str, Any]:
            arguments = {"ContinuationToken": token} if token else {}
            answer: dict[str, Any] = client.list_objects_v2(
                Bucket=self._requests.bucket, Prefix=start, **arguments
            )
            self._requests.heard(answer)
            return answer

        return self._requests.ask("list", f"cannot list {start or 'everything'}", self._patience(None), ask)

    # deleting

    def delete(self, keys: Sequence[str]) -> None:
        full = [self._full(key) for key in keys]
        for at in range(0, len(full), _DELETED_AT_ONCE):
            self._delete_some(full[at : at + _DELETED_AT_ONCE])

    def _delete_some(self, full_keys: Sequence[str]) -> None:
        def delete(client: Any) -> Sequence[dict[str, Any]]:
            wanted = {"Objects": [{"Key": key} for key in full_keys], "Quiet": True}
            answer = client.delete_objects(Bucket=self._requests.bucket, Delete=wanted)
            self._requests.heard(answer)
            refused: Sequence[dict[str, Any]] = answer.get("Errors", [])
            return refused

        again = full_keys
        if self._deletes_many and len(full_keys) > 1:
            try:
                again = [
                    each["Key"]
                    for each in self._requests.ask("delete", "cannot delete", self._patience(None), delete)
                ]
            except ConfigError as error:
                if error.kind != "store":
                    raise
                self._deletes_many = False  # not every server knows it
        for full_key in again:  # alone, so that the error says what and why
            self._delete_one(full_key)

    def _delete_one(self, full_key: str) -> None:
        def delete(client: Any) -> None:
            self._requests.heard(client.delete_object(Bucket=self._requests.bucket, Key=full_key))

        try:
            self._requests.ask("delete", f"cannot delete {full_key}", self._patience(None), delete)
        except NotFoundError as error:
            if error.kind != "object":
                raise

    def unfinished(self) -> Iterator[tuple[str, str, float]]:
        markers: dict[str, str] = {}
        while True:
            page = self._unfinished_page(markers)
            for found in page.get("Uploads", ()):
                key = _own_key(found["Key"], self._prefix, self._prefix)
                if key is not None:
                    yield key, found["UploadId"], found["Initiated"].timestamp()
            if not page.get("IsTruncated"):
                return
            after = {
                "KeyMarker": page.get("NextKeyMarker", ""),
                "UploadIdMarker": page.get("NextUploadIdMarker", ""),
            }
            _next(repr(markers), repr(after), self._description)
            markers = {name: value for name, value in after.items() if value}

    def _unfinished_page(self, markers: dict[str, str]) -> dict[str, Any]:
        def ask(client: Any) -> dict[str, Any]:
            answer: dict[str, Any] = client.list_multipart_uploads(
                Bucket=self._requests.bucket, Prefix=self._prefix, **markers
            )
            self._requests.heard(answer)
            return answer

        return self._requests.ask("list", "cannot list what is unfinished", self._patience(None), ask)

    def abort_unfinished(self, key: str, token: str) -> None:
        def abort(client: Any) -> None:
            self._requests.heard(client.abort_multipart_upload(**self._named(key), UploadId=token))

        try:
            self._requests.ask("abort", f"cannot abort {key}", self._patience(None), abort)
        except NotFoundError as error:
            if error.kind != "object":
                raise

    def close(self) -> None:
        self._requests.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # names

    def _patience(self, deadline_s: float | None) -> Patience:
        return self._requests.patience(deadline_s)

    def _full(self, key: str) -> str:
        return f"{self._prefix}{checked_key(key)}"

    def _named(self, key: str) -> dict[str, str]:
        return {"Bucket": self._requests.bucket, "Key": self._full(key)}

    @property
    def _put_arguments(self) -> dict[str, str]:
        if self._options.sse not in _SSE:
            return {}
        key = {"SSEKMSKeyId": self._options.sse_kms_key} if self._options.sse_kms_key else {}
        return {"ServerSideEncryption": _SSE[self._options.sse], **key}


def _own_key(full_key: str, start: str, prefix: str) -> str | None:
    """The key relative to the tier; None: not one of ours."""
    if not full_key.startswith(start):
        return None
    try:
        return checked_key(full_key.removeprefix(prefix))
    except ConfigError:
        return None


def _next(token: str, following: str | None, description: str) -> str:
    if not following or following == token:
        raise IntegrityError(f"{description} says that a list goes on, and not where", kind="store_bytes")
    return following
