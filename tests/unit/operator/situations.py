"""Everything that a decision may be made from, for hypothesis: any mixture of what can be seen, upon a status that earlier decisions left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from otj_operator.plan import (
    Ask,
    Create,
    JobView,
    Look,
    Observed,
    Patch,
    PodView,
    Refusal,
    RefusalKind,
    Settle,
    Target,
    Told,
    WorkloadView,
    plan,
)
from otj_operator.plan.parent import Limits
from otj_runtime.pod.names import MANAGED_BY, SUSPENDED_BY_ANNOTATION
from tests.unit.operator.objects import IMAGE, at, ended, job, parent, pod, report, running, told, training_pod, waiting, workload

Object = dict[str, Any]

QUEUE = "team-a"
ENDS = [None, None, None, ("Complete", "CompletionsReached"), ("Failed", "BackoffLimitExceeded"), ("Failed", "PodFailurePolicy")]
LIMITS: list[Object] = [{}, {"backoffLimit": 5}, {"activeDeadlineSeconds": 60}, {"ttlSecondsAfterFinished": 9}]
QUOTAS = [None, ("False", "WaitingForQuota", "8 GPUs are missing"), ("True", "QuotaReserved", "in cluster queue a")]
EVICTIONS = [None, ("Preempted", "for a more important job"), ("DeactivatedDueToMaximumExecutionTimeExceeded", "too long")]


def _jobs() -> st.SearchStrategy[JobView]:
    ours = st.builds(
        job,
        suspend=st.booleans(),
        marked=st.booleans(),
        queue=st.sampled_from(["", "", QUEUE]),
        labelled=st.sampled_from([True, True, False]),
        parallelism=st.sampled_from([1, 1, 0, 2]),
        limits=st.sampled_from(LIMITS),
        deleting=st.sampled_from([False, False, True]),
        owner=st.sampled_from(["parent-1", "parent-1", "parent-1", None]),
        end=st.sampled_from([*ENDS, ("FailureTarget", "DeadlineExceeded")]),
        active=st.integers(0, 1),
        failed=st.integers(0, 3),
    )
    foreign = st.builds(job, uid=st.just("foreign"), owner=st.sampled_from(["cron-1", None, "parent-0"]), owner_kind=st.just("CronJob"))
    namesakes = st.just(job(uid="earlier", owner="parent-0"))
    return st.one_of(ours, ours, ours, foreign, namesakes)


def _pods() -> st.SearchStrategy[tuple[PodView, ...]]:
    def one(name: str) -> st.SearchStrategy[PodView]:
        created = f"2026-01-01T12:00:{name[-1]}0Z"
        seen: list[PodView] = [
            pod(name=name, created=created, phase="Pending"),
            pod(name=name, created=created, phase="Pending", unschedulable="0/3 nodes are available"),
            pod(name=name, created=created, phase="Pending", model=waiting("ImagePullBackOff", "not found")),
            pod(name=name, created=created, phase="Pending", model=waiting("PodInitializing")),
            training_pod(name=name, created=created),
            training_pod(name=name, created=created, generator=running() | {"restartCount": 1}),
            training_pod(name=name, created=created, deleting=True),
            training_pod(name=name, created=created, deleting=True, due="2026-01-01T11:00:00Z"),
            training_pod(name=name, created=created, phase="Failed", trainer=ended(83)),
            training_pod(name=name, created=created, phase="Failed", trainer=ended(66)),
            training_pod(name=name, created=created, phase="Succeeded", trainer=ended(0)),
            training_pod(name=name, created=created, job_uid="earlier"),
        ]
        return st.sampled_from(seen)

    return st.one_of(st.just(()), st.tuples(one("run-1")), st.tuples(one("run-1")), st.tuples(one("run-1"), one("run-2")))


def _tolds() -> st.SearchStrategy[Told | None]:
    warned = st.builds(
        told,
        st.sampled_from(["FailedMount", "FailedCreate", ""]),
        st.sampled_from(["no volume", ""]),
        uid=st.sampled_from(["job-1", "uid-run-1"]),
    )
    return st.one_of(st.none(), warned)


def _workloads() -> st.SearchStrategy[WorkloadView | None]:
    kept = st.builds(
        workload, active=st.booleans(), marked=st.booleans(), quota=st.sampled_from(QUOTAS), evicted=st.sampled_from(EVICTIONS)
    )
    return st.one_of(st.none(), st.none(), kept)


def _refusals() -> st.SearchStrategy[Refusal | None]:
    return st.one_of(st.none(), st.none(), st.none(), st.builds(Refusal, kind=st.sampled_from(RefusalKind), message=st.just("no")))


def _parents() -> st.SearchStrategy[Object]:
    return st.fixed_dictionaries(
        {
            "suspend": st.booleans(),
            "queue": st.sampled_from(["", "", QUEUE]),
            "claim": st.sampled_from(["", "results"]),
            "deleting": st.sampled_from([False, False, False, True]),
            "generation": st.integers(1, 3),
        },
        optional={
            "backoffLimit": st.integers(0, 9),
            "activeDeadlineSeconds": st.integers(1, 99),
            "managedBy": st.sampled_from(["onlinetraining.dev/operator", "example.com/other"]),
            "gpus": st.sampled_from([1, 4]),
        },
    )


@st.composite
def _seen(draw: st.DrawFn, status: Object) -> Observed:
    """One view of the world upon `status`."""
    made = draw(st.one_of(st.none(), _jobs(), _jobs(), _jobs()))
    ours = made is not None and made.uid == "job-1"
    return Observed(
        parent=parent(status=status, **draw(_parents())),
        job=made,
        bereft=draw(st.booleans()),
        absence_confirmed=made is None and draw(st.booleans()),
        pods=draw(_pods()),
        report=draw(
            st.one_of(st.none(), st.builds(report, st.sampled_from([None, 1, 12, 150]), phase=st.sampled_from(["starting", "training"])))
        ),
        silent_since=draw(st.sampled_from([None, None, at(-90)])),
        refusal=draw(_refusals()),
        workload=draw(_workloads()) if ours else None,
        told=draw(_tolds()),
        written_at=draw(st.one_of(st.none(), st.integers(-20, 10).map(at))),
    )


@st.composite
def situations(draw: st.DrawFn) -> Observed:
    """What the operator may see, with a status that up to three earlier views led to."""
    status: Object = {}
    for _ in range(draw(st.integers(0, 3))):
        decided = decide(draw(_seen(status)))
        if decided.status is not None and not _is_over(decided.status):
            status = decided.status
    return draw(_seen(status))


def decide(seen: Observed, *, seconds: float = 10) -> Settle:
    """The settlement that `plan` reaches when everybody does what it asks."""
    return walk(seen, seconds=seconds)[-1][1]  # type: ignore[return-value]


def walk(seen: Observed, *, seconds: float = 10) -> list[tuple[Observed, Any]]:
    """Every step of a pass and what it was decided from; the API server grants all."""
    steps: list[tuple[Observed, Any]] = []
    for _ in range(9):
        step = plan(seen, now=at(seconds), image=IMAGE)
        steps.append((seen, step))
        match step:
            case Settle():
                return steps
            case Create():
                marked = bool(step.job["metadata"].get("annotations"))
                queue = seen.parent.queue
                limits = Limits.of(step.job["spec"]).to_wire()
                seen = replace(seen, job=job(suspend=step.job["spec"]["suspend"], marked=marked, queue=queue, limits=limits))
            case Look():
                seen = replace(seen, absence_confirmed=True)
            case Ask(uid):
                seen = replace(seen, told=told("FailedMount", "no volume", uid=uid, seconds=seconds))
            case Patch():
                seen = patched(seen, step)
    raise AssertionError(f"no end after {[step for _, step in steps]}")


def patched(seen: Observed, step: Patch) -> Observed:
    """The view after the API server has merged the patch."""
    body = step.body
    annotations = body["metadata"].get("annotations", {})
    if step.target is Target.WORKLOAD:
        assert seen.workload is not None
        mark = annotations[SUSPENDED_BY_ANNOTATION] == MANAGED_BY
        return replace(seen, workload=replace(seen.workload, active=body["spec"]["active"], paused_by_us=mark))
    assert seen.job is not None
    found = seen.job
    spec = found.limits.to_wire() | body.get("spec", {})
    if SUSPENDED_BY_ANNOTATION in annotations:
        found = replace(found, suspended_by_us=annotations[SUSPENDED_BY_ANNOTATION] == MANAGED_BY)
    if "ownerReferences" in body["metadata"]:
        found = replace(found, owner=job().owner)
    labelled = found.labelled or "labels" in body["metadata"]
    suspended, parallelism = spec.get("suspend", found.suspended), spec.get("parallelism", found.parallelism)
    return replace(seen, job=replace(found, limits=Limits.of(spec), suspended=suspended, parallelism=parallelism, labelled=labelled))


def _is_over(status: Object) -> bool:
    return any(c["type"] in ("Succeeded", "Failed") for c in status["conditions"])
