"""Credentials that a program of the user gives (`credential_process`): what is wrong with it is told as that, and a
program that hangs holds up nobody but who asks. No server is needed: nothing is ever sent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd.errors import AuthError, UnavailableError
from snapd.store.opening import StoreOptions
from snapd.store.s3 import S3Store
from tests.support.stores import surroundings
from tests.support.waiting import wait_for

EXPIRED = '{"Version": 1, "AccessKeyId": "k", "SecretAccessKey": "s", "Expiration": "2020-01-01T00:00:00Z"}'
NOBODY = "http://127.0.0.1:9"


class Program:
    """Says that it ran by a file beside it."""

    def __init__(self, folder: Path) -> None:
        self.path, self.ran = folder / "credentials", folder / "ran"

    def does(self, script: str) -> None:
        self.path.write_text(f"#!/bin/sh\necho >> {self.ran}\n{script}\n")
        self.path.chmod(0o755)

    def count(self) -> int:
        return len(self.ran.read_text().splitlines()) if self.ran.exists() else 0


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    made = Program(tmp_path)
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = {made.path}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return made


@pytest.fixture
def store() -> Iterator[S3Store]:
    made = S3Store("bucket", "x", StoreOptions(endpoint=NOBODY, deadline_s=2.0, stall_s=1.0), surroundings())
    yield made
    made.close()


@pytest.mark.parametrize(
    "script,word",
    [
        ("exit 3", "custom-process"),
        ("echo hello", "JSONDecodeError"),
        ("", "JSONDecodeError"),
        ("echo '{\"Version\": 1}'", "AccessKeyId"),
        (f"echo '{EXPIRED}'", "expired"),
    ],
)
def test_a_program_that_gives_none_is_named_and_asked_again(
    program: Program, store: S3Store, script: str, word: str
) -> None:
    program.does(script)
    for asked in (1, 2):
        with pytest.raises(AuthError) as error:
            store.head("some/key")
        assert error.value.kind == "store_credentials" and word in error.value.message
        assert program.count() >= asked, "a person may have mended it meanwhile"


def test_a_program_that_is_not_there(program: Program, store: S3Store) -> None:
    with pytest.raises(AuthError) as error:
        store.head("some/key")
    assert error.value.kind == "store_credentials" and str(program.path) in error.value.message


def test_a_program_that_hangs_does_not_hold_up_the_end(
    program: Program, store: S3Store, tmp_path: Path
) -> None:
    go_on = tmp_path / "go on"
    program.does(f"while [ ! -e '{go_on}' ]; do sleep 0.05; done; exit 1")
    failures: list[Exception] = []

    def ask() -> None:
        try:
            store.head("some/key")
        except (AuthError, UnavailableError) as error:
            failures.append(error)

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    wait_for(program.count, "the program runs")
    began_s = time.monotonic()
    store.close()
    took_s = time.monotonic() - began_s
    assert all(thread.is_alive() for thread in asking), "it hangs still"
    go_on.touch()
    for thread in asking:
        thread.join()
    assert took_s < 1.0
    assert len(failures) == 2
