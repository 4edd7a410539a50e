"""Whose word counts when a job fails: the launcher's, then its exit code's, then Kubernetes'."""

from __future__ import annotations

from typing import Any

import pytest

from otj_operator.plan import PodView
from otj_operator.plan.causes import job_cause, pod_cause
from otj_operator.plan.children import JobEnd
from otj_runtime.api import Reason
from otj_runtime.pod.errors import ExitCode, FailureNote
from tests.unit.operator.objects import ended, pod, running, training_pod

NOTE = FailureNote(reason=Reason.STALLED, message="no step for 600 s").to_json()


@pytest.mark.parametrize(
    ("seen", "reason", "words"),
    [
        (training_pod(trainer=ended(84, NOTE)), "Stalled", "no step for 600 s"),
        (training_pod(trainer=ended(137, NOTE)), "Stalled", "no step for 600 s"),
        (training_pod(trainer=ended(84)), "Stalled", "trainer ended with exit code 84"),
        (training_pod(trainer=ended(84, "Traceback ...")), "Stalled", "trainer ended with exit code 84"),
        (training_pod(trainer=ended(137, reason="OOMKilled")), "PodFailed", "more memory than its limit allows"),
        (training_pod(trainer=ended(1, "Traceback ...")), "PodFailed", "exit code 1: Traceback ..."),
        (training_pod(trainer=ended(1)), "PodFailed", "exit code 1; read its log"),
        (pod(phase="Failed", model=ended(65, NOTE.replace("Stalled", "ModelNotFound"))), "ModelNotFound", "no step"),
        (pod(phase="Failed", reason="Evicted", message="low on memory"), "PodFailed", "pod run-1: Evicted: low on memory"),
        (pod(phase="Failed", reason="UnexpectedAdmissionError"), "DevicePluginRejected", "UnexpectedAdmissionError"),
    ],
)
def test_a_failed_pod_has_a_cause(seen: PodView, reason: str, words: str) -> None:
    cause = pod_cause(seen)
    assert cause is not None
    assert cause.reason == reason
    assert words in cause.message


@pytest.mark.parametrize(
    "seen", [training_pod(), training_pod(trainer=ended(0)), training_pod(phase="Succeeded", trainer=ended(0), generator=ended(137))]
)
def test_a_pod_that_did_not_fail_has_none(seen: PodView) -> None:
    assert pod_cause(seen) is None


@pytest.mark.parametrize("code", [code for code in ExitCode if code is not ExitCode.SUCCESS], ids=lambda code: code.name)
def test_every_exit_code_is_its_reason(code: ExitCode) -> None:
    cause = pod_cause(training_pod(trainer=ended(code)))
    assert cause is not None
    assert (cause.reason, cause.permanent) == (code.reason, code.permanent)


@pytest.mark.parametrize(
    ("end", "pods", "reason", "words"),
    [
        ("DeadlineExceeded", [training_pod(trainer=ended(85, NOTE))], "DeadlineExceeded", "was active too long"),
        ("BackoffLimitExceeded", [training_pod(trainer=ended(84, NOTE))], "Stalled", "no step for 600 s (pod run-1, the last"),
        ("BackoffLimitExceeded", [training_pod(trainer=ended(1, "boom"))], "BackoffLimitExceeded", "boom"),
        ("BackoffLimitExceeded", [], "BackoffLimitExceeded", "its pods are gone"),
        ("PodFailurePolicy", [training_pod(trainer=ended(66))], "DatasetInvalid", "exit code 66"),
        ("PodFailurePolicy", [], "PodFailed", "was active too long (PodFailurePolicy)"),
        ("FailedIndexes", [pod(model=running())], "PodFailed", "its pods are gone or say nothing"),
    ],
)
def test_a_failed_job_has_the_cause_of_its_last_pod(end: str, pods: list[Any], reason: str, words: str) -> None:
    cause = job_cause(JobEnd(reason=end, message="Job was active too long", time=""), pods)
    assert cause.reason == reason
    assert words in cause.message
