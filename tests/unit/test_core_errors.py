"""Every error has a status, a kind of its own, and comes back over gRPC as what it was; fault points strike once."""

from __future__ import annotations

import signal

import grpc
import pytest
from snapd_proto import trainer_pb2

from snapd.errors import SnapdError, all_error_classes
from snapd.rpc.status import CODES, ERROR_KEY, code_of, error_of, refusal_of
from snapd.runtime import faultpoints


class FakeRpcError(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, metadata: tuple = (), details: str = "") -> None:
        super().__init__()
        self._facts = code, metadata, details

    def code(self) -> grpc.StatusCode:
        return self._facts[0]

    def trailing_metadata(self) -> tuple:
        return self._facts[1]

    def details(self) -> str:
        return self._facts[2]


@pytest.mark.parametrize("cls", all_error_classes())
def test_every_error_has_a_status_and_a_kind(cls: type[SnapdError]) -> None:
    error = cls("what happened", hint="what to do", step=3)
    assert code_of(error) is CODES[cls]
    refusal = refusal_of(error)
    assert (refusal.kind, refusal.message, refusal.hint) == (
        cls.default_kind,
        "what happened step=3",
        "what to do",
    )
    sent = FakeRpcError(code_of(error), ((ERROR_KEY, refusal.SerializeToString()),))
    back = error_of(sent)
    assert (back.kind, back.hint) == (error.kind, error.hint)
    assert CODES[type(back)] is CODES[cls]


def test_kinds_are_not_used_twice() -> None:
    kinds = [cls.default_kind for cls in all_error_classes()]
    assert len(set(kinds)) == len(kinds)


def test_what_is_not_ours_is_an_error_all_the_same() -> None:
    assert error_of(FakeRpcError(grpc.StatusCode.UNAVAILABLE, (), "no such socket")).kind == "unavailable"
    damaged = FakeRpcError(grpc.StatusCode.NOT_FOUND, ((ERROR_KEY, b"\xff\xff"),), "gone")
    assert (error_of(damaged).kind, error_of(damaged).message) == ("not_found", "gone")
    assert trainer_pb2.Refusal().kind == ""


def test_a_fault_point_strikes_at_its_count_and_once() -> None:
    struck: list[int] = []

    def strike(pid: int, signum: int) -> None:
        assert pid > 0
        struck.append(signum)

    faultpoints.arm("daemon.record.before:3=kill, daemon.grant.after=stop")
    for _ in range(5):
        faultpoints.point("daemon.record.before", strike)
    assert struck == [signal.SIGKILL]
    faultpoints.point("daemon.grant.before", strike)
    faultpoints.point("daemon.grant.after", strike)
    assert struck == [signal.SIGKILL, signal.SIGSTOP]
    faultpoints.arm("")
    faultpoints.point("daemon.record.before", strike)
    assert len(struck) == 2


@pytest.mark.parametrize(
    "spec",
    ["nonsense=kill", "daemon.record.before", "daemon.record.before=explode", "daemon.record.before:x=kill"],
)
def test_bad_fault_points_are_refused(spec: str) -> None:
    with pytest.raises(SnapdError) as error:
        faultpoints.arm(spec)
    assert error.value.kind == "fault_points"
    faultpoints.arm("")
