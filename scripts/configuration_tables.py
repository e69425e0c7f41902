"""Write the tables of settings in docs/configuration.md from the settings themselves; the texts around them stay."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from snapd.config import env_name, explain, load  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
HEAD = "| setting | variable | default | bound | what it trades |\n| --- | --- | --- | --- | --- |\n"


def tables() -> dict[str, str]:
    """Section -> its table."""
    rows: dict[str, list[str]] = defaultdict(list)
    for row in explain(load(environ={})):
        section = row.path.partition(".")[0]
        bound = row.bound.replace(" | ", ", ")
        rows[section].append(
            f"| `{row.path}` | `{env_name(row.path)}` | {row.default or 'empty'} | {bound} | {row.doc} |\n"
        )
    return {section: HEAD + "".join(lines) for section, lines in rows.items() if section != "fault"}


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    for section, table in tables().items():
        pattern = rf"(### {section}\n(?:(?!###|\|).*\n)*?)(?:\|.*\n)+"
        if re.search(pattern, text):
            text = re.sub(pattern, lambda found, table=table: found.group(1) + table, text, count=1)
        else:
            text = text.replace("\n## The trainer", f"\n### {section}\n\n{table}\n## The trainer", 1)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
