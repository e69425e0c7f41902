"""Write the table of metrics in docs/metrics-and-log.md from the metrics themselves; the text around it stays."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from snapd.obs.collect_metrics import CollectMetrics  # noqa: E402
from snapd.obs.disk_metrics import DiskMetrics  # noqa: E402
from snapd.obs.metrics import Metrics  # noqa: E402
from snapd.obs.protection_metrics import ProtectionMetrics  # noqa: E402
from snapd.obs.tier_metrics import TierMetrics  # noqa: E402

PAGE = ROOT / "docs" / "metrics-and-log.md"
HEAD = "| metric | labels | what |\n| --- | --- | --- |\n"


def every_metric() -> CollectorRegistry:
    """A registry with all that a daemon with a cluster and a tier has."""
    registry = Metrics().registry
    for more in (ProtectionMetrics, TierMetrics, DiskMetrics, CollectMetrics):
        more(registry)
    return registry


def row(metric: Metric, labels: tuple[str, ...]) -> str:
    """Its line in the table, by the name under which it is served."""
    name = f"{metric.name}_total" if metric.type == "counter" else metric.name
    kind = " (histogram)" if metric.type == "histogram" else ""
    return f"| `{name}` | {', '.join(labels)} | {metric.documentation}{kind} |"


def rows() -> list[str]:
    """All lines, by name. The library says only privately which labels a metric has."""
    registry = every_metric()
    found: list[str] = []
    for collector in registry._collector_to_names:
        labels = tuple(getattr(collector, "_labelnames", ()))
        found.extend(row(metric, labels) for metric in collector.describe())
    return sorted(found)


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    table = HEAD + "\n".join(rows())
    text = re.sub(
        r"<!-- metrics -->\n.*?<!-- end -->", f"<!-- metrics -->\n{table}\n<!-- end -->", text, flags=re.S
    )
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
