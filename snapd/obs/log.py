"""Structured logs: one JSON object a line, `event` = noun.verb, key names as constants of the caller's
keywords.

No payloads, tokens or secrets are ever logged. A condition that repeats is logged on its first occurrence
only (`once`).
"""

from __future__ import annotations

import json
import logging
from typing import TextIO

Field = str | int | float | bool | None | list[str] | list[int]
_KEYS_REMEMBERED = 4096


class JsonFormatter(logging.Formatter):
    """Lines such as {"time": 1760000000.123, "level": "info", "event": "shard.captured", "job": ...}."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Field] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            line.update(fields)
        else:
            line["logger"] = record.name
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class EventLog:
    """Writes events of the daemon to its logger."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._seen: set[str] = set()

    def info(self, event: str, **fields: Field) -> None:
        self._logger.info(event, extra={"fields": fields})

    def warning(self, event: str, **fields: Field) -> None:
        self._logger.warning(event, extra={"fields": fields})

    def debug(self, event: str, **fields: Field) -> None:
        self._logger.debug(event, extra={"fields": fields})

    def error(self, event: str, *, exception: BaseException | None = None, **fields: Field) -> None:
        self._logger.error(event, extra={"fields": fields}, exc_info=exception)

    def once(self, key: str, event: str, **fields: Field) -> None:
        """Warn the first time that `key` comes; later ones are silent."""
        if key in self._seen or len(self._seen) >= _KEYS_REMEMBERED:
            return
        self._seen.add(key)
        self.warning(event, **fields)


def configure_logging(stream: TextIO, level: str) -> EventLog:
    """Send snapd's events and other libraries' warnings to `stream`; called once, by the daemon."""
    root = logging.getLogger()
    root.handlers.clear()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logger = logging.getLogger("snapd")
    logger.setLevel(level.upper())
    return EventLog(logger)
