"""Decisions, one by one: what is seen of a job and what follows from it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from otj_operator.plan import Create, Look, Observed, Refusal, RefusalKind, Settle, plan
from tests.unit.operator.objects import (
    IMAGE,
    NOW,
    at,
    ended,
    job,
    parent,
    pod,
    report,
    running,
    training_pod,
    waiting,
)

Object = dict[str, Any]


def settle(observed: Observed, *, seconds: float = 0) -> Settle:
    step = plan(observed, now=at(seconds), image=IMAGE)
    assert isinstance(step, Settle)
    return step


def status(observed: Observed, *, seconds: float = 0) -> Object:
    found = settle(observed, seconds=seconds).status
    assert found is not None
    return found


def condition(status: Object, kind: str) -> tuple[str, str]:
    found = next(c for c in status["conditions"] if c["type"] == kind)
    return found["status"], found["reason"]


def message(status: Object, kind: str) -> str:
    return str(next(c["message"] for c in status["conditions"] if c["type"] == kind))


def types(status: Object) -> list[str]:
    return [c["type"] for c in status["conditions"]]


CREATED = status(Observed(parent=parent(), job=job()))
TRAINING = status(Observed(parent=parent(status=CREATED), job=job(active=1), pods=(training_pod(),), report=report(12)), seconds=60)


def test_a_new_job_gets_its_job_with_an_owner() -> None:
    step = plan(Observed(parent=parent()), now=NOW, image=IMAGE)
    assert isinstance(step, Create)
    assert step.job["metadata"]["name"] == "run"
    assert step.job["metadata"]["ownerReferences"][0]["uid"] == "parent-1"
    assert step.job["spec"]["template"]["spec"]["containers"][0]["image"] == IMAGE


def test_a_created_job_is_pending() -> None:
    assert condition(CREATED, "Created") == ("True", "JobCreated")
    assert condition(CREATED, "Running") == ("False", "PodPending")
    assert (CREATED["state"], CREATED["jobName"]) == ("Pending", "run")


def test_a_spec_that_does_not_parse_fails_with_its_fault() -> None:
    failed = status(Observed(parent=parent(gpus=1)))
    assert condition(failed, "Failed") == ("True", "InvalidSpec")
    assert "gpus: 1 is too few, it needs at least 2" in message(failed, "Failed")


def test_a_job_that_is_deleted_before_anything_happened_is_left_alone() -> None:
    assert settle(Observed(parent=parent(deleting=True))) == Settle()


def test_a_job_that_is_being_deleted_does_not_read_running() -> None:
    seen = Observed(parent=parent(deleting=True, status=TRAINING), job=job(active=1), pods=(training_pod(),), report=report(13))
    found = status(seen, seconds=100)
    assert (found["state"], condition(found, "Running")) == ("Deleting", ("False", "Deleting"))
    assert settle(replace(seen, parent=parent(deleting=True, status=found)), seconds=200) == Settle()


@pytest.mark.parametrize(
    ("seen", "running_reason", "state"),
    [
        (Observed(parent=parent(), job=job(), pods=()), "PodPending", "Pending"),
        (Observed(parent=parent(suspend=True), job=job(suspend=True, marked=True)), "JobSuspended", "Suspended"),
        (Observed(parent=parent(), job=job(suspend=True)), "SuspendedElsewhere", "Suspended"),
        (Observed(parent=parent(queue="q"), job=job(suspend=True, queue="q")), "WaitingForQueue", "Queued"),
        (Observed(parent=parent(), job=job(), pods=(pod(phase="Pending"),)), "PodPending", "Pending"),
        (Observed(parent=parent(), job=job(), pods=(training_pod(),)), "Starting", "Starting"),
        (Observed(parent=parent(), job=job(), pods=(training_pod(),), report=report(phase="starting")), "Starting", "Starting"),
        (Observed(parent=parent(), job=job(), pods=(training_pod(),), report=report(1)), "Training", "Running"),
        (Observed(parent=parent(), job=job(), pods=(training_pod(deleting=True),)), "Terminated", "Ending"),
        (
            Observed(parent=parent(), job=job(end=("FailureTarget", "DeadlineExceeded")), pods=(training_pod(deleting=True),)),
            "DeadlineExceeded",
            "Ending",
        ),
        (Observed(parent=parent(), job=job(), pods=(training_pod(phase="Succeeded", trainer=ended(0)),)), "Finished", "Ending"),
        (Observed(parent=parent(), job=job(), pods=(training_pod(phase="Failed", trainer=ended(83)),)), "Retrying", "Retrying"),
        (Observed(parent=parent(), job=job(), pods=(training_pod(phase="Failed", trainer=ended(67)),)), "RewardImportFailed", "Ending"),
        (Observed(parent=parent(), job=job(), pods=(pod(phase="Pending", model=ended(65)),)), "ModelNotFound", "Ending"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_pod_does_is_the_state(seen: Observed, running_reason: str, state: str) -> None:
    found = status(seen)
    assert (condition(found, "Running")[1], found["state"]) == (running_reason, state)
    told_by = "Running" if condition(found, "Progressing")[0] == "True" else "Progressing"
    assert found["message"] == message(found, told_by)
    assert {"Created", "GeneratorReady", "Running", "Progressing", "Suspended"} <= set(types(found))


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (pod(phase="Pending", unschedulable="0/3 nodes are available"), "No node takes the pod: 0/3 nodes are available"),
        (pod(phase="Pending"), "The pod waits for a node."),
        (pod(phase="Pending", model=running()), "The model container fetches or checks the model."),
        (pod(phase="Pending", model=waiting("ImagePullBackOff", "not found")), "Container model: ImagePullBackOff: not found"),
        (
            pod(phase="Pending", model=ended(0), generator=waiting("CreateContainerConfigError", 'secret "hub" not found')),
            'secret "hub" not found',
        ),
        (pod(phase="Pending", model=waiting("PodInitializing")), "The containers are being started"),
    ],
)
def test_a_pod_that_does_not_run_says_what_it_waits_for(seen: Any, words: str) -> None:
    assert words in message(status(Observed(parent=parent(), job=job(active=1), pods=(seen,))), "Running")


def test_a_generator_that_was_started_again_says_how_it_ended() -> None:
    restarted = running() | {"restartCount": 2, "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
    found = status(Observed(parent=parent(), job=job(), pods=(training_pod(generator=restarted),), report=report(3)))
    assert condition(found, "GeneratorReady") == ("False", "GeneratorRestarted")
    assert condition(found, "WeightsInSync") == ("False", "GeneratorRestarted")
    assert "2 restarts" in message(found, "GeneratorReady")
    assert "OOMKilled, exit code 137" in message(found, "GeneratorReady")
    assert condition(found, "Running") == ("True", "Training")


def test_progress_is_what_the_launcher_tells() -> None:
    assert TRAINING["progress"] == {"step": 12, "totalSteps": 150, "steps": "12/150", "reward": "0.5"}
    assert TRAINING["startTime"] == "2026-01-01T12:00:20Z"


def test_a_report_of_an_earlier_pod_is_not_believed() -> None:
    seen = Observed(parent=parent(status=CREATED), job=job(), pods=(training_pod(name="run-2"),), report=report(90, pod_name="run-1"))
    assert "progress" not in status(seen)


def test_the_launcher_of_a_running_pod_is_followed() -> None:
    target = settle(Observed(parent=parent(), job=job(), pods=(training_pod(),))).poll
    assert target is not None
    assert (target.url, target.pod_uid) == ("http://10.0.0.7:8081/progress", "uid-run-1")


def test_an_ipv6_address_stands_in_brackets() -> None:
    target = settle(Observed(parent=parent(), job=job(), pods=(training_pod(ip="fd00::7"),))).poll
    assert target is not None
    assert target.url == "http://[fd00::7]:8081/progress"


def test_nobody_is_followed_once_the_trainer_has_ended() -> None:
    assert settle(Observed(parent=parent(), job=job(), pods=(training_pod(trainer=ended(0)),))).poll is None


def test_an_operator_that_starts_again_believes_what_its_predecessor_wrote() -> None:
    found = settle(Observed(parent=parent(status=TRAINING), job=job(active=1), pods=(training_pod(),)), seconds=120)
    assert found.status is None
    assert found.poll is not None


def test_a_status_of_a_newer_operator_is_understood_as_far_as_possible() -> None:
    newer = TRAINING | {"novelty": 1, "progress": TRAINING["progress"] | {"kl": "0.1"}}
    newer["conditions"] = [*TRAINING["conditions"], {**TRAINING["conditions"][0], "type": "QuotaReserved", "reason": "Unheard"}]
    found = settle(Observed(parent=parent(status=newer), job=job(active=1), pods=(training_pod(),)), seconds=120)
    assert found.status is not None
    assert condition(found.status, "Running") == ("True", "Training")


def test_success_ends_with_all_steps_made_and_the_last_reward() -> None:
    seen = Observed(parent=parent(status=TRAINING), job=job(end=("Complete", "CompletionsReached"), succeeded=1))
    found = status(seen, seconds=100)
    assert condition(found, "Succeeded") == ("True", "Finished")
    assert condition(found, "Running") == ("False", "Finished")
    assert (found["state"], found["completionTime"]) == ("Succeeded", "2026-01-01T13:00:00Z")
    assert found["progress"] == {"step": 150, "totalSteps": 150, "steps": "150/150", "reward": "0.5"}


def test_the_launchers_last_words_are_the_final_progress() -> None:
    last = report(150, reward="0.98").body
    ended_pod = training_pod(phase="Succeeded", trainer=ended(0, last.model_dump_json(by_alias=True, exclude_none=True)))
    seen = Observed(parent=parent(status=TRAINING), job=job(end=("Complete", "CompletionsReached"), succeeded=1), pods=(ended_pod,))
    assert status(seen)["progress"]["reward"] == "0.98"


def test_progress_is_kept_after_a_failure() -> None:
    seen = Observed(parent=parent(status=TRAINING), job=job(end=("Failed", "BackoffLimitExceeded"), failed=1))
    assert status(seen)["progress"] == TRAINING["progress"]


def test_retried_pods_are_counted_when_they_are_replaced() -> None:
    failed = training_pod(phase="Failed", trainer=ended(83))
    waits = status(Observed(parent=parent(), job=job(failed=1), pods=(failed,)))
    second = training_pod(name="run-2", created="2026-01-01T12:05:00Z")
    again = status(Observed(parent=parent(status=waits), job=job(failed=1, active=1), pods=(failed, second)))
    assert (waits["restarts"], again["restarts"]) == (0, 1)
    assert again["state"] == "Starting"


def test_a_suspended_job_says_while_its_pod_still_holds_gpus() -> None:
    seen = Observed(parent=parent(status=TRAINING), job=job(suspend=True), pods=(training_pod(deleting=True),))
    assert "still holds its GPUs" in message(status(seen), "Running")


def stopped(**newer: Any) -> str:
    """The termination message of a launcher that was told to stop after step 14, and saved; `newer` are fields of a later version."""
    progress = {"step": 14, "totalSteps": 150, "checkpointStep": 14, "checkpointTime": "2026-01-01T12:05:00Z"} | newer
    return json.dumps({"reason": "Terminated", "message": "told to stop", "progress": progress} | newer)


@pytest.mark.parametrize("newer", [{}, {"ofALaterVersion": 1}])
def test_what_was_saved_while_it_was_suspended_is_told(newer: Object) -> None:
    ended_pod = training_pod(phase="Failed", deleting=True, trainer=ended(85, stopped(**newer)))
    found = status(
        Observed(parent=parent(status=TRAINING, suspend=True, claim="runs"), job=job(suspend=True), pods=(ended_pod,), report=report(11))
    )
    assert (found["progress"]["step"], found["progress"]["checkpointStep"]) == (14, 14)
    assert condition(found, "CheckpointFresh") == ("True", "CheckpointSaved")
    without_pod = Observed(parent=parent(status=found, suspend=True, claim="runs"), job=job(suspend=True))
    assert settle(without_pod, seconds=60).status is None  # nothing changes


def test_a_status_of_a_later_version_is_no_error() -> None:
    newer = {**TRAINING, "ofALaterVersion": 1, "progress": {**TRAINING["progress"], "ofALaterVersion": 1}}
    assert status(Observed(parent=parent(status=newer), job=job(active=1), pods=(training_pod(),)))["progress"] == TRAINING["progress"]


@pytest.mark.parametrize("kind", [RefusalKind.INVALID, RefusalKind.TAKEN])
def test_a_refusal_for_good_is_a_failure(kind: RefusalKind) -> None:
    found = status(Observed(parent=parent(), refusal=Refusal(kind=kind, message="no")))
    assert condition(found, "Failed")[0] == "True"
    assert condition(found, "Created") == ("False", "JobConflict" if kind is RefusalKind.TAKEN else "JobRejected")


@pytest.mark.parametrize("kind", [RefusalKind.FORBIDDEN, RefusalKind.PREDECESSOR])
def test_a_refusal_for_now_is_said_and_tried_again(kind: RefusalKind) -> None:
    found = settle(Observed(parent=parent(), refusal=Refusal(kind=kind, message="exceeded quota")))
    assert found.status is not None
    assert types(found.status) == ["Created"]
    assert (found.status["state"], found.status["message"]) == ("Pending", "exceeded quota")
    assert found.again_after is not None
    retried = plan(Observed(parent=parent(status=found.status)), now=at(60), image=IMAGE)
    assert isinstance(retried, Create)


def test_a_foreign_job_in_the_cache_is_left_alone() -> None:
    found = status(Observed(parent=parent(), job=job(owner="cron-1", owner_kind="CronJob")))
    assert condition(found, "Failed") == ("True", "JobConflict")
    assert "belongs to CronJob run" in message(found, "Failed")


def test_the_job_of_a_deleted_namesake_is_waited_for() -> None:
    found = settle(Observed(parent=parent(uid="parent-2"), job=job(owner="parent-1")))
    assert found.status is not None
    assert "Failed" not in types(found.status)
    assert found.again_after is not None


def test_a_job_missing_from_the_cache_is_looked_for_before_it_is_given_up() -> None:
    seen = Observed(parent=parent(status=CREATED))
    assert plan(seen, now=NOW, image=IMAGE) == Look()
    lost = status(replace(seen, absence_confirmed=True))
    assert condition(lost, "Failed") == ("True", "JobLost")


def test_a_job_deleted_before_anything_was_said_of_it_is_not_made_again() -> None:
    seen = Observed(parent=parent(), bereft=True)
    assert plan(seen, now=NOW, image=IMAGE) == Look()
    assert condition(status(replace(seen, absence_confirmed=True)), "Failed") == ("True", "JobLost")


@pytest.mark.parametrize("kind", RefusalKind)
def test_a_run_whose_job_was_created_is_looked_for_whatever_was_refused(kind: RefusalKind) -> None:
    seen = Observed(parent=parent(status=TRAINING), refusal=Refusal(kind=kind, message="no"))
    assert plan(seen, now=NOW, image=IMAGE) == Look()


def test_a_lost_job_is_over_only_when_its_pod_has_let_go_of_its_gpus() -> None:
    seen = Observed(parent=parent(status=TRAINING), absence_confirmed=True, pods=(training_pod(deleting=True),))
    found = status(seen)
    assert condition(found, "Running") == ("False", "JobLost")
    assert "Failed" not in types(found)
    gone = status(replace(seen, parent=parent(status=found), pods=()))
    assert condition(gone, "Failed") == ("True", "JobLost")


def test_a_job_that_ttl_may_have_removed_says_so() -> None:
    found = status(Observed(parent=parent(status=CREATED, ttlSecondsAfterFinished=5), absence_confirmed=True))
    assert "ttlSecondsAfterFinished removed it unseen" in message(found, "Failed")


def test_terminal_is_terminal() -> None:
    succeeded = status(Observed(parent=parent(), job=job(end=("Complete", "CompletionsReached"))))
    for seen in (
        Observed(parent=parent(status=succeeded)),
        Observed(parent=parent(status=succeeded, generation=2), job=job(active=1), pods=(training_pod(),)),
        Observed(parent=parent(status=succeeded), absence_confirmed=True),
    ):
        assert settle(seen) == Settle()


def test_a_status_in_which_only_progress_is_new_waits_for_its_turn() -> None:
    seen = Observed(parent=parent(status=TRAINING), job=job(active=1), pods=(training_pod(),), report=report(13), written_at=at(100))
    early = settle(seen, seconds=102)
    assert (early.status, early.again_after) == (None, 3.0)
    assert status(seen, seconds=105)["progress"]["steps"] == "13/150"


def test_a_changed_condition_does_not_wait() -> None:
    unready = training_pod(generator=running(ready=False))
    seen = Observed(parent=parent(status=TRAINING), job=job(active=1), pods=(unready,), report=report(13), written_at=at(100))
    found = status(seen, seconds=101)
    assert condition(found, "GeneratorReady")[0] == "False"
    assert found["progress"]["steps"] == "13/150"


def test_the_transition_time_moves_only_when_the_status_of_a_condition_does() -> None:
    times = {c["type"]: c["lastTransitionTime"] for c in TRAINING["conditions"] if c["type"] in ("Created", "GeneratorReady", "Running")}
    assert times == {"Created": "2026-01-01T12:00:00Z", "GeneratorReady": "2026-01-01T12:01:00Z", "Running": "2026-01-01T12:01:00Z"}


def test_every_condition_says_which_generation_it_is_about() -> None:
    seen = Observed(parent=parent(status=TRAINING, generation=2), job=job(active=1), pods=(training_pod(),))
    found = status(seen)
    assert {c["observedGeneration"] for c in found["conditions"]} == {2}
    assert found["observedGeneration"] == 2


def test_transitions_are_told_once_each() -> None:
    begun = settle(Observed(parent=parent(status=CREATED), job=job(active=1), pods=(training_pod(),), report=report(1)))
    assert [(e.type, e.reason) for e in begun.events] == [("Normal", "GeneratorServing"), ("Normal", "Training")]
    failed = settle(Observed(parent=parent(status=TRAINING), job=job(end=("Failed", "DeadlineExceeded"), failed=1)))
    assert [(e.type, e.reason) for e in failed.events] == [("Warning", "DeadlineExceeded")]


def test_a_launcher_that_has_long_been_silent_is_the_reason_why_nothing_is_known_to_move() -> None:
    seen = Observed(parent=parent(status=TRAINING), job=job(active=1), pods=(training_pod(),), report=report(12), silent_since=at(70))
    silent = status(seen, seconds=140)
    assert condition(silent, "Progressing") == ("False", "LauncherSilent")
    assert "has not answered since 2026-01-01T12:01:10Z" in message(silent, "Progressing")
    assert silent["state"] == "Running"
    again = status(replace(seen, parent=parent(status=silent), silent_since=None), seconds=150)
    assert condition(again, "Progressing") == ("True", "Training")
