"""Log lines: JSON objects for machines that collect them, plain text for people. `extra={"job": key}` says which job a line is about."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

from otj_runtime.api import API_VERSION, KIND


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and a reference to the object if the line is about one."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if job := getattr(record, "job", None):
            line["object"] = {"apiVersion": API_VERSION, "kind": KIND, "namespace": job.namespace, "name": job.name}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """`time level job message`."""

    def format(self, record: logging.LogRecord) -> str:
        job = getattr(record, "job", None)
        text = f"{datetime.fromtimestamp(record.created):%H:%M:%S} {record.levelname.lower():7} {f'{job} ' if job else ''}{record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def configure(*, json_lines: bool, verbose: bool) -> None:
    """Send every log line to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if json_lines else TextFormatter())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
