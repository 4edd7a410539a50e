"""Pausing, changing and explaining, one case each: what the operator patches, asks, and says of a run that does not move."""

from __future__ import annotations

from typing import Any

import pytest

from otj_operator.plan import Ask, Create, Observed, Patch, Refusal, RefusalKind, Settle, Target, plan
from otj_runtime.pod.manifest import job_labels
from otj_runtime.pod.names import MANAGED_BY, SUSPENDED_BY_ANNOTATION
from tests.unit.operator.objects import IMAGE, at, ended, job, parent, pod, report, running, told, training_pod, waiting, workload

Object = dict[str, Any]

QUEUED: Object = {"job": job(suspend=True, queue="q")}
OURS = {SUSPENDED_BY_ANNOTATION: MANAGED_BY}
NOT_OURS = {SUSPENDED_BY_ANNOTATION: None}


def settled(seen: Observed, *, seconds: float = 0) -> Object:
    step = plan(seen, now=at(seconds), image=IMAGE)
    assert isinstance(step, Settle)
    assert step.status is not None
    return step.status


def said(status: Object, kind: str) -> tuple[str, str, str]:
    found = next(c for c in status["conditions"] if c["type"] == kind)
    return found["status"], found["reason"], found["message"]


@pytest.mark.parametrize(
    ("wish", "found", "metadata", "spec"),
    [
        ({"suspend": True}, {}, {"annotations": OURS}, {"suspend": True}),
        ({}, {"suspend": True, "marked": True}, {"annotations": NOT_OURS}, {"suspend": False}),
        ({"backoffLimit": 9}, {}, {}, {"backoffLimit": 9}),
        ({"activeDeadlineSeconds": 60}, {}, {}, {"activeDeadlineSeconds": 60}),
        ({}, {"limits": {"ttlSecondsAfterFinished": 5}}, {}, {"ttlSecondsAfterFinished": None}),
        ({}, {"labelled": False}, {"labels": job_labels("run")}, {}),
        ({}, {"parallelism": 0}, {}, {"parallelism": 1}),
    ],
    ids=["pause", "resume", "retries", "deadline", "no time to live", "labels", "scaled to no pod"],
)
def test_a_job_that_is_not_as_the_spec_says_is_patched(wish: Object, found: Object, metadata: Object, spec: Object) -> None:
    step = plan(Observed(parent=parent(**wish), job=job(**found)), now=at(0), image=IMAGE)
    body = {"metadata": metadata | {"resourceVersion": "1"}} | ({"spec": spec} if spec else {})
    assert step == Patch(target=Target.JOB, name="run", body=body)


@pytest.mark.parametrize(
    ("wish", "found", "kept"),
    [
        ({}, {"suspend": True}, None),
        ({"suspend": True, "queue": "q"}, {"queue": "q"}, None),
        ({"queue": "q"}, {"queue": "q", "suspend": True, "marked": True}, None),
        ({}, {"suspend": True, "marked": True}, workload()),
    ],
    ids=["somebody else suspended it", "a pause in a queue", "a resume in a queue", "a queue without a name"],
)
def test_a_job_that_is_not_ours_to_start_or_stop_is_left_as_it_is(wish: Object, found: Object, kept: Any) -> None:
    step = plan(Observed(parent=parent(**wish), job=job(**found), workload=kept), now=at(0), image=IMAGE)
    assert isinstance(step, Settle)


def test_a_job_whose_owner_was_cut_off_is_known_again_and_gets_it_back() -> None:
    status = settled(Observed(parent=parent(), job=job()))
    assert status["jobUid"] == "job-1"
    step = plan(Observed(parent=parent(status=status), job=job(owner=None)), now=at(0), image=IMAGE)
    assert isinstance(step, Patch)
    assert step.body["metadata"]["ownerReferences"][0]["uid"] == "parent-1"


@pytest.mark.parametrize(
    ("paused", "kept", "body"),
    [
        (True, workload(), {"metadata": {"annotations": OURS, "resourceVersion": "1"}, "spec": {"active": False}}),
        (
            False,
            workload(active=False, marked=True),
            {"metadata": {"annotations": NOT_OURS, "resourceVersion": "1"}, "spec": {"active": True}},
        ),
        (False, workload(active=False), None),
        (True, workload(active=False), None),
    ],
    ids=["pause", "resume", "somebody else's deactivation", "paused already"],
)
def test_under_kueue_a_pause_goes_through_the_workload(paused: bool, kept: Any, body: Object | None) -> None:
    seen = Observed(parent=parent(suspend=paused, queue="q"), job=job(queue="q", suspend=True), workload=kept)
    step = plan(seen, now=at(0), image=IMAGE)
    if body is None:
        assert isinstance(step, Settle)
    else:
        assert step == Patch(target=Target.WORKLOAD, name="job-run-1a2b3", body=body)


