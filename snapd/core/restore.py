"""Which snapshot a world restores, and how its ranks agree that it worked.

`choose` is called again with what was learnt (a verification's result) until its outcome is not VERIFY.
Absent, unusable (proved bad) and another world size are different answers; an older step is taken only when
each newer one is proved bad.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from snapd.core.ids import SnapshotId
from snapd.core.ledger import SnapshotFacts
from snapd.errors import ConflictError


class Outcome(enum.Enum):
    VERIFY = "verify"  # `chosen` must be hashed before it can be offered
    FOUND = "found"
    ABSENT = "absent"
    UNUSABLE = "unusable"
    WORLD_SIZE_DIFFERS = "world_size_differs"
    UNREACHABLE = "unreachable"  # a node that does not answer may hold a newer one


@dataclass(frozen=True, slots=True)
class Verdict:
    id: SnapshotId
    verdict: str  # "chosen" | "incomplete" | "unusable" | "older" | "other step"
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """`left_in_tier`: the number of ranks that saved what was chosen, if it stays in the tier, and each rank reads
    there what it needs; 0: it is here.
    """

    outcome: Outcome
    chosen: SnapshotId | None
    verdicts: tuple[Verdict, ...]
    reason: str
    left_in_tier: int = 0


def choose(snapshots: Sequence[SnapshotFacts], *, world_size: int, step: int | None) -> Decision:
    """Choose among `snapshots` (newest first) for a world of `world_size`.

    `step`: only this step, of the newest generation that has it complete.
    """
    verdicts: list[Verdict] = []
    chosen: SnapshotFacts | None = None
    for facts in snapshots:
        verdict = _judge(facts, step, chosen)
        verdicts.append(verdict)
        if verdict.verdict == "chosen":
            chosen = facts
    if chosen is None:
        return _none(verdicts, step)
    if chosen.world_size != world_size:
        reason = f"{chosen.id} was captured by {chosen.world_size} ranks, this world has {world_size}"
        return Decision(Outcome.WORLD_SIZE_DIFFERS, chosen.id, tuple(verdicts), reason)
    if not chosen.is_verified:
        return Decision(Outcome.VERIFY, chosen.id, tuple(verdicts), "its chunks must be hashed first")
    reason = (
        "the newest complete snapshot" if step is None else f"the newest complete snapshot of step {step}"
    )
    if any(verdict.verdict == "unusable" for verdict in verdicts):
        reason += "; newer ones are unusable"
    return Decision(Outcome.FOUND, chosen.id, tuple(verdicts), reason)


def _judge(facts: SnapshotFacts, step: int | None, chosen: SnapshotFacts | None) -> Verdict:
    if step is not None and facts.id.step != step:
        return Verdict(facts.id, "other step", f"step {step} was asked for")
    if facts.problem:
        return Verdict(facts.id, "unusable", facts.problem)
    if not facts.is_complete:
        missing = facts.missing_ranks
        shown = ", ".join(str(rank) for rank in missing[:8]) + (", ..." if len(missing) > 8 else "")
        return Verdict(facts.id, "incomplete", f"not captured by ranks {shown}")
    if chosen is not None:
        return Verdict(facts.id, "older", f"{chosen.id} is newer")
    return Verdict(facts.id, "chosen", "complete on all ranks")


def _none(verdicts: list[Verdict], step: int | None) -> Decision:
    bad = [verdict for verdict in verdicts if verdict.verdict == "unusable"]
    if bad:
        listed = "; ".join(f"{verdict.id}: {verdict.reason}" for verdict in bad)
        return Decision(
            Outcome.UNUSABLE, None, tuple(verdicts), f"every complete snapshot is unusable: {listed}"
        )
    if step is not None and verdicts:
        held = ", ".join(str(verdict.id) for verdict in verdicts[:8])
        return Decision(
            Outcome.ABSENT, None, tuple(verdicts), f"no complete snapshot of step {step}; there is {held}"
        )
    reason = "no snapshot is complete on all ranks" if verdicts else "the job has no snapshot"
    return Decision(Outcome.ABSENT, None, tuple(verdicts), reason)


@dataclass(frozen=True, slots=True)
class RankReport:
    """How one rank's restore went. `bad_chunks`: (rank whose shard it is, chunk index, what is wrong). `is_mended`: it
    met bad chunks, and its node has brought them anew since.
    """

    has_succeeded: bool
    bad_chunks: tuple[tuple[int, int, str], ...] = ()
    failure: str = ""
    is_mended: bool = False


@dataclass(frozen=True, slots=True)
class Repair:
    """What came of bringing back a shard that has bad chunks. `is_proved`: not whole, and no node that may still come
    can change that. `source`: where the chunks came from, in words.
    """

    is_whole: bool
    is_proved: bool = False
    why: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """The barrier's answer, the same for all ranks."""

    is_committed: bool
    is_try_again: bool
    reason: str
    problem: str = ""  # why the snapshot is unusable from now on; empty if it is not


