"""`snapd plan`: what protection would cost and give on a cluster that need not exist yet."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from snapd.cli.options import JsonOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import facts, print_json, print_parts, table
from snapd.cli.plan_output import (
    CHECK_HEADINGS,
    PLAN_HEADINGS,
    agreement_json,
    agreement_row,
    cluster_facts,
    plan_json,
    plan_row,
    survival_headings,
    survival_row,
)
from snapd.cli.plan_plot import draw_plot
from snapd.cli.plan_trial import compare
from snapd.core.cluster import Code
from snapd.core.planning import PRESETS, Cluster, Failures, Plan, check_code, plan_code, plan_storage
from snapd.errors import ConfigError
from snapd.units import parse_duration_s, parse_size

DEFAULT_CODES = ("1+1", "3+1", "7+1", "2+2", "4+2", "6+2", "8+3", "12+4")


def _option(name: str, help_: str) -> object:
    return typer.Option(name, help=help_)


NodesOption = Annotated[int, _option("--nodes", "Nodes of the job.")]
CodesOption = Annotated[
    list[str] | None,
    typer.Option("--code", help="K+M, may be repeated. Default: several.", show_default=False),
]
DomainOption = Annotated[int, _option("--nodes-per-domain", "Nodes of one rack, or whatever fails together.")]
PresetOption = Annotated[str, _option("--preset", f"Published failure rates: {', '.join(PRESETS)}.")]
FailuresOption = Annotated[
    float | None,
    typer.Option(
        "--failures", help="Failures per 1,000 node-days, instead of the preset's.", show_default=False
    ),
]
ShareOption = Annotated[
    float | None,
    typer.Option(
        "--memory-loss-share",
        help="Of the failures, those that lose a node's memory, instead of the preset's.",
        show_default=False,
    ),
]
WipeOption = Annotated[
    float, _option("--wipe-share", "Of the failures, those that lose all memory of the job.")
]
DomainLossOption = Annotated[
    float, _option("--domain-losses", "Losses of whole domains per 1,000 domain-days.")
]
StateOption = Annotated[str, _option("--state", "State of the whole job (parameters and optimizer).")]
SlotsOption = Annotated[int, _option("--slots", "Snapshots that a node has room for (arena.slots).")]
CopyOption = Annotated[str, _option("--copy", "Bytes a second from the devices to memory, one node.")]
NetworkOption = Annotated[
    str, _option("--network", "Bytes a second for protection, one node, each direction.")
]
StorageOption = Annotated[str, _option("--storage", "Bytes a second of shared storage, all nodes together.")]
StepOption = Annotated[str, _option("--step-time", "One training step.")]
StallOption = Annotated[str, _option("--stall", "What training waits for one snapshot.")]
StorageStallOption = Annotated[str, _option("--storage-stall", "What it waits more when one is also stored.")]
RestartOption = Annotated[str, _option("--restart", "From a failure until a restore from memory can begin.")]
StorageRestartOption = Annotated[str, _option("--storage-restart", "The same where memory is lost.")]
DetectOption = Annotated[str, _option("--detect", "Until a node's place is given away (cluster.lost_after).")]
WindowOption = Annotated[
    str,
    typer.Option(
        "--window",
        help="From a loss until all parity is there again. Default: estimated.",
        show_default=False,
    ),
]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", help="Draw it into this file (.svg, .png, .pdf).", show_default=False)
]
CheckOption = Annotated[
    bool, _option("--check", "Compare the formulas with a Monte Carlo of the same cluster.")
]
SeedOption = Annotated[int, _option("--seed", "Of the Monte Carlo.")]


def plan(
    nodes: NodesOption,
    code: CodesOption = None,
    nodes_per_domain: DomainOption = 1,
    preset: PresetOption = "llama3",
    failures: FailuresOption = None,
    memory_loss_share: ShareOption = None,
    wipe_share: WipeOption = 0.01,
    domain_losses: DomainLossOption = 0.0,
    state: StateOption = "1TB",
    slots: SlotsOption = 3,
    copy: CopyOption = "10GB",
    network: NetworkOption = "2GB",
    storage: StorageOption = "10GB",
    step_time: StepOption = "5s",
    stall: StallOption = "100ms",
    storage_stall: StorageStallOption = "1s",
    restart: RestartOption = "180s",
    storage_restart: StorageRestartOption = "600s",
    detect: DetectOption = "30s",
    window: WindowOption = "",
    plot: PlotOption = None,
    check: CheckOption = False,
    seed: SeedOption = 1,
    as_json: JsonOption = False,
) -> ExitCode:
    """Plan protection: the best intervals, goodput, what survives, memory and network, for several codes.

    Asks no daemon. Ends with 3 when --check finds a formula that disagrees with its Monte Carlo.
    """
    cluster = Cluster(
        nodes=nodes,
        nodes_per_domain=nodes_per_domain,
        failures=_failures(preset, failures, memory_loss_share),
        wipe_share=wipe_share,
        domain_losses_per_1000_days=domain_losses,
        state_bytes=_size("--state", state),
        slots=slots,
        copy_bytes_per_s=_size("--copy", copy),
        network_bytes_per_s=_size("--network", network),
        storage_bytes_per_s=_size("--storage", storage),
        step_s=_duration("--step-time", step_time),
        stall_s=_duration("--stall", stall),
        storage_stall_s=_duration("--storage-stall", storage_stall),
        restart_s=_duration("--restart", restart),
        storage_restart_s=_duration("--storage-restart", storage_restart),
        detect_s=_duration("--detect", detect),
        window_s=_duration("--window", window) if window else 0.0,
    )
    cluster.check()
    return _report(cluster, _codes(code, nodes), plot=plot, seed=seed, is_checked=check, as_json=as_json)


def _report(
    cluster: Cluster, codes: Sequence[Code], *, plot: Path | None, seed: int, is_checked: bool, as_json: bool
) -> ExitCode:
    draw = random.Random(seed).random
    plans: list[Plan] = [
        plan_storage(cluster, is_synchronous=True),
        plan_storage(cluster, is_synchronous=False),
        *(plan_code(cluster, code, draw) for code in (None, *codes)),
    ]
    if plot is not None:
        draw_plot(plot, cluster, plans)
    agreements = compare(plans, draw) if is_checked else []
    if as_json:
        document: dict[str, object] = {"plans": [plan_json(cluster, found) for found in plans]}
        if is_checked:
            document["check"] = [agreement_json(found) for found in agreements]
        print_json(document)
    else:
        coded = [found for found in plans if found.code is not None]
        headings = survival_headings(coded)
        print_parts(facts(cluster_facts(cluster)), "")
        print_parts(
            table(PLAN_HEADINGS, [plan_row(cluster, found) for found in plans], right=PLAN_HEADINGS[1:])
        )
        if coded:
            rows = [survival_row(found, headings) for found in coded]
            print_parts("", "Probability that memory survives so many losses at once:", "")
            print_parts(table(headings, rows, right=headings[2:]))
        if is_checked:
            rows = [agreement_row(found) for found in agreements]
            print_parts("", table(CHECK_HEADINGS, rows, right=CHECK_HEADINGS[2:5]))
    is_wrong = any(not found.agrees for found in agreements)
    return ExitCode.UNUSABLE if is_wrong else ExitCode.DONE


def _failures(preset: str, rate: float | None, share: float | None) -> Failures:
    found = PRESETS.get(preset)
    if found is None:
        raise ConfigError(f"no preset {preset!r}", kind="plan", hint=f"there are {', '.join(PRESETS)}")
    if rate is None and share is None:
        return found
    return Failures(
        per_1000_node_days=found.per_1000_node_days if rate is None else rate,
        memory_loss_share=found.memory_loss_share if share is None else share,
        source="as given",
    )


def _codes(texts: Sequence[str] | None, nodes: int) -> list[Code]:
    """The codes asked for, which must fit; else those of the usual ones that do."""
    if not texts:
        return [code for code in map(Code.parse, DEFAULT_CODES) if code.size <= nodes]
    codes = list(dict.fromkeys(map(Code.parse, texts)))
    for code in codes:
        check_code(code, nodes)
    return codes


def _size(name: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}", kind="plan") from error


def _duration(name: str, text: str) -> float:
    try:
        return parse_duration_s(text)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}", kind="plan") from error
