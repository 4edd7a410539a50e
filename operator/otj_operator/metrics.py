"""What Prometheus is told. Nothing is labelled by job: a thousand jobs must not make a thousand series.

    queue, workers, API calls  --count as they go-->  Metrics  <--/metrics, each scrape--  Prometheus
    jobs, queue depth, watch age  --asked at each scrape--^

Jobs are counted at the scrape, from the cache: a number that is only ever set cannot drift from what is there.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0, generate_latest
from prometheus_client.registry import Collector

from otj_runtime.api import ConditionType

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 30)
LONG = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 4 * 3600, 24 * 3600)


class JobLabels(NamedTuple):
    """What jobs are counted by."""

    phase: str
    reason: str
    algorithm: str


class Metrics:
    """All metrics of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.reconcile_seconds = Histogram(
            "otj_reconcile_seconds", "Duration of one pass over one job.", ["outcome"], buckets=SHORT, registry=self.registry
        )
        self._calls = Counter(
            "otj_api_calls_total", "Requests to the API server; code 0: it did not answer.", ["verb", "code"], registry=self.registry
        )
        self.watch_events = Counter("otj_watch_events_total", "Changes that watches told of.", ["kind"], registry=self.registry)
        self.events_dropped = Counter(
            "otj_events_dropped_total", "Events that were not posted, because too many wait.", registry=self.registry
        )
        self.pulls = Counter("otj_progress_pulls_total", "Questions to launchers.", ["outcome"], registry=self.registry)
        self.until_job = self._since_creation("otj_job_created_seconds", "Age of an OnlineTrainingJob when its Job was created.")
        self.until_ready = self._since_creation(
            "otj_pod_ready_seconds", "Age of an OnlineTrainingJob when generator and trainer first ran."
        )
        self.until_first_step = self._since_creation("otj_first_step_seconds", "Age of an OnlineTrainingJob when its first step was made.")

    def called(self, verb: str, status: int) -> None:
        """A request was answered with `status`; 0: it was not."""
        self._calls.labels(verb, str(status)).inc()

    def written(self, age: float, before: dict[str, Any], after: dict[str, Any]) -> None:
        """The status of a job of `age` seconds went from `before` to `after`."""
        if _ready(after) and not _ready(before) and not after.get("restarts"):
            self.until_ready.observe(age)
        if _step(after) and not _step(before):
            self.until_first_step.observe(age)

    def watch(self, *, jobs: Callable[[], Iterable[JobLabels]], depth: Callable[[], int], ages: Callable[[], dict[str, float]]) -> None:
        """Ask these at each scrape: the jobs there are, keys in the queue, seconds since the last word of each watch."""
        self.registry.register(_Present(jobs, depth, ages))

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    def _since_creation(self, name: str, text: str) -> Histogram:
        # The API server writes creation times in whole seconds, cut off: these ages are up to a second too long.
        return Histogram(name, text, buckets=LONG, registry=self.registry)


def labels_of(status: dict[str, Any], algorithm: str) -> JobLabels:
    """What the job with `status` is counted by."""
    reasons = {c["type"]: c["reason"] for c in status.get("conditions", []) if c["status"] == "True" or c["type"] in _TELLING}
    reason = next((reasons[kind] for kind in (ConditionType.FAILED, ConditionType.SUCCEEDED, *_TELLING) if kind in reasons), "")
    return JobLabels(phase=status.get("state") or "New", reason=reason, algorithm=algorithm)


def _ready(status: dict[str, Any]) -> bool:
    true = {c["type"] for c in status.get("conditions", []) if c["status"] == "True"}
    return {ConditionType.GENERATOR_READY, ConditionType.RUNNING} <= true


def _step(status: dict[str, Any]) -> int:
    return int((status.get("progress") or {}).get("step") or 0)


_TELLING = (ConditionType.RUNNING, ConditionType.CREATED)

CONTENT_TYPE = CONTENT_TYPE_PLAIN_1_0_0


class _Present(Collector):
    """Gauges that are read when they are asked for."""

    def __init__(self, jobs: Callable[[], Iterable[JobLabels]], depth: Callable[[], int], ages: Callable[[], dict[str, float]]) -> None:
        self._jobs, self._depth, self._ages = jobs, depth, ages

    def collect(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("otj_jobs", "OnlineTrainingJobs by what `kubectl get` says of them.", labels=JobLabels._fields)
        for labels, count in Tally(self._jobs()).items():
            jobs.add_metric(list(labels), count)
        yield jobs
        depth = GaugeMetricFamily("otj_queue_depth", "Jobs that wait for a pass.")
        depth.add_metric([], self._depth())
        yield depth
        ages = GaugeMetricFamily("otj_watch_age_seconds", "Time since a watch last told of a change.", labels=["kind"])
        for kind, age in self._ages().items():
            ages.add_metric([kind], age)
        yield ages
