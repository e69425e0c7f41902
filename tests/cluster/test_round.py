"""The promise in short: 2 rounds of 2 + 1 on 3 nodes with a real FSDP2 job, then one node too many."""

from __future__ import annotations

import pytest

from tests.cluster.harness import etcd
from tests.cluster.harness.cluster import cluster
from tests.cluster.harness.observer import Observer, runtimes_of
from tests.cluster.harness.rounds import Rounds, make_recipes

STEPS = 120


@pytest.mark.timeout(300)
def test_a_job_survives_the_loss_of_a_node_bit_for_bit_and_not_of_two() -> None:
    recipes = make_recipes(3, STEPS, 2, is_uneven=True, is_double=False)
    with cluster(3, "2+1", is_etcd=etcd.is_installed()) as made, Observer(runtimes_of(made)) as observer:
        made.start()
        made.wait_settled()
        rounds = Rounds(made, observer, recipes, m=1, seed=2)
        rounds.prepare()
        for _ in range(2):
            outcome = rounds.play()
            (protected, restored) = outcome.steps[rounds.jobs[0].name]
            assert 0 < protected <= restored
        rounds.lose_too_many()
        assert observer.report_count > 0
