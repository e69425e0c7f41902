"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
RuntimeDirOption = Annotated[
    Path | None,
    typer.Option(
        "--runtime-dir",
        help="Folder of the daemon's sockets. Default: SNAPD_RUNTIME_DIR, else $XDG_RUNTIME_DIR/snapd-train, "
        "else /tmp/snapd-train-UID.",
        show_default=False,
    ),
]
StepOption = Annotated[int | None, typer.Option("--step", min=0, help="This step.", show_default=False)]
GenerationOption = Annotated[
    int | None,
    typer.Option("--generation", min=0, help="This generation. Default: the newest.", show_default=False),
]
