"""What is particular to a directory: order of syncs, links, disks that vanish, errors of the file system."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapd.errors import AuthError, CapacityError, ConfigError, NotFoundError, SnapdError, UnavailableError
from snapd.store import directory_files
from snapd.store.base import Created
from snapd.store.directory import DirectoryStore
from snapd.store.probing import check_probe
from tests.support.stores import directory_store, surroundings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def store(root: Path) -> Iterator[DirectoryStore]:
    store = directory_store(root)
    store.put("begun", b"")
    yield store
    store.close()


class Steps:
    """What was done to files, in order: (step, path relative to the root)."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, str]] = []
        self._root = root
        real_sync = os.fsync

        def fsync(descriptor: int) -> None:
            self._note("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
            real_sync(descriptor)

        patch.setattr(os, "fsync", fsync)
        for name, position in (("link", 1), ("replace", 1), ("remove", 0), ("rmdir", 0)):
            self._watch(patch, name, position)

    def _watch(self, patch: pytest.MonkeyPatch, name: str, position: int) -> None:
        real = getattr(os, name)

        def step(*arguments: Any, **named: Any) -> None:
            real(*arguments, **named)
            self._note(name, arguments[position])

        patch.setattr(os, name, step)

    def _note(self, step: str, path: str) -> None:
        shown = os.path.relpath(path, self._root)
        self.seen.append((step, ".tmp/x" if shown.startswith(".tmp/") else shown))


def test_a_file_is_synced_before_it_has_its_name_and_the_name_before_anybody_hears_of_it(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(root, monkeypatch)
    assert store.create("jobs/j/s", b"x") is Created.OURS
    created = list(steps.seen)
    steps.seen.clear()
    upload = store.upload("jobs/j/packs/p")
    upload.write([b"x"])
    upload.commit()
    uploaded = list(steps.seen)
    steps.seen.clear()
    store.put("jobs/j/i", b"x")
    folders = [("sync", "jobs/j"), ("sync", "jobs"), ("sync", ".")]
    assert created == [("sync", ".tmp/x"), ("link", "jobs/j/s"), *folders, ("remove", ".tmp/x")]
    expected = [("sync", ".tmp/x"), ("link", "jobs/j/packs/p"), ("sync", "jobs/j/packs"), *folders]
    assert uploaded == [*expected, ("remove", ".tmp/x")]
    assert steps.seen == [("sync", ".tmp/x"), ("replace", "jobs/j/i"), *folders]


def test_a_deletion_is_synced_and_takes_empty_folders_along(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("a/b/c/1", "a/b/c/2", "a/d"):
        store.create(key, b"x")
    steps = Steps(root, monkeypatch)
    store.delete(["a/b/c/1"])
    assert steps.seen == [("remove", "a/b/c/1"), ("sync", "a/b/c")]
    steps.seen.clear()
    store.delete(["a/b/c/2"])
    assert steps.seen == [("remove", "a/b/c/2"), ("rmdir", "a/b/c"), ("rmdir", "a/b"), ("sync", "a")]
    assert sorted(os.listdir(root / "a")) == ["d"]


def test_a_folder_that_is_removed_while_something_is_published_is_made_again(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.link
    removed: list[str] = []

    def link(source: str, target: str, **named: Any) -> None:
        if not removed:
            os.rmdir(os.path.dirname(target))
            removed.append(target)
        real(source, target, **named)

    monkeypatch.setattr(os, "link", link)
    assert store.create("a/b", b"x") is Created.OURS
    assert removed == [str(root / "a/b")]
    assert store.read("a/b", max_nbytes=1) == b"x"


def test_nobody_else_can_read(store: DirectoryStore, root: Path) -> None:
    store.create("a/b", b"x")
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o700
    assert stat.S_IMODE((root / ".tmp").stat().st_mode) == 0o700
    assert stat.S_IMODE((root / "a/b").stat().st_mode) == 0o600


def test_links_lead_nowhere(store: DirectoryStore, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (root / "jobs").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    for key in ("jobs/new", "jobs/secret"):
        with pytest.raises(ConfigError) as error:
            store.create(key, b"x")
        assert error.value.kind == "store" and "symbolic link" in str(error.value)
        with pytest.raises(ConfigError):
            store.read(key, max_nbytes=10)
    with pytest.raises(ConfigError):
        store.read("file", max_nbytes=10)
    with pytest.raises(ConfigError):
        store.delete(["jobs/secret"])
    assert [info.key for info in store.list("")] == ["begun"]
    assert store.create("jobs2", b"x") is Created.OURS
    store.put("file", b"replaced, not followed")
    assert (outside / "secret").read_bytes() == b"secret"
    assert os.listdir(outside) == ["secret"]


def test_what_is_being_written_does_not_go_through_a_link(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root.mkdir()
    (root / ".tmp").symlink_to(outside)
    store = directory_store(root)
    with pytest.raises(ConfigError) as error:
        store.create("a", b"x")
    assert error.value.kind == "store"
    assert os.listdir(outside) == []


# ways to publish


def _refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def _unknown(*_: Any) -> None:
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def test_where_links_do_not_exist_names_are_given_by_renaming_without_replacing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", _refuse)
    store = directory_store(root)
    probe = store.probe()
    assert probe.refuses_existing
    assert store.create("a", b"1") is Created.OURS
    assert store.create("a", b"2") is Created.ANOTHERS
    assert store.create("a", b"1") is Created.OURS
    upload = store.upload("b")
    upload.write([b"3"])
    upload.commit()
    upload.abort()
    assert store.read("b", max_nbytes=1) == b"3"
    assert list(store.unfinished()) == []


def test_a_file_system_that_cannot_refuse_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _refuse)
    monkeypatch.setattr(directory_files, "renamed_without_replacing", _unknown)
    with pytest.raises(ConfigError) as error:
        directory_store(root).probe()
    assert error.value.kind == "store_conditional"
    single = directory_store(root, single_writer=True)
    probe = single.probe()
    assert not probe.refuses_existing
    assert "neither links" in " ".join(probe.problems)
    check_probe(single, probe, single_writer=True)
    with pytest.raises(ConfigError) as refused:
        check_probe(single, probe, single_writer=False)
    assert refused.value.kind == "store_conditional"
    assert single.create("a", b"1") is Created.OURS
    assert single.create("a", b"2") is Created.ANOTHERS


# the place


def test_a_root_that_vanishes_is_not_made_again(store: DirectoryStore, root: Path) -> None:
    upload = store.upload("a/p")
    upload.write([b"x"])
    root.rename(root.parent / "moved")
    with pytest.raises(NotFoundError) as error:
        upload.commit()
    assert error.value.kind == "bucket"
    upload.abort()
    with pytest.raises(NotFoundError):
        store.create("a/b", b"x")
    assert not root.exists()


def test_another_folder_in_the_root_s_place_is_not_filled(store: DirectoryStore, root: Path) -> None:
    """As when a disk is unmounted, and the folder below comes to light."""
    root.rename(root.parent / "moved")
    root.mkdir()
    for call in (lambda: store.create("a", b"x"), lambda: list(store.list("")), lambda: store.upload("b")):
        with pytest.raises(NotFoundError) as error:
            call()
        assert error.value.kind == "bucket" and "not the one that it was" in str(error.value)
    assert os.listdir(root) == []
    root.rmdir()
    (root.parent / "moved").rename(root)
    assert store.create("a", b"x") is Created.OURS


def test_a_disk_that_goes_while_something_is_written_leaves_no_folders_behind(
    store: DirectoryStore, root: Path, tmp_path: Path
) -> None:
    """An upload takes long; what is below the disk when it ends is an empty mount point."""
    upload = store.upload("jobs/a/packs/x.pack")
    upload.write([b"abc"])
    root.rename(tmp_path / "the disk")
    root.mkdir()
    with pytest.raises(NotFoundError) as error:
        upload.commit()
    assert error.value.kind == "bucket" and "restart the daemon" in error.value.hint
    assert list(root.iterdir()) == []


def test_the_first_probe_of_an_empty_folder_says_so(root: Path) -> None:
    store = directory_store(root)
    assert "should be mounted" in " ".join(store.probe().problems)
    assert store.probe().problems == ()
    store.close()


def test_what_a_killed_writer_leaves_is_found(store: DirectoryStore, root: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from tests.support.stores import directory_store\n"
        "upload = directory_store(Path(sys.argv[1])).upload('jobs/j/packs/p.pack')\n"
        "upload.write([b'x' * 1000])\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(root)], cwd=Path(__file__).parents[2], check=False
    )
    assert ended.returncode == -signal.SIGKILL
    [(key, token, _)] = list(store.unfinished())
    assert key == "jobs/j/packs/p.pack"
    assert [info.key for info in store.list("")] == ["begun"]
    store.abort_unfinished(key, token)
    assert os.listdir(root / ".tmp") == []


# errors


ERRORS: list[tuple[int, type[SnapdError], str]] = [
    (errno.ENOSPC, CapacityError, "store_full"),
    (errno.EDQUOT, CapacityError, "store_full"),
    (errno.EROFS, AuthError, "store_denied"),
    (errno.EACCES, AuthError, "store_denied"),
    (errno.EIO, UnavailableError, "store_failing"),
    (errno.ESTALE, UnavailableError, "store_unreachable"),
    (errno.ENOTCONN, UnavailableError, "store_unreachable"),
]


@pytest.mark.parametrize("call", ["writev", "fsync"])
@pytest.mark.parametrize(("number", "cls", "kind"), ERRORS, ids=[errno.errorcode[row[0]] for row in ERRORS])
def test_errors_of_the_file_system(
    store: DirectoryStore,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    cls: type[SnapdError],
    kind: str,
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    upload = store.upload("p")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        for action in (lambda: store.create("a", b"x"), lambda: (upload.write([b"x"]), upload.commit())):
            with pytest.raises(cls) as error:
                action()
            assert error.value.kind == kind
            assert str(root) in str(error.value) and os.strerror(number) in str(error.value)
    upload.abort()
    assert [info.key for info in store.list("")] == ["begun"]
    assert os.listdir(root / ".tmp") == []
    assert store.create("a", b"x") is Created.OURS


@pytest.mark.skipif(os.getuid() != 0, reason="root mounts a small disk")
def test_a_full_disk_and_one_that_is_read_only(tmp_path: Path) -> None:
    root = tmp_path / "disk"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(root)], check=True)
    try:
        store = DirectoryStore(root, surroundings())
        assert store.create("a", b"x") is Created.OURS
        upload = store.upload("p")
        with pytest.raises(CapacityError) as full:
            upload.write([bytes(2 << 20)])
        assert full.value.kind == "store_full"
        upload.abort()
        assert store.create("b", bytes(1 << 19)) is Created.OURS
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        for call in (lambda: store.create("c", b"x"), lambda: store.delete(["a"]), lambda: store.upload("p")):
            with pytest.raises(AuthError) as denied:
                call()
            assert denied.value.kind == "store_denied"
        assert store.read("a", max_nbytes=1) == b"x"
        assert sorted(info.key for info in store.list("")) == ["a", "b"]
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)
