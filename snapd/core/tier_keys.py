"""Names of a tier's objects, below the tier's own root. All but intents and pins are written once and never again.

    jobs/JOB/packs/WRITEID-NNNNNN.pack             chunks
    jobs/JOB/shards/G-S/RRRRR.rN.shard             shard manifests, revision N
    jobs/JOB/snapshots/G-S.rN.snapshot             commit records, revision N; the highest that is good counts
    jobs/JOB/intents/WRITEID.intent                who is writing, and on what it builds (put again as a sign of life)
    jobs/JOB/condemned/ROUND.condemned             what a collector is about to delete
    jobs/JOB/pins/NAME.pin                         snapshots that retention must keep

What else lies there is nobody's: it is neither read nor deleted.

On the own disk of a node there are packs, shard manifests, and two notes of the daemon:

    jobs/JOB/generation                            the newest generation that this node has seen, in decimal digits
    jobs/JOB/ended                                 the job was closed for good: it is not brought back unasked

G, the generation, and S, the step, are decimal and padded with zeros (10 and 15 digits): the order of keys is the
order of age.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from snapd.core.ids import JOB_NAME, SnapshotId

WRITE_ID = re.compile(r"[0-9a-f]{32}")
PACK_NAME = re.compile(r"[0-9a-f]{32}-[0-9]{6}")
PIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SNAPSHOT = re.compile(r"([0-9]{10})-([0-9]{15})\.r([0-9]{1,9})\.snapshot")
_SHARD = re.compile(r"([0-9]{10})-([0-9]{15})/([0-9]{5})\.r([0-9]{1,9})\.shard")
JOBS = "jobs/"


def snapshot_text(snapshot: SnapshotId) -> str:
    return f"{snapshot.generation:010d}-{snapshot.step:015d}"


@dataclass(frozen=True, slots=True)
class TierKeys:
    """The keys of one job. Names are checked where they enter; a key never leaves the tier's root."""

    job: str

    def __post_init__(self) -> None:
        assert JOB_NAME.fullmatch(self.job), self.job

    @property
    def root(self) -> str:
        return f"{JOBS}{self.job}/"

    @property
    def packs(self) -> str:
        return f"{self.root}packs/"

    @property
    def shards(self) -> str:
        return f"{self.root}shards/"

    @property
    def snapshots(self) -> str:
        return f"{self.root}snapshots/"

    @property
    def intents(self) -> str:
        return f"{self.root}intents/"

    @property
    def condemned(self) -> str:
        return f"{self.root}condemned/"

    @property
    def pins(self) -> str:
        return f"{self.root}pins/"

    @property
    def generation_note(self) -> str:
        return f"{self.root}generation"

    @property
    def ended_note(self) -> str:
        return f"{self.root}ended"

    def pack(self, name: str) -> str:
        return f"{self.packs}{name}.pack"

    def shards_of(self, snapshot: SnapshotId) -> str:
        return f"{self.shards}{snapshot_text(snapshot)}/"

    def shard(self, snapshot: SnapshotId, rank: int, revision: int = 0) -> str:
        return f"{self.shards_of(snapshot)}{rank:05d}.r{revision}.shard"

    def snapshot(self, snapshot: SnapshotId, revision: int = 0) -> str:
        return f"{self.snapshots}{snapshot_text(snapshot)}.r{revision}.snapshot"

    def intent(self, write_id: str) -> str:
        return f"{self.intents}{write_id}.intent"

    def condemned_round(self, number: int) -> str:
        return f"{self.condemned}{number:010d}.condemned"

    def pin(self, name: str) -> str:
        return f"{self.pins}{name}.pin"

    # back

    def pack_name(self, key: str) -> str | None:
        """The pack that a key names; None: it is not a pack's key."""
        name = key.removeprefix(self.packs).removesuffix(".pack")
        return name if key == self.pack(name) and PACK_NAME.fullmatch(name) else None

    def snapshot_of(self, key: str) -> tuple[SnapshotId, int] | None:
        """(snapshot, revision) of a commit record's key; None: it is not one."""
        match = _SNAPSHOT.fullmatch(key.removeprefix(self.snapshots))
        if match is None or not key.startswith(self.snapshots):
            return None
        return SnapshotId(int(match[1]), int(match[2])), int(match[3])

    def shard_of(self, key: str) -> tuple[SnapshotId, int, int] | None:
        """(snapshot, rank, revision) of a shard manifest's key; None: it is not one."""
        match = _SHARD.fullmatch(key.removeprefix(self.shards))
        if match is None or not key.startswith(self.shards):
            return None
        return SnapshotId(int(match[1]), int(match[2])), int(match[3]), int(match[4])

    def intent_of(self, key: str) -> str | None:
        """The write id of an intent's key; None: it is not one."""
        write_id = key.removeprefix(self.intents).removesuffix(".intent")
        return write_id if key == self.intent(write_id) and WRITE_ID.fullmatch(write_id) else None

    def round_of(self, key: str) -> int | None:
        """The number of a condemned list's key; None: it is not one."""
        digits = key.removeprefix(self.condemned).removesuffix(".condemned")
        is_number = digits.isascii() and digits.isdigit()
        return int(digits) if is_number and key == self.condemned_round(int(digits)) else None

    def pin_of(self, key: str) -> str | None:
        """The name of a pin's key; None: it is not one."""
        name = key.removeprefix(self.pins).removesuffix(".pin")
        return name if key == self.pin(name) and PIN_NAME.fullmatch(name) else None


def pack_name(write_id: str, number: int) -> str:
    return f"{write_id}-{number:06d}"


def job_of(key: str) -> str | None:
    """The job that a key below `jobs/` belongs to."""
    name, slash, _ = key.removeprefix(JOBS).partition("/")
    return name if key.startswith(JOBS) and slash and JOB_NAME.fullmatch(name) else None
