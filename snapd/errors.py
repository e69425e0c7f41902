"""Every error of snapd, grouped by what the one who catches it does.

`kind` is a stable code: it goes over the wire, into logs and into exit codes, so codes are append-only.
`str(error)` is one line: message, `[kind]`, then `key=value` context with ids. Inside the daemon errors are
raised and logged once, where they are handled; `rpc/status.py` maps each class to a gRPC status and back.
"""

from __future__ import annotations

import enum
from typing import ClassVar

Context = str | int | float | bool | None


class Retry(enum.Enum):
    """What the caller may do with the same request."""

    NEVER = "never"
    BACKOFF = "backoff"
    NEW_GENERATION = "new_generation"


class SnapdError(Exception):
    """Base of all. `hint` says in one line what to do; `context` holds ids and numbers."""

    default_kind: ClassVar[str] = "error"
    retry: ClassVar[Retry] = Retry.NEVER

    def __init__(self, message: str, *, kind: str | None = None, hint: str = "", **context: Context) -> None:
        super().__init__(message)
        self.message = message
        self.kind = kind or self.default_kind
        self.hint = hint
        self.context: dict[str, Context] = dict(context)

    def __str__(self) -> str:
        pairs = "".join(f" {key}={value}" for key, value in self.context.items())
        return f"{self.message} [{self.kind}]{pairs}"


class ConfigError(SnapdError):
    """The user must change a setting, a name or an argument."""

    default_kind = "config"


class CapacityError(SnapdError):
    """No room: in the arena, in a table, in a queue."""

    default_kind = "capacity"
    retry = Retry.BACKOFF


class FencedError(SnapdError):
    """The caller belongs to an older generation: stop, rejoin."""

    default_kind = "fenced"
    retry = Retry.NEW_GENERATION


class UnavailableError(SnapdError):
    """Not now: it is being started, waited for, or away."""

    default_kind = "unavailable"
    retry = Retry.BACKOFF


class DeadlineExceeded(UnavailableError):
    """Waited as long as allowed."""

    default_kind = "deadline"


class NotFoundError(SnapdError):
    """The job, snapshot or session is not here."""

    default_kind = "not_found"


class IntegrityError(SnapdError):
    """Bytes are not what was recorded. Never retried on the same copy."""

    default_kind = "integrity"


class JobUnusable(IntegrityError):
    """A job's index, segments or pages are broken; its files are kept untouched."""

    default_kind = "job_unusable"


class NotRestorable(SnapdError):
    """Found but unusable; the message lists, for each candidate, why."""

    default_kind = "not_restorable"


class ProtocolError(SnapdError):
    """One side does not keep to the contract."""

    default_kind = "protocol"


class LocalProtocolError(ProtocolError):
    """We called something out of order."""

    default_kind = "local_protocol"


class RemoteProtocolError(ProtocolError):
    """The peer sent something malformed or out of order."""

    default_kind = "remote_protocol"


class AuthError(SnapdError):
    """Another user, or no valid token."""

    default_kind = "auth"


class ConflictError(SnapdError):
    """What was asked for contradicts what is there: a rank twice, another world size, a job still in use."""

    default_kind = "conflict"


class InternalError(SnapdError):
    """A bug of ours: the daemon stops, the arena stays."""

    default_kind = "internal"


class IllegalTransition(InternalError):
    """A state machine was asked for a transition that is not in its table."""

    default_kind = "illegal_transition"


class InvariantViolated(InternalError):
    """A check on our own data failed."""

    default_kind = "invariant"


def all_error_classes() -> list[type[SnapdError]]:
    """Return every class of the tree, the base first; a test walks it so that no kind is forgotten."""
    found: list[type[SnapdError]] = [SnapdError]
    for cls in found:
        found.extend(sub for sub in cls.__subclasses__() if sub not in found)
    return found
