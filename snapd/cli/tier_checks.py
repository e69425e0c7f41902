"""The checks of `snapd doctor` that concern durable tiers: that a store is there, and what a commit rests upon.

Nothing stays behind: the probe's objects are deleted, and a folder that is no tier yet gets no marker. What may hang is
asked in a thread and given up.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from snapd_proto import admin_pb2

from snapd.cli.checks import Finding, Verdict
from snapd.cli.tier_folder import judge_folder, look_into, probe_aside
from snapd.config_tiers import TierConfig, check_tier, hurried, store_of
from snapd.core.tier_keys import JOBS
from snapd.errors import AuthError, SnapdError, UnavailableError
from snapd.rpc.local_client import LocalClient
from snapd.store.base import Probe, Store
from snapd.store.opening import FILE, parsed_url
from snapd.store.surroundings import Surroundings

GIVE_UP_S = 10.0  # a question is several requests, each of which has the deadline of `hurried`
SKEW_NOTED_S = 30.0

T = TypeVar("T")


class Questions:
    """Blocking questions to stores, each in a thread, waited for `give_up_s` seconds only."""

    def __init__(self, give_up_s: float = GIVE_UP_S) -> None:
        self.give_up_s = give_up_s
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="snapd-doctor")
        self._asked: list[Future[None]] = []

    @property
    def is_hanging(self) -> bool:
        """Whether one has not come to its end: the process cannot end by itself then."""
        return any(not future.done() for future in self._asked)

    def ask(self, what: str, question: Callable[[], T]) -> T:
        """
        Raises:
            UnavailableError: kind `store_slow`: no answer in time. What the question raises.
        """
        answers: list[T] = []
        future = self._threads.submit(lambda: answers.append(question()))
        self._asked.append(future)
        try:
            future.result(self.give_up_s)
        except TimeoutError:
            raise UnavailableError(
                f"{what}: no answer in {self.give_up_s:g} s",
                kind="store_slow",
                hint="a file system or a server that hangs; what was being tried may be left below probe/",
            ) from None
        return answers[0]


def tier_findings(
    config: TierConfig,
    runtime: Path,
    questions: Questions,
    connect: Callable[[Path], LocalClient] = LocalClient,
) -> list[Finding]:
    """Of all tiers that are configured. A tier in a folder: see tier_folder.py for what can be looked at."""
    found: list[Finding] = []
    if config.shared:
        found += shared_findings(config, questions)
        found += daemon_findings(config, runtime, connect)
    return found


def shared_findings(config: TierConfig, questions: Questions) -> list[Finding]:
    """Of `tier.shared`, as this command's user and environment reach it. Ends with the first thing that fails."""
    check = "tier"
    try:
        check_tier(config)
        with _opened(hurried(config), questions) as store:
            found = [Finding(check=check, verdict=Verdict.GOOD, found=store.description)]
            url = parsed_url(config.shared)
            folder = url.path if url.scheme == FILE else None
            is_tier = True
            if folder is not None:
                check = "tier folder"
                look = questions.ask(f"cannot look into {folder}", lambda: look_into(folder))
                is_tier = bool(look.marker)
                found.append(judge_folder(look))
                if found[-1].verdict is Verdict.BAD:
                    return found
            check = "tier listing"
            found.append(_list(store, questions))
            check = "tier commits"
            if folder is not None and not is_tier:
                probe = questions.ask("probe", lambda: probe_aside(folder, surroundings()))
            else:
                probe = questions.ask("probe", store.probe)
            return found + judge_probe(probe, single_writer=config.single_writer == "yes")
    except SnapdError as error:
        # `found` is what went well before
        return [*(found if check != "tier" else []), judge_error(check, error)]


@contextlib.contextmanager
def _opened(config: TierConfig, questions: Questions) -> Iterator[Store]:
    store = store_of(config, surroundings())
    try:
        yield store
    finally:
        if not questions.is_hanging:  # what is being deleted still needs it
            store.close()


