"""`snapd certs`: files that daemons accept, keys for their owner alone, nothing overwritten by accident."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from snapd.cli.main import app
from snapd.peer.trust import TrustFiles, load
from tests.support.peer_scene import Authority


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["certs", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert run("ca", "--dir", tmp_path).exit_code == 0
    return tmp_path


def files_of(folder: Path, node: str) -> TrustFiles:
    return TrustFiles(folder / f"{node}.crt", folder / f"{node}.key", folder / "ca.crt")


def test_a_daemon_accepts_what_it_makes(folder: Path) -> None:
    made = run("node", "node-1.rack", "--dir", folder, "--name", "10.0.0.1", "--name", "other")
    assert made.exit_code == 0
    assert made.stdout.split() == [str(folder / "node-1.rack.crt"), str(folder / "node-1.rack.key")]
    assert load("node-1.rack", files_of(folder, "node-1.rack")).names == ("node-1.rack", "other")
    for path in folder.glob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(path.name for path in folder.iterdir()) == [
        "ca.crt", "ca.key", "node-1.rack.crt", "node-1.rack.key",
    ]  # fmt: skip


def test_nothing_is_overwritten_without_force(folder: Path) -> None:
    assert run("node", "a", "--dir", folder).exit_code == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "a.crt").unlink()
    refused = run("node", "a", "--dir", folder)
    assert refused.exit_code == 2
    assert f"{folder / 'a.key'} is there already [exists]" in refused.stderr
    assert run("ca", "--dir", folder).exit_code == 2
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        name: content for name, content in before.items() if name != "a.crt"
    }
    assert run("node", "a", "--dir", folder, "--force").exit_code == 0
    assert (folder / "a.key").read_bytes() != before["a.key"]
    assert load("a", files_of(folder, "a")).names == ("a",)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["node", "ca", "--dir", "."], "ca is the authority's name here [node_name]"),
        (["node", "../x", "--dir", "."], "bad node name '../x' [node_name]"),
        (["node", "a", "--dir", "nowhere"], "nowhere/ca.crt cannot be read: No such file or directory"),
        (["node", "a", "--dir", ".", "--days", "0"], "--days"),
        (["show", "nowhere.crt"], "nowhere.crt cannot be read"),
        (["show", "ca.key"], "ca.key holds no certificate in PEM [certificate_files]"),
    ],
)
def test_bad_input_is_one_line(
    folder: Path, arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert line in refused.stderr


def test_a_broken_authority_is_named(folder: Path) -> None:
    (folder / "ca.key").write_text("hello")
    refused = run("node", "a", "--dir", folder)
    assert refused.exit_code == 2
    assert "cannot sign with" in refused.stderr and "certificate_files" in refused.stderr
    assert not (folder / "a.key").exists()


def test_certificates_are_shown(folder: Path) -> None:
    assert run("node", "a", "--dir", folder, "--days", "7").exit_code == 0
    shown = run("show", folder / "a.crt", folder / "ca.crt")
    assert shown.exit_code == 0
    assert "DNS:a, URI:snapd-node:a" in shown.stdout
    assert "an authority" in shown.stdout
    assert "6 days left" in shown.stdout
    (row,) = json.loads(run("show", folder / "a.crt", "--json").stdout)
    assert row["names"] == ["DNS:a", "URI:snapd-node:a"]
    assert row["issuer"] == "CN=snapd CA"
    assert row["problem"] is None
    assert row["not_after_s"] - row["not_before_s"] == pytest.approx(7 * 86_400 + 60)


def test_one_that_has_expired_ends_with_3(folder: Path) -> None:
    Authority(folder / "old").files("a", age_days=3)
    shown = run("show", folder / "old" / "a.crt")
    assert shown.exit_code == 3
    assert "expired" in shown.stdout
