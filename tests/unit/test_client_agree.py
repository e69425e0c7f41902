"""Agreement on one incarnation over a real torch store, stale answers of earlier starts included."""

from __future__ import annotations

import json
import threading

import pytest
from snapd_client.agree import agree_incarnation
from snapd_client.errors import ConfigError, UnavailableError
from torch.distributed import HashStore


def run_world(store: HashStore, world_size: int, turn: int = 0, timeout_s: float = 10.0) -> list[str]:
    answers: dict[int, str] = {}

    def rank_main(rank: int) -> None:
        answers[rank] = agree_incarnation(
            store, job="job", rank=rank, world_size=world_size, turn=turn, timeout_s=timeout_s
        )

    threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[rank] for rank in range(world_size)]


def test_all_ranks_get_one_incarnation() -> None:
    assert len(set(run_world(HashStore(), 3))) == 1


def test_a_world_of_one_needs_no_store() -> None:
    first = agree_incarnation(None, job="job", rank=0, world_size=1, turn=0)
    assert first != agree_incarnation(None, job="job", rank=0, world_size=1, turn=0)


def test_answers_and_nonces_of_an_earlier_start_are_not_taken() -> None:
    """The store outlives the world (a rendezvous server that stays): everything the first start wrote is there."""
    store = HashStore()
    first = run_world(store, 2)
    second = run_world(store, 2)
    assert len(set(second)) == 1
    assert second[0] not in first
    assert json.loads(store.get("snapd/job/0/answer"))["incarnation"] == second[0]


def test_several_ranks_without_a_process_group_are_refused() -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        agree_incarnation(None, job="job", rank=0, world_size=2, turn=0)


def test_a_rank_that_never_comes_is_an_error_not_a_hang() -> None:
    with pytest.raises(UnavailableError, match="did not come"):
        agree_incarnation(HashStore(), job="job", rank=0, world_size=2, turn=0, timeout_s=0.3)
