"""Errors of the client, grouped by what the catcher does.

`str(error)` is one line: message, `[kind]`, then `key=value` context, then the hint. Kinds are stable and
append-only; they are the same words as the daemon's (`snapd/errors.py`), which reach the client as text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class SnapdError(Exception):
    """Base of everything that snapd raises in a trainer."""

    kind = "error"

    def __init__(self, message: str, *, hint: str = "", **context: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.context = context

    def __str__(self) -> str:
        facts = "".join(f" {key}={value}" for key, value in self.context.items())
        hint = f"; {self.hint}" if self.hint else ""
        return f"{self.message} [{self.kind}]{facts}{hint}"


class ConfigError(SnapdError):
    """The call or the environment is wrong: fix it and start again."""

    kind = "config"


class CaptureError(SnapdError):
    """A value of the state cannot be captured; the message names its path and type."""

    kind = "capture"


class UnavailableError(SnapdError):
    """The daemon does not answer; nothing is known about the snapshots."""

    kind = "unavailable"


class CapacityError(SnapdError):
    """The arena cannot hold what was asked for; the message says how many bytes are missing."""

    kind = "capacity"


class FencedError(SnapdError):
    """A newer generation of this job has started; this process may not save any more."""

    kind = "fenced"


class ProtocolError(SnapdError):
    """The daemon said something that this client does not understand: other versions, or not a daemon."""

    kind = "protocol"


class IntegrityError(SnapdError):
    """Bytes are not what their hash says."""

    kind = "integrity"


class NotRestorable(SnapdError):
    """Snapshots were found, none can be used; `candidates` says why, newest first."""

    kind = "not_restorable"

    def __init__(
        self, message: str, *, candidates: Sequence[str] = (), hint: str = "", **context: object
    ) -> None:
        super().__init__(message, hint=hint, **context)
        self.candidates = list(candidates)

    def __str__(self) -> str:
        listed = "".join(f"\n  {candidate}" for candidate in self.candidates)
        return super().__str__() + listed


class RestoreMismatch(SnapdError):
    """The live state has other names or shapes than the snapshot; nothing was changed."""

    kind = "mismatch"

    def __init__(self, *, missing: Iterable[str], extra: Iterable[str], reshaped: Iterable[str]) -> None:
        self.missing, self.extra, self.reshaped = sorted(missing), sorted(extra), sorted(reshaped)
        super().__init__(
            "the snapshot does not fit the live state",
            hint="restore into the model and optimizer that were saved, or name what may differ in allow_partial",
            missing=len(self.missing),
            extra=len(self.extra),
            reshaped=len(self.reshaped),
        )

    def __str__(self) -> str:
        parts = [super().__str__()]
        for title, names in (
            ("in the snapshot, not in the live state", self.missing),
            ("in the live state, not in the snapshot", self.extra),
            ("of another shape or type", self.reshaped),
        ):
            if names:
                parts.append(f"  {title}: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}")
        return "\n".join(parts)


BY_STATUS: dict[str, type[SnapdError]] = {  # gRPC status -> class; the kind is the daemon's
    "INVALID_ARGUMENT": ConfigError,
    "ALREADY_EXISTS": ConfigError,
    "NOT_FOUND": ConfigError,
    "RESOURCE_EXHAUSTED": CapacityError,
    "ABORTED": FencedError,
    "UNAUTHENTICATED": FencedError,
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": UnavailableError,
    "DATA_LOSS": IntegrityError,
    "FAILED_PRECONDITION": NotRestorable,
}


def from_daemon(kind: str, message: str, hint: str = "", *, status: str = "") -> SnapdError:
    """The exception for an error that the daemon reported: its own kind and words, our class by gRPC status."""
    error = BY_STATUS.get(status, SnapdError)(message, hint=hint)
    error.kind = kind or error.kind
    return error