def test_a_change_that_the_api_server_refuses_is_said_and_tried_again() -> None:
    refusal = Refusal(kind=RefusalKind.FORBIDDEN, message="jobs is forbidden")
    step = plan(Observed(parent=parent(suspend=True), job=job(), refusal=refusal), now=at(0), image=IMAGE)
    assert isinstance(step, Settle)
    assert step.status is not None
    assert said(step.status, "Created") == ("True", "JobNotAdjusted", "jobs is forbidden")
    assert step.again_after == 30


def test_a_run_made_paused_gets_its_job_at_once_but_in_a_queue_only_when_it_may_run() -> None:
    assert isinstance(plan(Observed(parent=parent(suspend=True)), now=at(0), image=IMAGE), Create)
    status = settled(Observed(parent=parent(suspend=True, queue="q")))
    assert said(status, "Suspended")[:2] == ("True", "JobSuspended")
    assert status["state"] == "Suspended"
    assert isinstance(plan(Observed(parent=parent(status=status, queue="q")), now=at(0), image=IMAGE), Create)


@pytest.mark.parametrize(
    ("seen", "reason", "words"),
    [
        (
            QUEUED | {"workload": workload(quota=("False", "Pending", "8 GPUs are missing"))},
            "WaitingForQueue",
            "in the queue q: 8",
        ),
        (
            QUEUED | {"workload": workload(evicted=("Preempted", "for x"))},
            "WaitingForQueue",
            "again in the queue q (Preempted): for x",
        ),
        (
            QUEUED | {"workload": workload(active=False)},
            "QueueDeactivated",
            "kubectl patch workload job-run-1a2b3",
        ),
        (
            {"pods": (pod(phase="Pending", unschedulable="0/3 nodes: Insufficient nvidia.com/gpu"),)},
            "Unschedulable",
            "Insufficient nvidia.com/gpu",
        ),
        ({"pods": (pod(phase="Pending", unschedulable='persistentvolumeclaim "x" not found'),)}, "VolumeNotReady", '"x" not found'),
        (
            {"pods": (pod(phase="Pending", model=waiting("ErrImagePull", "no such tag")),)},
            "ImagePullFailed",
            "model: ErrImagePull: no such tag",
        ),
        ({"pods": (pod(phase="Pending", model=waiting("CreateContainerConfigError", "secret")),)}, "ContainerRefused", "secret"),
        (
            {"pods": (pod(phase="Failed", reason="UnexpectedAdmissionError", message="no GPU"),)},
            "DevicePluginRejected",
            "no GPU",
        ),
        ({"job": job(active=1)}, "PodPending", "or somebody took its labels, which `kubectl label pods -n default"),
        ({"told": told("FailedCreate", "exceeded quota: a", uid="job-1")}, "PodRefused", "refuses to make the pod: exceeded quota: a"),
        (
            {"pods": (pod(phase="Pending", model=waiting("PodInitializing")),), "told": told("FailedMount", "timed out", uid="uid-run-1")},
            "VolumeNotReady",
            "FailedMount: timed out",
        ),
        ({"pods": (training_pod(generator=running()),)}, "GeneratorStarting", "vLLM is starting."),
        ({"pods": (training_pod(phase="Failed", trainer=ended(69)),)}, "WorldSizeMismatch", "exit code 69"),
        ({"pods": (training_pod(phase="Failed", trainer=ended(84)),)}, "Stalled", "exit code 84"),
        ({"pods": (training_pod(deleting=True, due="2026-01-01T11:00:00Z"),)}, "NodeLost", "its node does not answer"),
        ({"pods": (training_pod(),)}, "Starting", "launcher has not answered"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_move_says_why_in_one_sentence(seen: Object, reason: str, words: str) -> None:
    status = settled(Observed(**({"parent": parent(queue="q") if "workload" in seen else parent(), "job": job()} | seen)))
    state, found, message = said(status, "Progressing")
    assert (state, found) == ("False", reason)
    assert words in message
    assert status["message"] == message


def test_a_late_step_is_told_in_the_launchers_words() -> None:
    late = report(12, overdue="Step 13 of 150 is overdue.")
    status = settled(Observed(parent=parent(), job=job(), pods=(training_pod(),), report=late))
    assert said(status, "Progressing") == ("False", "StepOverdue", "Step 13 of 150 is overdue.")
    assert said(status, "Running")[0] == "True"


def test_events_are_asked_for_after_a_while_and_ever_more_seldom() -> None:
    status = settled(Observed(parent=parent(), job=job()))
    seen = Observed(parent=parent(status=status), job=job())
    early = plan(seen, now=at(3), image=IMAGE)
    assert isinstance(early, Settle)
    assert early.again_after == 7
    assert plan(seen, now=at(11), image=IMAGE) == Ask("job-1")
    answered = Observed(parent=parent(status=status), job=job(), told=told("", "", uid="job-1", seconds=11))
    again = plan(answered, now=at(12), image=IMAGE)
    assert isinstance(again, Settle)
    assert again.again_after == 29
    hours = plan(Observed(parent=parent(status=status), job=job(), told=told("", "", uid="job-1", seconds=7200)), now=at(7201), image=IMAGE)
    assert isinstance(hours, Settle)
    assert hours.again_after is not None
    assert hours.again_after > 1700


@pytest.mark.parametrize(
    ("claim", "step", "saved", "expected"),
    [
        ("", 100, 100, ("False", "OutputNotKept")),
        ("results", 20, None, ("False", "NoCheckpointYet")),
        ("results", 120, 50, ("True", "CheckpointSaved")),
        ("results", 151, 50, ("False", "CheckpointLate")),
        ("results", 150, None, ("False", "CheckpointLate")),
    ],
)
def test_a_checkpoint_is_fresh_if_it_is_young_and_kept(claim: str, step: int, saved: int | None, expected: tuple[str, str]) -> None:
    found = report(step, checkpoint_step=saved)
    status = settled(Observed(parent=parent(claim=claim), job=job(), pods=(training_pod(),), report=found))
    assert said(status, "CheckpointFresh")[:2] == expected


@pytest.mark.parametrize(
    ("version", "ready", "expected"),
    [
        (None, True, ("False", "NoSyncYet")),
        (11, True, ("True", "WeightsProven")),
        (7, True, ("False", "WeightsBehind")),
        (11, False, ("False", "GeneratorStarting")),
    ],
)
def test_the_weights_are_in_sync_if_the_generator_has_young_ones(version: int | None, ready: bool, expected: tuple[str, str]) -> None:
    found = report(12, policy_version=version)
    pods = (training_pod(generator=running(ready=ready)),)
    status = settled(Observed(parent=parent(), job=job(), pods=pods, report=found))
    assert said(status, "WeightsInSync")[:2] == expected


def test_a_resume_is_no_restart_but_a_drained_pod_is_an_uncounted_one() -> None:
    first = settled(Observed(parent=parent(), job=job(active=1), pods=(training_pod(name="run-1"),)))
    paused = settled(Observed(parent=parent(status=first, suspend=True), job=job(suspend=True, marked=True)))
    second = training_pod(name="run-2", created="2026-01-01T12:05:00Z")
    resumed = settled(Observed(parent=parent(status=paused), job=job(active=1), pods=(second,)))
    assert (resumed["restarts"], resumed["restartsCounted"], resumed["podName"]) == (0, 0, "run-2")
    third = training_pod(name="run-3", created="2026-01-01T12:09:00Z")
    drained = settled(Observed(parent=parent(status=resumed), job=job(active=1), pods=(second, third)))
    assert (drained["restarts"], drained["restartsCounted"]) == (1, 0)


def test_an_end_is_told_in_one_event_although_the_job_takes_two_steps_to_it() -> None:
    training = settled(Observed(parent=parent(), job=job(active=1), pods=(training_pod(),), report=report(12)))
    failed_pod = training_pod(phase="Failed", trainer=ended(67))
    told_of = []
    for found in (job(end=("FailureTarget", "PodFailurePolicy")), job(end=("Failed", "PodFailurePolicy"), failed=1)):
        step = plan(Observed(parent=parent(status=training), job=found, pods=(failed_pod,)), now=at(60), image=IMAGE)
        assert isinstance(step, Settle)
        assert step.status is not None
        training = step.status
        told_of += [event.reason for event in step.events]
    assert told_of == ["RewardImportFailed"]
