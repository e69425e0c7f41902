"""Errors over gRPC: each class has one status code; kind, message and hint travel in `snapd-error-bin`."""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from google.protobuf.message import DecodeError
from snapd_proto import trainer_pb2

from snapd import errors

ERROR_KEY = "snapd-error-bin"

CODES: Mapping[type[errors.SnapdError], grpc.StatusCode] = {
    errors.SnapdError: grpc.StatusCode.UNKNOWN,
    errors.ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.CapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.FencedError: grpc.StatusCode.ABORTED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.IntegrityError: grpc.StatusCode.DATA_LOSS,
    errors.JobUnusable: grpc.StatusCode.DATA_LOSS,
    errors.NotRestorable: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.LocalProtocolError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.RemoteProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.AuthError: grpc.StatusCode.UNAUTHENTICATED,
    errors.ConflictError: grpc.StatusCode.ALREADY_EXISTS,
    errors.InternalError: grpc.StatusCode.INTERNAL,
    errors.IllegalTransition: grpc.StatusCode.INTERNAL,
    errors.InvariantViolated: grpc.StatusCode.INTERNAL,
}


def code_of(error: errors.SnapdError) -> grpc.StatusCode:
    """The status code of an error's class."""
    return CODES[type(error)]


def refusal_of(error: errors.SnapdError) -> trainer_pb2.Refusal:
    """What a client is told: the kind, one line with ids, and what to do."""
    pairs = "".join(f" {key}={value}" for key, value in error.context.items())
    return trainer_pb2.Refusal(kind=error.kind, message=error.message + pairs, hint=error.hint)


def error_of(error: grpc.RpcError) -> errors.SnapdError:
    """On the client's side: the error that the daemon raised, or UnavailableError when there is no daemon."""
    metadata = getattr(error, "trailing_metadata", lambda: None)() or ()
    details = str(getattr(error, "details", lambda: "")() or "")
    code = getattr(error, "code", lambda: grpc.StatusCode.UNKNOWN)()
    for key, value in metadata:
        if key == ERROR_KEY and isinstance(value, bytes):
            try:
                refusal = trainer_pb2.Refusal.FromString(value)
            except DecodeError:
                break
            return _class_of(code)(refusal.message, kind=refusal.kind, hint=refusal.hint)
    return _class_of(code)(details or str(code))


def _class_of(code: grpc.StatusCode) -> type[errors.SnapdError]:
    return next((cls for cls, known in CODES.items() if known is code), errors.SnapdError)
