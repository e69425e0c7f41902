"""Part `transfer` of tiers.py: stores alone, without format or flush, against what others do with the same bytes."""

from __future__ import annotations

import io
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from report import Report, spread

OBJECT_NBYTES = 64 << 20  # as a pack
CHUNK_NBYTES = 4 << 20
UP_LIMIT, DOWN_LIMIT, DIRECTORY_LIMIT = 1 / 0.8, 1 / 0.8, 1 / 0.9
BOTO_PARTS = (8 << 20, 16 << 20)  # its default, and ours


def transfer(report: Report, *, rounds: int, concurrency: int, tmp: str | None) -> None:
    data = os.urandom(OBJECT_NBYTES)
    _directory(report, data, rounds, tmp)
    _s3(report, data, rounds, concurrency)


def chunks(data: bytes) -> list[memoryview]:
    view = memoryview(data)
    return [view[at : at + CHUNK_NBYTES] for at in range(0, len(view), CHUNK_NBYTES)]


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def in_turns(rounds: int, calls: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
    """Seconds of each, one after the other in each round, after a round that does not count; the order turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds + 1):
        for name in names if number % 2 else reversed(names):
            took = timed(lambda name=name, number=number: calls[name](number))
            if number:
                seconds[name].append(took)
    return seconds


def _directory(report: Report, data: bytes, rounds: int, tmp: str | None) -> None:
    from tests.support.stores import directory_store

    folder = Path(tempfile.mkdtemp(prefix="snapd-bench-", dir=tmp))
    try:
        store = directory_store(folder / "tier")

        def ours(number: int) -> None:
            upload = store.upload(f"packs/{number}", nbytes=len(data))
            upload.write(chunks(data))
            upload.commit()

        def floor(number: int) -> None:
            path = folder / f"floor{number}"
            with open(path, "xb", buffering=0) as file:
                for view in chunks(data):
                    file.write(view)
                os.fsync(file.fileno())

        seconds = in_turns(rounds, {"write + fsync": floor, "snapd": ours})
    finally:
        shutil.rmtree(folder)
    _tell(report, "directory upload", seconds, ["write + fsync"], DIRECTORY_LIMIT)


def _s3(report: Report, data: bytes, rounds: int, concurrency: int) -> None:
    """A server on this machine, its data in memory: client and server share the cores."""
    import boto3.session
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    from tests.support.seaweed import BUCKET, running

    folder = Path(tempfile.mkdtemp(prefix="snapd-bench-", dir="/dev/shm"))
    try:
        with running(folder) as server:
            store = server.store("snapd", concurrency=concurrency)
            style = Config(s3={"addressing_style": "path"}, max_pool_connections=2 * concurrency)
            client = boto3.session.Session().client(
                "s3", endpoint_url=server.endpoint, region_name="us-east-1", config=style
            )
            buffer = bytearray(len(data))

            def up(number: int) -> None:
                upload = store.upload(f"{number}", nbytes=len(data))
                upload.write(chunks(data))
                upload.commit()

            ups: dict[str, Callable[[int], object]] = {"snapd": up}
            downs: dict[str, Callable[[int], object]] = {
                "snapd": lambda number: store.read_into(f"{number}", 0, memoryview(buffer))
            }
            for nbytes in BOTO_PARTS:
                name = f"boto3, parts of {nbytes >> 20} MiB"
                config = TransferConfig(
                    max_concurrency=concurrency,
                    multipart_chunksize=nbytes,
                    preferred_transfer_client="classic",
                )
                ups[name], downs[name] = _boto(client, BUCKET, f"boto{nbytes}", data, config)
            up_s = in_turns(rounds, ups)
            down_s = in_turns(rounds, downs)
            assert buffer == data
            store.close()
    finally:
        shutil.rmtree(folder)
    _tell(report, f"S3 upload, concurrency {concurrency}", up_s, list(up_s)[1:], UP_LIMIT)
    _tell(report, f"S3 download, concurrency {concurrency}", down_s, list(down_s)[1:], DOWN_LIMIT)


def _boto(
    client: Any, bucket: str, prefix: str, data: bytes, config: Any
) -> tuple[Callable[[int], object], Callable[[int], object]]:
    """Upload from memory, download into memory, with boto3's transfer manager."""

    def up(number: int) -> None:
        client.upload_fileobj(io.BytesIO(data), bucket, f"{prefix}/{number}", Config=config)

    def down(number: int) -> None:
        client.download_fileobj(bucket, f"{prefix}/{number}", io.BytesIO(), Config=config)

    return up, down


def _tell(
    report: Report, name: str, seconds: dict[str, list[float]], others: list[str], limit: float
) -> None:
    """Against the fastest of the others, in seconds: the median of the pairs of one round."""
    for way, samples in seconds.items():
        rates = [OBJECT_NBYTES / 1e6 / each for each in samples]
        print(f"{name}: {way}: {spread(rates, 0)} MB/s", flush=True)
    fastest = min(others, key=lambda way: statistics.median(seconds[way]))
    ratios = [ours / theirs for ours, theirs in zip(seconds["snapd"], seconds[fastest], strict=True)]
    report.claim(f"{name} / {fastest}", statistics.median(ratios), limit, "x time", spread(ratios, 2))
    report.samples[name] = seconds
