"""Rank, world and job name from the environment; fault points; error texts."""

from __future__ import annotations

import pytest
from snapd_client.errors import (
    CapacityError,
    ConfigError,
    NotRestorable,
    RestoreMismatch,
    SnapdError,
    from_daemon,
)
from snapd_client.faults import parse
from snapd_client.world import World, job_name


def test_without_torchrun_the_world_is_one_process() -> None:
    world = World.from_environment({})
    assert (world.rank, world.world_size, world.local_world_size) == (0, 1, 1)


def test_names_as_torchrun_sets_them() -> None:
    variables = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "1",
    }
    world = World.from_environment(variables)
    assert (world.rank, world.local_rank, world.node_rank) == (3, 1, 1)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "x"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "-1"},
    ],
)
def test_contradictions_are_refused(variables: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        World.from_environment(variables)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "-x", "a" * 129, "a b", "a\n", "ä"])
def test_job_names_that_could_leave_their_folder_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        job_name(name, {})


def test_the_job_name_comes_from_the_argument_then_from_the_environment() -> None:
    assert job_name("a", {"SNAPD_JOB": "b"}) == "a"
    assert job_name(None, {"SNAPD_JOB": "b"}) == "b"


def test_fault_points_are_parsed_and_nonsense_is_named() -> None:
    assert {name: count for name, (count, _) in parse("a=kill,b:3=stop").items()} == {"a": 1, "b": 3}
    with pytest.raises(ValueError, match="b=explode"):
        parse("a=kill,b=explode")


def test_error_texts_are_one_line_with_kind_and_context() -> None:
    error = ConfigError("interval counts steps", interval=0, hint="1 or more")
    assert str(error) == "interval counts steps [config] interval=0; 1 or more"


def test_a_mismatch_shows_its_three_lists() -> None:
    text = str(RestoreMismatch(missing=["a"], extra=["b"], reshaped=["c: (1,) -> (2,)"]))
    assert "in the snapshot, not in the live state: a" in text
    assert "in the live state, not in the snapshot: b" in text
    assert "of another shape or type: c: (1,) -> (2,)" in text


def test_candidates_are_listed_with_their_reasons() -> None:
    error = NotRestorable("none can be used", candidates=["generation 1 step 5: bad"])
    assert str(error).splitlines()[1] == "  generation 1 step 5: bad"


def test_the_daemons_errors_keep_their_kind_and_words() -> None:
    error = from_daemon("arena_full", "too small", "make it larger", status="RESOURCE_EXHAUSTED")
    assert isinstance(error, CapacityError)
    assert str(error) == "too small [arena_full]; make it larger"
    assert CapacityError.kind == "capacity"
    assert type(from_daemon("something-new", "x")) is SnapdError
