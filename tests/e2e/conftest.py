"""What several of these files compare with."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.daemon_process import daemon_folders
from tests.support.tier_job import END, train


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of the small FSDP2 job wrote when nothing happened to it, and snapd had no part in it."""
    with daemon_folders(OMP_NUM_THREADS="1") as nobody:
        return train(nobody, 0, END, tmp_path_factory.mktemp("undisturbed") / "plain", "plain")
