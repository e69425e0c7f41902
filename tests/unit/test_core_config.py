"""Settings: default < file < environment < flag; every problem is named; every field is explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapd.config import Config, env_name, explain, fields_of, load, node_settings, paths, unknown_variables
from snapd.errors import ConfigError


def test_the_later_source_wins(tmp_path: Path) -> None:
    file = tmp_path / "snapd.toml"
    file.write_text(
        '[arena]\nslots = 3\nheadroom = "1GiB"\nchunk_bytes = "1MiB"\n[capture]\npoll_interval = 0.25\n'
    )
    environ = {"SNAPD_ARENA_SLOTS": "4", "SNAPD_ARENA_HEADROOM": "2GiB", "SNAPD_JOB": "not a setting"}
    loaded = load(file=file, environ=environ, flags={"arena.slots": 5, "arena.bytes": None})
    arena = loaded.config.arena
    assert (arena.slots, arena.headroom, arena.chunk_bytes, arena.bytes) == (5, 2 << 30, 1 << 20, 0)
    assert loaded.config.capture.poll_interval == 0.25
    sources = [loaded.sources[f"arena.{name}"] for name in ("slots", "headroom", "chunk_bytes", "bytes")]
    assert sources == ["flag", "SNAPD_ARENA_HEADROOM", str(file), "default"]
    assert node_settings(loaded.config).slots == 5


def test_every_problem_is_named_with_its_source(tmp_path: Path) -> None:
    file = tmp_path / "snapd.toml"
    file.write_text('top = 1\n[arena]\nslots = 1\nnonsense = 2\n[log]\nlevel = "loud"\n')
    with pytest.raises(ConfigError) as error:
        load(
            file=file,
            environ={"SNAPD_ARENA_CHUNK_BYTES": "3MiB", "SNAPD_METRICS_PORT": "99999"},
            flags={"x.y": 1},
        )
    for text in (
        f"arena.slots = 1 (from {file})", "arena.nonsense: no such setting", "top: must be a section",
        "log.level = 'loud'", "must be a power of two", "metrics.port = '99999' (from SNAPD_METRICS_PORT)",
        "x.y: no such",
    ):  # fmt: skip
        assert text in error.value.message


@pytest.mark.parametrize("content", ["[arena\n", b"\xff\xfe"])
def test_a_file_that_is_not_toml(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "snapd.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"snapd\.toml"):
        load(file=file, environ={})
    with pytest.raises(ConfigError, match="No such file"):
        load(file=tmp_path / "missing.toml", environ={})


@pytest.mark.parametrize(("path", "value"), [("arena.slots", True), ("arena.slots", "many"), ("log.file", 3)])
def test_values_of_the_wrong_type(path: str, value: object) -> None:
    with pytest.raises(ConfigError, match=path):
        load(environ={}, flags={path: value})


def test_every_setting_says_what_it_trades() -> None:
    rows = explain(load(environ={}))
    assert [row.path for row in rows] == [path for path, _, _ in fields_of(Config())]
    for row in rows:
        assert len(row.doc) > 20, row.path
        assert row.source == "default" and row.value == row.default
        assert row.bound or row.unit == "", row.path
    assert env_name("arena.dir") == "SNAPD_ARENA_DIR"


def test_folders_follow_the_architecture() -> None:
    config = load(environ={}).config
    where = paths(config, environ={"XDG_RUNTIME_DIR": "/run/user/7"}, uid=7)
    assert (str(where.runtime), str(where.arena)) == ("/run/user/7/snapd-train", "/dev/shm/snapd-train-7")
    assert str(where.grpc_socket) == "/run/user/7/snapd-train/snapd.sock"
    assert str(paths(config, environ={}, uid=7).runtime) == "/tmp/snapd-train-7"
    named = load(environ={"SNAPD_RUNTIME_DIR": "/x/run", "SNAPD_ARENA_DIR": "/x/arena"}).config
    where = paths(named, environ={}, uid=7)
    assert (str(where.runtime), str(where.arena)) == ("/x/run", "/x/arena")


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("tier.shard", "/x", "tier.shard: no such setting (from flags); did you mean tier.shared?"),
        ("cluser.node", "a", "cluser.node: no such setting (from flags); did you mean cluster.node?"),
        ("nothing.like_it", "a", "nothing.like_it: no such setting (from flags)"),
        ("arena.slots", "many", "arena.slots = 'many' (from flag): must be a whole number"),
        ("arena.bytes", "64gigs", "not a size: '64gigs' (write for example 512MiB"),
        ("tier.every", "10mins", "not a duration: '10mins' (write for example 250ms, 30s"),
        ("cluster.bulk", "tsl", "must be one of tls, plain, grpc; did you mean tls?"),
        ("cluster.plaintext", "maybe", "must be yes or no"),
    ],
)
def test_a_mistake_says_what_is_meant(path: str, value: str, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(environ={}, flags={path: value})
    assert text in str(error.value) and "\n" not in str(error.value)


def test_days_are_a_duration() -> None:
    assert load(environ={"SNAPD_TIER_EVERY": "1d"}).config.tier.every == 86400


def test_variables_that_are_no_settings_are_told_with_the_one_that_is_meant() -> None:
    environ = {
        "SNAPD_TIER_SHARD": "/x",  # misspelt
        "SNAPD_AUTOSTRAT": "0",
        "SNAPD_ARENA_QQQ": "1",  # of a section, and like none
        "SNAPD_TIER_SHARED": "/x",
        "SNAPD_JOB": "x",
        "SNAPD_REQUIRE_ETCD": "1",  # somebody else's
        "SNAPD_CLUSTER_SERVICE_HOST": "10.0.0.1",  # Kubernetes sets these for a service `snapd-cluster`
        "SNAPD_CLUSTER_PORT_7421_TCP_ADDR": "10.0.0.1",
        "PATH": "/bin",
    }
    assert unknown_variables(environ) == [
        "SNAPD_ARENA_QQQ: no such setting",
        "SNAPD_AUTOSTRAT: no such setting; did you mean SNAPD_AUTOSTART?",
        "SNAPD_TIER_SHARD: no such setting; did you mean SNAPD_TIER_SHARED?",
    ]
