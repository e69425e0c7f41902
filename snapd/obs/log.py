"""Structured logs: one JSON object a line, `event` = noun.verb, key names as constants of the caller's
keywords.

No payloads, tokens or secrets are ever logged. A condition that repeats is logged on its first occurrence
only (`once`).
"""

from __future__ import annotations

import io
import json
import logging
import os
from pathlib import Path
from typing import Protocol

Field = str | int | float | bool | None | list[str] | list[int]
_KEYS_REMEMBERED = 4096
LOG_BYTES_MAX = 16 << 20


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


class LogStream(Protocol):
    """What log lines are written to."""

    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...


class BoundedFile(io.TextIOBase):
    """A log file that is put aside as NAME.1 once it has `nbytes_max`; so at most twice that much is kept. The
    runtime folder often lies in memory, and a run of weeks writes a few lines a step.
    """

    def __init__(self, path: Path | str, nbytes_max: int = LOG_BYTES_MAX) -> None:
        super().__init__()
        self._path, self._nbytes_max = Path(path), nbytes_max
        self._open()

    def _open(self) -> None:
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._nbytes = os.fstat(self._file.fileno()).st_size

    def write(self, text: str) -> int:
        if self._nbytes >= self._nbytes_max:
            self._file.close()
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
            self._open()
        self._nbytes += len(text)
        return self._file.write(text)

    def flush(self) -> None:
        if not self.closed:
            self._file.flush()

    def close(self) -> None:
        super().close()  # flushes
        self._file.close()


def configure_logging(stream: LogStream, level: str) -> EventLog:
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
