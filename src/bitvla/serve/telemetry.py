"""What can be seen of a running server: metrics for Prometheus, and one log line an event."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_LOG = logging.getLogger("bitvla.serve")
_MILLISECONDS = (1, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500, 750, 1000, 2000, 5000, 10_000)
_LONGEST = 500  # characters of one value in a log line: some come from a stranger


class Metrics:
    """The figures of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ready = Gauge("bitvla_ready", "1 when the policy is loaded and warm", registry=self.registry)
        self.sessions = Gauge("bitvla_sessions", "robots connected now", registry=self.registry)
        self.requests = Counter(
            "bitvla_requests",
            "requests by outcome: answered, refused (the client's fault), unavailable, failed (a fault here)",
            ["outcome"],
            registry=self.registry,
        )
        self.superseded = Counter(
            "bitvla_superseded", "observations that a newer one of the same robot replaced", registry=self.registry
        )
        self.reloads = Counter(
            "bitvla_reloads", "reloads by outcome: done, refused", ["outcome"], registry=self.registry
        )
        self.wait = self._seconds("bitvla_wait_seconds", "from an observation's arrival to the start of its inference")
        self.inference = self._seconds("bitvla_inference_seconds", "one call of the policy")
        self.batch = Histogram(
            "bitvla_batch",
            "observations that one call of the policy answered",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)

    def totals(self) -> dict[str, int]:
        """Requests by outcome."""
        samples = [sample for metric in self.requests.collect() for sample in metric.samples]
        return {sample.labels["outcome"]: int(sample.value) for sample in samples if sample.name.endswith("_total")}

    def _seconds(self, name: str, documentation: str) -> Histogram:
        buckets = [milliseconds / 1e3 for milliseconds in _MILLISECONDS]
        return Histogram(name, documentation, buckets=buckets, registry=self.registry)


def log(level: int, event: str, *, exc_info: bool = False, **fields: Any) -> None:
    """Log `event` with its fields. Nothing is formatted unless the level is wanted."""
    _LOG.log(level, event, exc_info=exc_info, extra={"fields": fields})


def start_logging(level: int = logging.INFO) -> None:
    """Write every event to standard error: one JSON document a line, or short text where a person reads along."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Text() if sys.stderr.isatty() else _Json())
    _LOG.handlers[:] = [handler]
    _LOG.setLevel(level)
    _LOG.propagate = False


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = {
        name: value[:_LONGEST] if isinstance(value, str) else value
        for name, value in getattr(record, "fields", {}).items()
    }
    if record.exc_info:
        fields["traceback"] = logging.Formatter().formatException(record.exc_info)
    return fields


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        head = {"time": round(record.created, 3), "level": record.levelname.lower(), "event": record.getMessage()}
        return json.dumps(head | _fields(record), default=str)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # JSON strings, so that no value can break the line or move the cursor.
        values = " ".join(f"{name}={json.dumps(value, default=str)}" for name, value in _fields(record).items())
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        return f"{at} {record.levelname.lower():<7} {record.getMessage()}  {values}"
