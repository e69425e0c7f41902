"""`snapd gc`: what retention drops of a durable tier, and what nobody names any more."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Annotated

import typer

from snapd.cli.gc_output import pass_json, pass_parts
from snapd.cli.options import JsonOption
from snapd.cli.outcome import ExitCode
from snapd.cli.output import format_age, print_json, print_parts
from snapd.cli.pin import JobOption
from snapd.cli.settings import load_settings
from snapd.cli.tier_source import CONFIGURED, FromOption, opened_tier
from snapd.config_tiers import TierConfig, collect_rules
from snapd.core.condemning import CollectRules
from snapd.core.retention import KeepRules
from snapd.errors import ConfigError
from snapd.store.base import Store
from snapd.tier.collecting import Collector, Pass
from snapd.tier.rewriting import RewriteMeans, Rewriter, Rewritten

POLL_MAX_S = 60.0


def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing; say what would be done.")
    ] = False,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait", help="Come back when nothing is condemned any more: some rounds of tier.gc_every."
        ),
    ] = False,
    job: JobOption = None,
    url: FromOption = None,
    keep_last: Annotated[
        int | None, typer.Option("--keep-last", min=0, help="Instead of tier.keep_last.", show_default=False)
    ] = None,
    keep_every: Annotated[
        int | None,
        typer.Option("--keep-every", min=0, help="Instead of tier.keep_every.", show_default=False),
    ] = None,
    keep_hourly: Annotated[
        int | None,
        typer.Option("--keep-hourly", min=0, help="Instead of tier.keep_hourly.", show_default=False),
    ] = None,
    keep_daily: Annotated[
        int | None,
        typer.Option("--keep-daily", min=0, help="Instead of tier.keep_daily.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> ExitCode:
    """One pass of a collector over a tier: delete what was condemned a round ago and is garbage still, condemn what is
    garbage now, rewrite packs of which little is alive. Daemons do this by themselves; this needs none.
    """
    config = load_settings(None).config.tier
    chosen = (keep_last, keep_every, keep_hourly, keep_daily)
    rules = _rules(config, chosen, is_foreign=url not in (None, CONFIGURED, config.shared), is_dry=dry_run)
    with opened_tier(url or CONFIGURED) as source:
        name = source.choose_job(job)
        while True:
            done, rewritten = _pass(source.store, name, rules, is_dry=dry_run)
            if not wait or dry_run or (done.is_quiet and not rewritten.snapshots):
                break
            if not as_json:
                typer.echo(f"{_line(done)}; the next look in {format_age(_pause_s(done))}", err=True)
            time.sleep(_pause_s(done))
        if as_json:
            print_json(pass_json(name, done, rewritten, is_dry=dry_run))
        else:
            print_parts(*pass_parts(name, done, rewritten, is_dry=dry_run))
    return ExitCode.UNUSABLE if done.judgement.blind else ExitCode.DONE


def _rules(
    config: TierConfig, chosen: tuple[int | None, ...], *, is_foreign: bool, is_dry: bool
) -> CollectRules:
    """The rules of the settings, or of the options.

    Raises:
        ConfigError: kind `arguments`: another tier than the configured one, and nothing says what to keep there.
    """
    rules = collect_rules(config)
    if all(value is None for value in chosen):
        if is_foreign and not is_dry:
            raise ConfigError(
                "the settings' rules are for the configured tier, not for this one",
                kind="arguments",
                hint="say what to keep: --keep-last N and the like, or --dry-run",
            )
        return rules
    last, every, hourly, daily = (value or 0 for value in chosen)
    keep = KeepRules(last=last, every_steps=every, hourly=hourly, daily=daily)
    return CollectRules(
        keep=keep, round_s=rules.round_s, intent_ttl_s=rules.intent_ttl_s, void_ttl_s=rules.void_ttl_s
    )


def _pass(store: Store, job: str, rules: CollectRules, *, is_dry: bool) -> tuple[Pass, Rewritten]:
    token: Callable[[], str] = lambda: secrets.token_hex(16)  # noqa: E731
    done = Collector(store, job, rules, write_id=token()).run(is_dry=is_dry)
    means = RewriteMeans(store=store, random_token=token, wall_s=time.time, monotonic_s=time.monotonic)
    rewriter = Rewriter(means, job, rules)
    if is_dry:
        return done, Rewritten(rewriter.plan(done.sight, done.judgement))
    return done, rewriter.run(done.sight, done.judgement)


def _pause_s(done: Pass) -> float:
    return min(POLL_MAX_S, max(0.1, done.next_s or 0.1))


def _line(done: Pass) -> str:
    return f"{len(done.deleted)} objects deleted, {len(done.condemned)} condemned"