def _list(store: Store, questions: Questions) -> Finding:
    began_s = time.monotonic()
    first = questions.ask("listing", lambda: next(iter(store.list(JOBS)), None))
    content = "has jobs" if first is not None else "no jobs yet"
    found = f"answers in {(time.monotonic() - began_s) * 1000:.0f} ms, {content}"
    return Finding(check="tier listing", verdict=Verdict.GOOD, found=found)


def judge_error(check: str, error: SnapdError) -> Finding:
    """What a store raised. Once it could be listed, a refusal concerns writing."""
    if check == "tier commits" and isinstance(error, AuthError) and error.kind == "store_denied":
        return Finding(
            check=check,
            verdict=Verdict.WARNING,
            found=f"read-only: {error.message}",
            hint=f"it can restore, it cannot flush: {error.hint}",
            kind="store_read_only",
        )
    return Finding(check=check, verdict=Verdict.BAD, found=error.message, hint=error.hint, kind=error.kind)


def judge_probe(probe: Probe, *, single_writer: bool) -> list[Finding]:
    """What the probe found, a line for each thing that it tried."""
    return [_commits(probe, single_writer=single_writer), _checksums(probe), _clock(probe)]


def _commits(probe: Probe, *, single_writer: bool) -> Finding:
    check = "tier commits"
    if probe.refuses_existing:
        return Finding(check=check, verdict=Verdict.GOOD, found="a second creation of a key is refused")
    if single_writer:
        hint = "tier.single_writer=yes: never let two daemons write there"
        verdict = Verdict.WARNING
    else:
        hint = "another store, or tier.single_writer=yes if no two daemons ever write there"
        verdict = Verdict.BAD
    return Finding(check=check, verdict=verdict, found=probe.problems[0], hint=hint, kind="store_conditional")


def _checksums(probe: Probe) -> Finding:
    check = "tier checksums"
    if probe.keeps_checksums:
        return Finding(check=check, verdict=Verdict.GOOD, found="damage on the way would be found")
    return Finding(
        check=check,
        verdict=Verdict.WARNING,
        found="objects are taken whose checksum is wrong",
        hint="damage on the way is found by snapd's own digests, only when snapshots are read",
        kind="store_checksums",
    )


def _clock(probe: Probe) -> Finding:
    found = f"the store's clock is {round(probe.skew_s):+d} s from this machine's"
    if abs(probe.skew_s) <= SKEW_NOTED_S:
        return Finding(check="tier clock", verdict=Verdict.GOOD, found=found)
    hint = "set this machine's clock (NTP); S3 refuses requests from 15 minutes on"
    return Finding(check="tier clock", verdict=Verdict.WARNING, found=found, hint=hint, kind="store_skew")


def daemon_findings(
    config: TierConfig, runtime: Path, connect: Callable[[Path], LocalClient]
) -> list[Finding]:
    """Whether the running daemon uses the same tier, and could open it: its environment may be another one."""
    if not (runtime / "handshake.sock").exists():
        return []
    try:
        with connect(runtime) as client:
            return [judge_daemon(config.shared, client.status())]
    except SnapdError:
        return []  # the check of the daemon says so


def judge_daemon(url: str, reply: admin_pb2.StatusReply) -> Finding:
    """What the daemon says of its tier."""
    check, tier = "tier of daemon", reply.tier
    if tier.url != url:
        return Finding(
            check=check,
            verdict=Verdict.BAD,
            found=f"the daemon has {tier.url}" if tier.url else "the daemon has no shared tier",
            hint="start the daemon again with the same settings as this command",
            kind="tier_daemon",
        )
    if tier.trouble:
        hint = "the daemon has the environment that it was started with; it tries again by itself"
        return Finding(
            check=check, verdict=Verdict.BAD, found=tier.trouble, hint=hint, kind=tier.trouble_kind
        )
    found = "opened" if tier.is_open else "not opened yet"
    return Finding(check=check, verdict=Verdict.GOOD, found=found)


def surroundings() -> Surroundings:
    return Surroundings(
        time.monotonic, time.time, secrets.SystemRandom().random, lambda: secrets.token_hex(16)
    )
