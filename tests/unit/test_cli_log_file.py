"""The daemon's log file stays bounded."""

from pathlib import Path

from snapd.obs.log import BoundedFile


def test_a_full_log_is_put_aside_once(tmp_path: Path) -> None:
    path = tmp_path / "daemon.log"
    path.write_text("old\n" * 10)
    with BoundedFile(path, nbytes_max=50) as log:
        for number in range(30):
            log.write(f"line {number:03}\n")
    kept = (tmp_path / "daemon.log.1").read_text() + path.read_text()
    assert {file.name for file in tmp_path.iterdir()} == {"daemon.log", "daemon.log.1"}
    assert len(kept) < 2 * 50 + 20 and kept.endswith("line 029\n")
    assert "old" not in kept and log.closed
