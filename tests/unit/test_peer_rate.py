"""The token bucket against arithmetic; what a peer's failure costs its callers."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapd.errors import LocalProtocolError
from snapd.peer.deadline import Deadline
from snapd.peer.limits import PeerLimits
from snapd.peer.rate import Pacer, TokenBucket
from snapd.peer.traffic import Traffic, TrafficMeter


def test_the_burst_passes_at_once_and_the_rest_at_the_rate() -> None:
    bucket = TokenBucket(100, 50, now_s=0)
    assert bucket.take(50, 0) == 0
    assert bucket.take(10, 0) == pytest.approx(0.01)
    assert bucket.take(10, 0.1) == 0
    assert bucket.take(10, 0.1) == pytest.approx(0.01)


def test_what_is_larger_than_the_burst_passes_and_is_paid_for_afterwards() -> None:
    bucket = TokenBucket(100, 10, now_s=0)
    assert bucket.take(1000, 0) == 0
    assert bucket.take(1, 0) == pytest.approx(9.91)
    assert bucket.take(1, 9.85) > 0
    assert bucket.take(1, 9.92) == 0


def test_credit_does_not_grow_beyond_the_burst() -> None:
    bucket = TokenBucket(100, 10, now_s=0)
    assert bucket.take(10, 1_000_000) == 0
    assert bucket.take(10, 1_000_000) > 0


def test_a_new_rate_holds_from_now_on_and_debt_is_kept() -> None:
    bucket = TokenBucket(100, 10, now_s=0)
    assert bucket.take(1010, 0) == 0  # 1000 in debt
    bucket.set_rate(1000, 10, now_s=1)  # 900 left
    assert bucket.take(1, 1.8) > 0
    assert bucket.take(1, 1.95) == 0
    bucket.set_rate(None, 10, now_s=2)
    assert [bucket.take(10**9, 2) for _ in range(3)] == [0, 0, 0]
    bucket.set_rate(100, 10, now_s=1000)
    assert bucket.take(10, 1000) == 0


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(100, 10, now_s=5)
    assert bucket.take(10, 5) == 0
    assert bucket.take(1, 4) > 0
    assert bucket.take(1, 5) > 0


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (1, 0)])
def test_impossible_rates_are_refused(rate: float, burst: int) -> None:
    with pytest.raises(LocalProtocolError):
        TokenBucket(rate, burst, 0)
    with pytest.raises(LocalProtocolError):
        TokenBucket(1, 1, 0).set_rate(rate, burst, 0)


@given(
    st.floats(1, 1e9),
    st.integers(1, 10**8),
    st.lists(st.tuples(st.integers(0, 10**7), st.floats(0, 5)), min_size=1, max_size=60),
)
def test_no_sequence_of_requests_passes_more_than_the_bound(
    rate: float, burst: int, requests: list[tuple[int, float]]
) -> None:
    bucket, now_s, passed, largest = TokenBucket(rate, burst, 0), 0.0, 0, 0
    for nbytes, pause_s in requests:
        now_s += pause_s
        wait_s = bucket.take(nbytes, now_s)
        if wait_s == 0:
            passed, largest = passed + nbytes, max(largest, nbytes)
        else:
            later = now_s + wait_s * 1.001 + 1e-6
            now_s = later  # who waits as long as he is told is not sent away again
            assert bucket.take(nbytes, now_s) == 0
            passed, largest = passed + nbytes, max(largest, nbytes)
        assert passed <= (rate * now_s + burst + largest) * 1.001 + 1


def test_who_waits_for_tokens_gives_up_at_the_deadline() -> None:
    now = [0.0]
    pacer = Pacer(lambda: now[0], 1, burst_bytes=1)
    assert pacer.try_take(100)
    assert not pacer.try_take(1)
    now[0] = 1.0
    deadline = Deadline(lambda: now[0], 5)
    now[0] = 6.0
    with pytest.raises(TimeoutError):
        pacer.wait_take(1, deadline)


def test_a_new_rate_wakes_those_who_wait() -> None:
    pacer = Pacer(lambda: 0.0, 1e-3, burst_bytes=1)
    assert pacer.try_take(1000)
    waiting = threading.Thread(target=pacer.wait_take, args=[1, Deadline(lambda: 0.0, 1000)])
    waiting.start()
    pacer.set_rate(None)
    waiting.join(10)
    assert not waiting.is_alive()


def test_traffic_is_counted_by_node() -> None:
    meter = TrafficMeter()
    meter.add("b", 10, 1)
    meter.add("c", 5, 2)
    meter.add("b", 0, 7)
    assert meter.by_node() == {"b": Traffic(10, 8), "c": Traffic(5, 2)}
    assert meter.total() == Traffic(15, 10)


def test_a_frame_has_time_for_its_body() -> None:
    limits = PeerLimits(stall_s=10, bytes_per_s_min=1e6)
    assert limits.frame_s(0) == 10
    assert limits.frame_s(5_000_000) == 15
