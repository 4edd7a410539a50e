"""What Prometheus is told: counts that follow the cache, and no series per job."""

from __future__ import annotations

from otj_operator.metrics import JobLabels, Metrics, labels_of

RUNNING = {"type": "Running", "status": "True", "reason": "Training"}
READY = {"type": "GeneratorReady", "status": "True", "reason": "GeneratorServing"}


def value(metrics: Metrics, line: str) -> float:
    return {
        name: float(number) for name, number in (row.rsplit(" ", 1) for row in metrics.text().decode().splitlines() if row[0] != "#")
    }.get(line, 0.0)


def test_jobs_are_counted_by_phase_reason_and_algorithm_at_the_scrape() -> None:
    metrics, jobs = Metrics(), [JobLabels("Running", "Training", "GRPO")] * 3
    metrics.watch(jobs=lambda: jobs, depth=lambda: 7, ages=lambda: {"pods": 1.5})
    assert value(metrics, 'otj_jobs{algorithm="GRPO",phase="Running",reason="Training"}') == 3
    assert (value(metrics, "otj_queue_depth"), value(metrics, 'otj_watch_age_seconds{kind="pods"}')) == (7, 1.5)
    jobs.clear()
    assert "otj_jobs{" not in metrics.text().decode()


def test_a_jobs_labels_are_what_kubectl_shows() -> None:
    created = {"type": "Created", "status": "True", "reason": "JobCreated"}
    failed = {"type": "Failed", "status": "True", "reason": "OutOfMemory"}
    pending = {"type": "Running", "status": "False", "reason": "PodPending"}
    assert labels_of({}, "GRPO") == JobLabels("New", "", "GRPO")
    assert labels_of({"state": "Pending", "conditions": [created]}, "GRPO").reason == "JobCreated"
    assert labels_of({"state": "Pending", "conditions": [created, pending]}, "GRPO").reason == "PodPending"
    assert labels_of({"state": "Failed", "conditions": [created, pending, failed]}, "GRPO") == JobLabels("Failed", "OutOfMemory", "GRPO")


def test_the_way_to_the_first_step_is_measured_once_per_job() -> None:
    metrics = Metrics()
    starting: dict[str, object] = {"conditions": [RUNNING, READY]}
    training = starting | {"progress": {"step": 1}}
    metrics.written(20.0, {}, starting)
    metrics.written(30.0, starting, training)
    metrics.written(40.0, training, training | {"progress": {"step": 2}})
    metrics.written(90.0, {"restarts": 1}, training | {"restarts": 1, "progress": {"step": 2}} | {"conditions": []})
    assert value(metrics, "otj_pod_ready_seconds_count") == 1
    assert value(metrics, "otj_pod_ready_seconds_sum") == 20
    assert value(metrics, 'otj_first_step_seconds_bucket{le="30.0"}') == 1


def test_requests_are_counted_by_verb_and_code() -> None:
    metrics = Metrics()
    for status in (201, 201, 0):
        metrics.called("create", status)
    assert value(metrics, 'otj_api_calls_total{code="201",verb="create"}') == 2
    assert value(metrics, 'otj_api_calls_total{code="0",verb="create"}') == 1
