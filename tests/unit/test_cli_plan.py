"""`snapd plan`: what it prints, what it refuses, and with what it ends."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from snapd.cli import plan_trial
from snapd.cli.main import app
from snapd.cli.plan_output import format_probability, format_time


def run(*arguments: str, code: int = 0) -> str:
    """What it prints; with another exit code than 0, the one line on stderr."""
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result.stderr if code else result.stdout


def test_the_tables() -> None:
    text = run("--nodes", "2048", "--nodes-per-domain", "32", "--state", "6.5TB")
    assert "2048 in 64 domains of 32" in text
    assert "one every 3.09 h" in text
    rows = {line.split()[0]: line.split() for line in text.split("Probability")[1].splitlines() if line}
    assert rows["6+2"][1:4] == ["256", "of", "8"]
    assert rows["6+2"][4:10] == ["1", "1", "1-4e-05", "0.9994", "0.9945", "0.9537"]
    assert rows["1+1"][8] == "0.9427"


def test_the_document() -> None:
    document = json.loads(run("--nodes", "16", "--code", "6+2", "--code", "6+2", "--code", "2+2", "--json"))
    plans = {plan["name"]: plan for plan in document["plans"]}
    assert list(plans) == ["storage, synchronous", "storage, asynchronous", "own memory", "6+2", "2+2"]
    assert plans["6+2"]["groups"] == {"8": 2}
    assert plans["6+2"]["survival_by_nodes_lost"]["2"] == 1.0
    assert plans["2+2"]["parity_bytes"] == pytest.approx(1e12 / 16)
    assert plans["own memory"]["protected_interval_s"] is None
    assert 0.9 < plans["6+2"]["goodput"] < 1


def test_codes_that_do_not_fit_are_left_out_unless_asked_for() -> None:
    text = run("--nodes", "4")
    assert "2+2" in text and "6+2" not in text
    assert "1+1" not in run("--nodes", "1")


def test_a_check_prints_both_and_ends_with_3_when_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--nodes", "64", "--code", "6+2", "--check", "--failures", "50")
    monkeypatch.setattr(plan_trial, "FAILURES", 4000)
    monkeypatch.setattr(plan_trial, "TRIALS", 1000)
    text = run(*arguments)
    assert text.count("agrees") == 7 and "DIFFERS" not in text
    assert all(found["agrees"] for found in json.loads(run(*arguments, "--json"))["check"])
    assert run(*arguments, "--seed", "2") != text == run(*arguments)
    monkeypatch.setattr(plan_trial, "LOSSES_CHECKED", (8,))
    original = plan_trial.simulate_survival

    def harsher(sizes: list[int], m: int, lost: int, **others: object) -> object:
        return original(sizes, m - 1, lost, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(plan_trial, "simulate_survival", harsher)
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 3
    assert "DIFFERS" in result.stdout


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_plot(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plan.{suffix}"
    run("--nodes", "16", "--plot", str(path))
    assert path.stat().st_size > 5000


def test_a_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = run("--nodes", "16", "--plot", str(tmp_path / "plan.svg"), code=2)
    assert "--plot needs matplotlib, which is not installed [plot] (pip install matplotlib" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nodes", "4", "--code", "6+2"), "groups of 6+2 are larger than the cluster of 4 nodes"),
        (("--nodes", "4", "--code", "0+2"), "bad code '0+2' [code] (K+M with K up to 24"),
        (("--nodes", "4", "--code", "25+2"), "bad code '25+2'"),
        (("--nodes", "4", "--code", "six"), "bad code 'six'"),
        (("--nodes", "0"), "nodes is 0, not 1 to 65536"),
        (
            ("--nodes", "8", "--nodes-per-domain", "9"),
            "nodes_per_domain is 9, not 1 to the number of nodes, 8",
        ),
        (("--nodes", "8", "--failures", "-1"), "failures is -1, not more than 0"),
        (("--nodes", "8", "--memory-loss-share", "1.5"), "memory_loss_share is 1.5, not 0 to 1"),
        (("--nodes", "8", "--preset", "mine"), "no preset 'mine' [plan] (there are llama3, rsc1, ft-hsdp)"),
        (("--nodes", "8", "--state", "lots"), "--state: not a size: 'lots'"),
        (("--nodes", "8", "--stall", "soon"), "--stall: not a duration: 'soon'"),
        (("--nodes", "8", "--network", "0"), "network_bytes_per_s is 0, not more than 0"),
        (("--nodes", "8", "--plot", "plan.gif"), "cannot draw into plan.gif [plot]"),
        (("--nodes", "8", "--plot", "/no/such/folder/plan.svg"), "cannot write /no/such/folder/plan.svg"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    text = run(*arguments, code=2)
    assert message in text
    assert len(text.splitlines()) == 1


def test_numbers_as_people_read_them() -> None:
    assert [format_probability(p) for p in (0.0, 0.5, 0.99984, 0.99996, 1.0)] == [
        "0", "0.5000", "0.9998", "1-4e-05", "1",
    ]  # fmt: skip
    assert [format_time(s) for s in (0.0123, 47.2, 150, 11_124, 400_000)] == [
        "0.0123 s", "47.2 s", "2.5 min", "3.09 h", "4.63 d",
    ]  # fmt: skip