@dataclass(slots=True)
class RestoreRound:
    """One attempt of one generation: what was decided, and who has reported."""

    generation: int
    number: int
    world_size: int
    step: int | None
    decision: Decision
    reports: dict[int, RankReport] = field(default_factory=dict)
    answer: Verdicts | None = None
    is_concluded: bool = False  # the answer has been acted upon, and may be told
    is_holding: bool = False  # the chosen snapshot, in the ledger

    def check_same(self, step: int | None) -> None:
        """Raise ConflictError (kind `restore_step`) if another rank of this round asked for another step."""
        if step != self.step:
            raise ConflictError(
                "ranks ask for different steps", kind="restore_step", this=step, other=self.step
            )

    def report(self, rank: int, report: RankReport) -> None:
        """Take one rank's report; the first one counts."""
        self.reports.setdefault(rank, report)

    def settle(self, *, lost_ranks: Collection[int] = (), is_late: bool = False) -> Verdicts | None:
        """Return the answer once there is one; None while reports are missing.

        `lost_ranks`: their trainers are gone. `is_late`: the deadline has passed.
        """
        if self.answer is None:
            self.answer = self._settled(lost_ranks, is_late)
        return self.answer

    def _settled(self, lost_ranks: Collection[int], is_late: bool) -> Verdicts | None:
        bad = {rank: report for rank, report in sorted(self.reports.items()) if report.bad_chunks}
        missing = [rank for rank in range(self.world_size) if rank not in self.reports]
        gone = [rank for rank in missing if rank in lost_ranks]
        if missing and not gone and not is_late:
            return None
        if bad:
            return Verdicts(False, not missing, "a chunk is bad: the snapshot is unusable", describe_bad(bad))
        failed = {
            rank: report.failure
            for rank, report in sorted(self.reports.items())
            if not report.has_succeeded and not report.is_mended
        }
        if failed:
            listed = "; ".join(f"rank {rank}: {failure or 'failed'}" for rank, failure in failed.items())
            return Verdicts(False, False, f"not restored: {listed}")
        if gone:
            return Verdicts(False, False, f"not restored: the trainer of rank {gone[0]} is gone")
        if missing:
            return Verdicts(False, False, f"not restored in time: rank {missing[0]} has not reported")
        mended = [rank for rank, report in sorted(self.reports.items()) if report.is_mended]
        if mended:
            return Verdicts(False, True, f"rank {mended[0]} met bad chunks, which were brought anew")
        return Verdicts(True, False, "restored on all ranks")


def describe_bad(bad: Mapping[int, RankReport]) -> str:
    """One line that names the first bad chunks, and who found them."""
    found = [
        f"rank {owner} chunk {index}: {what} (found by rank {finder})"
        for finder, report in bad.items()
        for owner, index, what in report.bad_chunks
    ]
    return "; ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
