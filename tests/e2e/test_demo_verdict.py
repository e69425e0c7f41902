"""The demo's judgement: what it compares, and that it would say so if anything differed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))

import verdict
from corpus import Windows, read_corpus
from final import first_difference, write_final
from heartbeat import Beat, Heart, read_beat
from world import Kill, RunLog, read_run

STEPS, KILLED_AT = 6, 10.5


def small_parts() -> dict[str, Any]:
    torch.manual_seed(1)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)

    class Loader:
        def state_dict(self) -> dict[str, object]:
            return {"position": 3, "generator": torch.arange(2000)}

    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": Loader()}


def test_equal_states_are_equal_and_every_kind_of_tensor_is_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        np.random.seed(5)
        write_final(tmp_path / name, small_parts())
    difference, count = first_difference(tmp_path / "a", tmp_path / "b")
    assert difference is None
    assert count == 2 + 2 * 3 + 5 + 1  # parameters, optimizer tensors, RNG states, the loader's generator


def _flip_parameter(parts: dict[str, Any]) -> None:
    with torch.no_grad():
        parts["model"].weight.view(torch.int32)[1, 2] ^= 1


def _flip_moment(parts: dict[str, Any]) -> None:
    parts["optimizer"].state[parts["model"].bias]["exp_avg_sq"].view(torch.int32)[0] ^= 1


def _draw(parts: dict[str, Any]) -> None:
    torch.rand(1)


def _step_scheduler(parts: dict[str, Any]) -> None:
    parts["scheduler"].last_epoch += 1


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (_flip_parameter, "model.weight[6]"),
        (_flip_moment, "optimizer.bias.exp_avg_sq[0]"),
        (_draw, "rng.torch"),
        (_step_scheduler, "scheduler"),
    ],
)
def test_one_bit_is_found_and_named(tmp_path: Path, spoil: Any, name: str) -> None:
    write_final(tmp_path / "a", small_parts())
    parts = small_parts()
    spoil(parts)
    write_final(tmp_path / "b", parts)
    difference, _ = first_difference(tmp_path / "a", tmp_path / "b")
    assert difference is not None
    assert difference.startswith(name)


def run_log(*, restarted_from: int, spoilt_loss: int = 0) -> RunLog:
    """Steps of one rank: 1.. until the kill after step 4, then from `restarted_from` + 1 on."""
    events: list[dict[str, Any]] = []
    for first, last, t in ((1, 4, 1.0), (restarted_from + 1, STEPS, 20.0)):
        for step in range(first, last + 1):
            loss = (step * 0.5 + (1e-15 if step == spoilt_loss and t > 10 else 0)).hex()
            events.append(
                {
                    "what": "step",
                    "rank": 0,
                    "step": step,
                    "loss": loss,
                    "t": t + step,
                    "began": t + step - 0.5,
                }
            )
    return RunLog(events, ranks=1, start=restarted_from)


def reference_log() -> RunLog:
    events = [
        {"what": "step", "rank": 0, "step": s, "loss": (s * 0.5).hex(), "t": float(s), "began": s - 0.5}
        for s in range(1, STEPS + 1)
    ]
    return RunLog(events, ranks=1)


def judged(tmp_path: Path, run: RunLog) -> verdict.Found:
    for name in ("reference", "interrupted"):
        (tmp_path / name).mkdir()
        write_final(tmp_path / name / "final-0.safetensors", small_parts())
    kill = Kill(KILLED_AT, [Beat(1, 5, "forward")], (1, 4))
    return verdict.compare(tmp_path, reference_log(), run, kill, 1, STEPS)


def test_steps_done_again_are_compared_too(tmp_path: Path) -> None:
    found = judged(tmp_path, run_log(restarted_from=3))
    assert found.difference is None
    assert found.losses == STEPS + 1


def test_a_loss_that_differs_in_its_last_bits_is_found(tmp_path: Path) -> None:
    found = judged(tmp_path, run_log(restarted_from=3, spoilt_loss=5))
    assert found.difference is not None
    assert "loss of step 5" in found.difference


def test_a_step_left_out_is_found(tmp_path: Path) -> None:
    run = run_log(restarted_from=4)
    run.events = [e for e in run.events if e["step"] != 5]
    assert "not every step" in str(judged(tmp_path, run).difference)


def test_a_run_that_did_not_go_on_after_the_restored_step_is_found(tmp_path: Path) -> None:
    run = run_log(restarted_from=2)
    run.start = 3
    run.events = [e for e in run.events if not (e["step"] == 4 and e["t"] > KILLED_AT)]
    assert "did not go on" in str(judged(tmp_path, run).difference)


def test_a_line_torn_by_the_kill_is_left_out(tmp_path: Path) -> None:
    lines = [json.dumps({"what": "step", "rank": 0, "step": 1, "t": 1.0}), '{"what": "step", "ra']
    (tmp_path / "rank-0.jsonl").write_text("\n".join(lines))
    assert [event["step"] for event in read_run(tmp_path, 1).of("step")] == [1]


def test_heartbeat_says_where_a_rank_is(tmp_path: Path) -> None:
    assert read_beat(tmp_path / "beat") is None
    heart = Heart(tmp_path / "beat")
    heart.at(7, "backward")
    beat = read_beat(tmp_path / "beat")
    assert beat is not None
    assert (beat.step, beat.phase) == (7, "backward")


def test_the_corpus_is_real_and_ranks_share_no_window() -> None:
    corpus = read_corpus(1 << 20)
    assert b"import" in corpus.tobytes()
    starts = [Windows(corpus, context=64, rank=rank, world_size=2, count=50).starts for rank in (0, 1)]
    assert not set(starts[0]) & set(starts[1])
