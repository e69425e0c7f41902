"""`snapd pin` and `snapd unpin`: snapshots of a tier that retention must keep, by name."""

from __future__ import annotations

from typing import Annotated

import typer

from snapd.cli.options import GenerationOption, JsonOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import print_json
from snapd.cli.tier_source import CONFIGURED, FromOption, opened_tier
from snapd.core.tier_keys import TierKeys
from snapd.tier.pinning import checked_pin_name
from snapd.tier.pinning import pin as put_pin
from snapd.tier.pinning import unpin as remove_pin

JobOption = Annotated[
    str | None,
    typer.Option(
        "--job", envvar="SNAPD_JOB", help="The job. Default: the tier's only one.", show_default=False
    ),
]
NameArgument = Annotated[str, typer.Argument(help="A name of your choice, such as `best`.")]


def pin(
    name: NameArgument,
    step: Annotated[int, typer.Option("--step", min=0, help="The snapshot's step.", show_default=False)],
    generation: GenerationOption = None,
    job: JobOption = None,
    url: FromOption = None,
    as_json: JsonOption = False,
) -> ExitCode:
    """Keep a durable snapshot until it is unpinned, whatever retention says. Needs no daemon."""
    checked_pin_name(name)
    with opened_tier(url or CONFIGURED) as source:
        chosen = source.choose_job(job)
        snapshot = source.candidates(chosen, step=step, generation=generation)[0].id
        put_pin(source.store, TierKeys(chosen), name, snapshot)
    if as_json:
        print_json({"job": chosen, "pin": name, "generation": snapshot.generation, "step": snapshot.step})
    else:
        print(f"step {snapshot.step} (generation {snapshot.generation}) of {chosen} is pinned as {name}")
    return ExitCode.DONE


def unpin(
    name: NameArgument, job: JobOption = None, url: FromOption = None, as_json: JsonOption = False
) -> ExitCode:
    """Give a pinned snapshot back to retention."""
    checked_pin_name(name)
    with opened_tier(url or CONFIGURED) as source:
        chosen = source.choose_job(job)
        remove_pin(source.store, TierKeys(chosen), name)
    if as_json:
        print_json({"job": chosen, "pin": name})
    else:
        print(f"{name} is unpinned: retention decides again")
    return ExitCode.DONE
