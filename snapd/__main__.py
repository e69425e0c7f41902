"""`python -m snapd`."""

from __future__ import annotations

from snapd.cli.main import main

if __name__ == "__main__":
    main()
