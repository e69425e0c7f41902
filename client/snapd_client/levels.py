"""Asking the daemon how far a snapshot has come."""

from __future__ import annotations

import time

from snapd_proto import trainer_pb2 as pb

from .errors import ConfigError, SnapdError, UnavailableError
from .session import Session

LEVELS = {"captured": pb.LEVEL_CAPTURED, "protected": pb.LEVEL_PROTECTED, "durable": pb.LEVEL_DURABLE}
_LEVEL_NAMES = {number: name for name, number in LEVELS.items()}
_HEALTH_TIMEOUT_S = 1.0
_CALL_SPARE_S = 10.0  # for the call itself, beside the wait


def check_level(level: str) -> None:
    """
    Raises:
        ConfigError: no such level.
    """
    if level not in LEVELS:
        raise ConfigError("no such level", level=level, hint=f"one of {', '.join(LEVELS)}")


def wait_level(session: Session, step: int, level: str, timeout_s: float) -> str:
    """Wait until the snapshot of `step` has `level` on all ranks; returns the level that it has.

    Raises:
        UnavailableError: the time ran out, the snapshot was dropped, or the tier refuses it in a way that waiting does
            not mend; the message says which.
    """
    began_s = time.monotonic()
    request = pb.WaitLevelRequest(
        session_id=session.session_id, step=step, level=LEVELS[level], timeout_s=timeout_s
    )
    reply = session.call(
        lambda stub, **options: stub.WaitLevel(request, **options), timeout_s=timeout_s + _CALL_SPARE_S
    )
    if not reply.reached:
        raise UnavailableError(
            f"step {step} is not {level}",
            reason=reply.reason,
            waited_s=round(time.monotonic() - began_s, 1),
            dropped=reply.dropped,
            refused=reply.refused,
        )
    return _LEVEL_NAMES.get(reply.level, level)


def ask_last(session: Session, level: str) -> pb.LastReply:
    """What the daemon says of the newest snapshot with `level` on all ranks."""
    request = pb.LastRequest(session_id=session.session_id, level=LEVELS[level])
    reply: pb.LastReply = session.call(lambda stub, **options: stub.Last(request, **options))
    return reply


def durable_step(session: Session) -> tuple[int | None, str]:
    """The newest step that is durable, or has the farthest level that is configured, and in which tier: `shared`,
    `node`, or empty: in memory. None also while the daemon does not say.
    """
    if not session.is_connected:
        return None, ""
    request = pb.LastRequest(session_id=session.session_id, level=pb.LEVEL_DURABLE)
    try:
        reply: pb.LastReply = session.call(
            lambda stub, **options: stub.Last(request, **options), timeout_s=_HEALTH_TIMEOUT_S
        )
    except SnapdError:
        return None, ""
    return (reply.step if reply.found else None), reply.tier
