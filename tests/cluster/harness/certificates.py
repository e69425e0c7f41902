"""Certificates of a test's cluster: one authority, a folder per node, and such as must be refused."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path

from snapd.peer.certificates import Issued, make_ca, make_node

DAY = datetime.timedelta(days=1)


class Authority:
    """Writes `NODE.crt`, `NODE.key` (0600) and `ca.crt` below a folder."""

    def __init__(self, folder: Path, name: str = "test") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.now = datetime.datetime.now(datetime.UTC)
        self._ca: Issued = make_ca(name, self.now - 3 * DAY, 30 * DAY)
        self.ca = self._write("ca.crt", self._ca.certificate)

    def issue(
        self, node: str, *, also: Sequence[str] = (), is_expired: bool = False, file: str = ""
    ) -> dict[str, str]:
        """The settings with which a node uses its certificate. `file`: another name for the files."""
        begin, length = (self.now - 2 * DAY, DAY) if is_expired else (self.now, DAY)
        issued = make_node(self._ca, node, begin, length, also=also)
        stem = file or node
        return {
            "SNAPD_CLUSTER_CERT": str(self._write(f"{stem}.crt", issued.certificate)),
            "SNAPD_CLUSTER_KEY": str(self._write(f"{stem}.key", issued.key)),
            "SNAPD_CLUSTER_CA": str(self.ca),
        }

    def _write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)
        return path
