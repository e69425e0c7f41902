"""A trainer without torch whose world spans nodes: as `fake_trainer.py`, and a restore that meets bad chunks goes on
to the next round, as the real client does.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import snapd_native as native
from snapd_proto import trainer_pb2

from tests.support import fake_trainer
from tests.support.fake_trainer import FakeTrainer, Refused, content

ROUNDS_MAX = 6
LANE_S = 30.0
WAIT_MAX_S = 2.0  # the client's default


class LightTrainer(FakeTrainer):
    """One rank, alone on its node."""

    def open_alone(
        self, job: str, rank: int, world_size: int, incarnation: str, state_bytes: int, chunk_bytes: int
    ) -> list[int]:
        """Returns generation and chunk size."""
        generation = self.open(
            job=job,
            rank=rank,
            world_size=world_size,
            incarnation=incarnation,
            local_rank=0,
            local_world_size=1,
            state_bytes_estimate=state_bytes,
            chunk_bytes=chunk_bytes,
        )
        assert self.page is not None
        return [generation, self.page.chunk_bytes]

    is_starved = False

    def timed_capture(self, step: int, chunk_count: int) -> list[int]:
        """Hand a step over or skip it, by the real client's rules; [milliseconds that training was held, 1 if it was
        handed over].
        """
        assert self.page is not None
        began = time.monotonic()
        is_granted = self._await_lane(chunk_count)
        held_ms = int((time.monotonic() - began) * 1000)
        self.is_starved = not is_granted
        if is_granted:
            self.capture(step, chunk_count=chunk_count, is_waiting=False)
        else:
            self.skip(step)
        return [held_ms, int(is_granted)]

    def _await_lane(self, frames: int) -> bool:
        """Wait as `snapd_client.lanes.LaneBook.take` does: not again after a wait in vain, nor where it is hopeless."""
        assert self.page is not None
        page = self.page
        self.want(frames)
        deadline = time.monotonic() + (0.0 if self.is_starved else WAIT_MAX_S)
        while True:
            for lane in range(page.lane_count):
                is_granted = page.lane_state(lane) == native.LANE_GRANTED
                if is_granted and page.lane_load(lane, "grant_count") >= frames:
                    return True
            if page.load("slots_held") or time.monotonic() >= deadline:
                return False
            time.sleep(0.001)

    def restore_to_end(self, chunk_count: int) -> list[int]:
        """[step, rounds]: what a restore gives, bytes compared; bad chunks are reported and another round asked
        for. Step -1: the job has none.

        Raises:
            RuntimeError: not restorable, with the reason; or other bytes.
        """
        for number in range(ROUNDS_MAX):
            plan = self.plan(number)
            if plan.outcome == trainer_pb2.PlanRestoreReply.ABSENT:
                return [-1, number + 1]
            if plan.outcome != trainer_pb2.PlanRestoreReply.FOUND:
                raise RuntimeError(f"not restorable: {plan.reason}")
            record = plan.shards[0]
            found, bad = self.read(record)
            if not bad:
                self._compare(found, plan.step, record.chunk_bytes, chunk_count)
            reply = self.finish(number, succeeded=not bad, bad=bad)
            if reply.committed:
                return [plan.step, number + 1]
            if not reply.try_again:
                raise RuntimeError(f"another rank could not restore: {reply.reason}")
        raise RuntimeError("every round met bad chunks")

    def _compare(self, found: list[bytes], step: int, chunk_bytes: int, chunk_count: int) -> None:
        for index in range(2, chunk_count):
            number = 0 if index == chunk_count - 1 else step
            if found[index] != content(chunk_bytes, self.job, self.rank, number, 0, index):
                raise RuntimeError(f"chunk {index} of step {step} has other bytes")


def _answer(trainer: LightTrainer, command: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"ok": True, "result": getattr(trainer, command.pop("do"))(**command)}
    except Refused as error:
        return {"ok": False, "kind": error.kind, "message": error.message}
    except (RuntimeError, TimeoutError, OSError, ValueError) as error:
        return {"ok": False, "kind": type(error).__name__, "message": str(error)}


def main() -> None:
    fake_trainer.TIMEOUT_S = LANE_S
    trainer = LightTrainer(Path(sys.argv[1]))
    for line in sys.stdin:
        print(json.dumps(_answer(trainer, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
