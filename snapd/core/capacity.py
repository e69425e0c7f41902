"""Does it fit? The answer names the bytes needed and available, who holds the rest, and what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from snapd.errors import CapacityError
from snapd.units import format_size


@dataclass(frozen=True, slots=True)
class Limit:
    """One bound on the arena: what is left under it, and how to raise it."""

    name: str
    available_bytes: int
    remedy: str


def check_fits(
    needed_bytes: int, limits: Sequence[Limit], held_by_job: Mapping[str, int], *, job: str, rank: int
) -> None:
    """Return when `needed_bytes` more can be backed under every limit.

    Raises:
        CapacityError: kind `arena_full`; the tightest limit is named.
    """
    tightest = min(limits, key=lambda limit: limit.available_bytes, default=None)
    if tightest is None or needed_bytes <= tightest.available_bytes:
        return
    raise refusal(needed_bytes, tightest, held_by_job, job=job, rank=rank)


def refusal(
    needed_bytes: int, limit: Limit, held_by_job: Mapping[str, int], *, job: str, rank: int
) -> CapacityError:
    """Return the error that says everything about a request which does not fit under `limit`."""
    holders = sorted(held_by_job.items(), key=lambda item: (-item[1], item[0]))
    held = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in holders[:8] if nbytes) or "no job"
    return CapacityError(
        f"the arena needs {needed_bytes} bytes more ({format_size(needed_bytes)}),"
        f" {max(0, limit.available_bytes)} are available ({limit.name}); held by: {held}",
        kind="arena_full",
        hint=f"{limit.remedy}; or release a job that is done with `snapd rm JOB`",
        job=job,
        rank=rank,
        needed_bytes=needed_bytes,
        available_bytes=max(0, limit.available_bytes),
    )
