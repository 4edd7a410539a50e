"""What holds of every decision, whatever is seen: each rule is tried on every situation that hypothesis thinks of.

One test tries them all on the same situations, because making one up costs far more than judging it; `make nightly` tries 10,000.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import HealthCheck, given, settings

from otj_operator.plan import Ask, Create, Look, Observed, Patch, Settle, Target, plan
from otj_operator.plan.adjust import queued
from otj_operator.plan.draft import finished
from otj_operator.plan.planner import belongs
from otj_runtime.api import Reason
from otj_runtime.api.lifecycle import CHANGEABLE
from otj_runtime.pod.names import QUEUE_LABEL, SUSPENDED_BY_ANNOTATION
from tests.unit.operator.objects import IMAGE, at, parent
from tests.unit.operator.situations import decide, situations, walk

Object = dict[str, Any]

NOW = 10.0
HELD_BACK = {"Suspending", "Suspended", "Queued", "Ending", "Deleting", "Succeeded", "Failed"}


def conditions(status: Object) -> dict[str, Object]:
    return {c["type"]: c for c in status.get("conditions", [])}


def is_true(status: Object, kind: str) -> bool:
    return conditions(status).get(kind, {}).get("status") == "True"


def ours(seen: Observed) -> bool:
    return seen.job is not None and belongs(seen.job, seen.parent)


def going(seen: Observed) -> bool:
    """Whether our Job is there, has not ended and does not end, and nobody deletes anything."""
    return ours(seen) and seen.job is not None and not seen.job.ended and seen.job.failing is None and not seen.parent.deleting


@dataclass(frozen=True)
class Pass:
    """One pass from a situation to its settlement, in which the API server grants what is asked."""

    seen: Observed
    steps: list[tuple[Observed, Any]]

    @property
    def last(self) -> Observed:
        """What the settlement was decided from."""
        return self.steps[-1][0]

    @property
    def settled(self) -> Settle:
        """How it ended."""
        step = self.steps[-1][1]
        assert isinstance(step, Settle)
        return step

    @property
    def job_patches(self) -> list[tuple[Observed, Patch]]:
        """Changes of the Job, and what each was decided from."""
        return [(before, step) for before, step in self.steps if isinstance(step, Patch) and step.target is Target.JOB]


RULES: list[Callable[[Pass], None]] = []
STATUS_RULES: list[Callable[[Pass, Object], None]] = []


def holds(rule: Callable[[Pass], None]) -> Callable[[Pass], None]:
    """Marks a rule about every pass."""
    RULES.append(rule)
    return rule


def holds_of_status(rule: Callable[[Pass, Object], None]) -> Callable[[Pass, Object], None]:
    """Marks a rule about every status that is written."""
    STATUS_RULES.append(rule)
    return rule


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(situations())
def test_every_rule_holds_of_every_decision(seen: Observed) -> None:
    done = Pass(seen, walk(seen))
    for rule in RULES:
        rule(done)
    if done.settled.status is not None:
        for status_rule in STATUS_RULES:
            status_rule(done, done.settled.status)


def test_there_are_as_many_rules_as_there_should_be() -> None:
    assert len(RULES) + len(STATUS_RULES) >= 40


@holds
def a_pass_always_ends(done: Pass) -> None:
    assert isinstance(done.settled, Settle)


@holds
def the_same_view_leads_to_the_same_decision(done: Pass) -> None:
    assert plan(done.seen, now=at(NOW), image=IMAGE) == plan(done.seen, now=at(NOW), image=IMAGE)


@holds
def terminal_is_terminal(done: Pass) -> None:
    decided = done.settled
    if decided.status is not None and finished(decided.status):
        assert walk(replace(done.seen, parent=parent(status=decided.status)), seconds=1000)[0][1] == Settle()


@holds
def what_another_controller_manages_is_left_alone(done: Pass) -> None:
    if not done.seen.parent.ours:
        assert plan(done.seen, now=at(NOW), image=IMAGE) == Settle()


@holds
def a_job_is_created_only_where_none_is_and_none_was(done: Pass) -> None:
    for before, step in done.steps:
        if isinstance(step, Create):
            assert before.job is None
            assert not is_true(before.parent.status, "Created")
            assert not before.parent.deleting


@holds
def never_two_jobs_in_one_pass(done: Pass) -> None:
    assert sum(isinstance(step, Create) for _, step in done.steps) <= 1


@holds
def a_created_job_belongs_to_its_owner_and_to_its_queue(done: Pass) -> None:
    for before, step in done.steps:
        if isinstance(step, Create):
            (owner,) = step.job["metadata"]["ownerReferences"]
            assert (owner["uid"], owner["controller"]) == (before.parent.uid, True)
            assert step.job["metadata"]["labels"].get(QUEUE_LABEL, "") == before.parent.queue


@holds
def a_job_that_must_wait_is_not_queued(done: Pass) -> None:
    for before, step in done.steps:
        assert not (isinstance(step, Create) and before.parent.paused and before.parent.queue)


@holds
def a_foreign_job_is_never_touched(done: Pass) -> None:
    if not ours(done.seen) and done.seen.job is not None:
        assert not any(isinstance(step, Create | Patch) for _, step in done.steps)


@holds
def the_template_is_never_touched(done: Pass) -> None:
    for _, patch in done.job_patches:
        assert patch.body.keys() <= {"metadata", "spec"}
        assert patch.body.get("spec", {}).keys() <= {"parallelism", *CHANGEABLE}
        assert patch.body["metadata"].keys() <= {"resourceVersion", "annotations", "labels", "ownerReferences"}


@holds
def a_job_that_goes_on_is_for_one_pod(done: Pass) -> None:
    last = done.last
    if going(last) and last.job is not None and not last.job.deleting and last.refusal is None and last.parent.ours:
        assert finished(last.parent.status) or last.job.parallelism == 1


@holds
def under_kueue_suspend_is_never_touched(done: Pass) -> None:
    for before, patch in done.job_patches:
        if before.job is not None and queued(before, before.job):
            assert "suspend" not in patch.body.get("spec", {})


@holds
def only_what_we_suspended_is_resumed_and_only_if_the_user_wants_it(done: Pass) -> None:
    for before, patch in done.job_patches:
        if patch.body.get("spec", {}).get("suspend") is False:
            assert before.job is not None
            assert before.job.suspended_by_us
            assert not before.parent.paused


@holds
def only_the_user_makes_us_suspend(done: Pass) -> None:
    for before, patch in done.job_patches:
        assert patch.body.get("spec", {}).get("suspend") is not True or before.parent.paused


@holds
def a_suspension_and_its_mark_are_one_write(done: Pass) -> None:
    for _, patch in done.job_patches:
        marked = SUSPENDED_BY_ANNOTATION in patch.body["metadata"].get("annotations", {})
        assert marked is ("suspend" in patch.body.get("spec", {}))


@holds
def a_workload_is_activated_only_if_we_deactivated_it(done: Pass) -> None:
    for before, step in done.steps:
        if isinstance(step, Patch) and step.target is Target.WORKLOAD:
            assert before.workload is not None
            assert step.body["spec"]["active"] is not before.parent.paused
            assert before.parent.paused or before.workload.paused_by_us


@holds
def every_patch_names_the_version_that_it_was_decided_on(done: Pass) -> None:
    for before, step in done.steps:
        if isinstance(step, Patch):
            found = before.job if step.target is Target.JOB else before.workload
            assert found is not None
            assert step.body["metadata"]["resourceVersion"] == found.resource_version


@holds
def what_has_ended_or_goes_is_never_patched(done: Pass) -> None:
    for before, step in done.steps:
        if isinstance(step, Patch):
            assert before.job is not None
            assert not before.job.ended
            assert not before.job.deleting
            assert not before.parent.deleting


@holds
def a_granted_patch_is_not_asked_for_again(done: Pass) -> None:
    asked = Counter(step.target for _, step in done.steps if isinstance(step, Patch))
    assert all(count == 1 for count in asked.values())


@holds_of_status
def the_end_comes_from_the_job_or_when_nothing_can_run(done: Pass, status: Object) -> None:
    if finished(status):
        last = done.last
        ended = ours(last) and last.job is not None and last.job.ended
        # Without a Job of ours: refused for good, or lost and all its pods gone.
        assert ended or not ours(last)
        if is_true(done.seen.parent.status, "Created") and not ended and last.refusal is None:
            assert not any(pod.live for pod in last.pods)


@holds_of_status
def succeeded_is_what_the_job_says(done: Pass, status: Object) -> None:
    if is_true(status, "Succeeded"):
        assert done.last.job is not None
        assert done.last.job.completed is not None


@holds_of_status
def the_end_is_one_and_has_a_time(done: Pass, status: Object) -> None:
    ends = [kind for kind in ("Succeeded", "Failed") if kind in conditions(status)]
    assert len(ends) <= 1
    assert bool(ends) is ("completionTime" in status)
    assert not ends or status["state"] == ends[0]


@holds_of_status
def a_paused_run_never_reads_running(done: Pass, status: Object) -> None:
    if going(done.last) and done.last.parent.paused:
        assert not is_true(status, "Running")
        assert status["state"] in HELD_BACK


@holds_of_status
def a_run_that_is_not_held_back_never_reads_suspended(done: Pass, status: Object) -> None:
    if going(done.last) and done.last.job is not None and not done.last.parent.paused and not done.last.job.suspended:
        assert not is_true(status, "Suspended")
        assert status["state"] not in {"Suspending", "Suspended", "Queued"}


@holds_of_status
def suspended_means_that_no_accelerator_is_held(done: Pass, status: Object) -> None:
    if is_true(status, "Suspended") and going(done.last) and done.last.job is not None:
        newest = max((p for p in done.last.pods if p.job_uid == done.last.job.uid), key=lambda p: (p.created, p.name), default=None)
        assert newest is None or not newest.live


@holds_of_status
def running_means_that_a_trainer_runs(done: Pass, status: Object) -> None:
    if is_true(status, "Running"):
        assert any(p.live and not p.deleting and p.trainer.state == "running" for p in done.last.pods)


@holds_of_status
def progressing_needs_running_and_else_says_why_not(done: Pass, status: Object) -> None:
    if "Progressing" in conditions(status):
        if is_true(status, "Progressing"):
            assert is_true(status, "Running")
        else:
            assert conditions(status)["Progressing"]["message"]


@holds_of_status
def the_message_is_that_of_a_condition(done: Pass, status: Object) -> None:
    assert status["message"] in {c["message"] for c in status["conditions"]}


@holds_of_status
def a_transition_time_moves_only_with_its_status(done: Pass, status: Object) -> None:
    before = conditions(done.seen.parent.status)
    for kind, new in conditions(status).items():
        old = before.get(kind)
        if old is not None and old["status"] == new["status"]:
            assert old["lastTransitionTime"] == new["lastTransitionTime"]


@holds_of_status
def a_second_pass_writes_nothing(done: Pass, status: Object) -> None:
    last = done.last
    again = replace(last, parent=replace(last.parent, status=status), written_at=None)
    assert decide(again).status is None


@holds
def only_a_running_pod_is_asked_for_its_progress(done: Pass) -> None:
    poll = done.settled.poll
    assert poll is None or any(p.uid == poll.pod_uid and p.live and not p.deleting for p in done.seen.pods)


@holds
def without_a_new_condition_a_status_waits_five_seconds(done: Pass) -> None:
    step = done.settled
    early = done.seen.written_at is not None and (at(NOW) - done.seen.written_at).total_seconds() < 5
    if early and step.status is not None:
        old, new = done.seen.parent.status.get("conditions", []), step.status["conditions"]
        assert [(c["type"], c["status"], c["reason"]) for c in old] != [(c["type"], c["status"], c["reason"]) for c in new]


@holds
def a_status_that_waits_is_come_back_to(done: Pass) -> None:
    last, step = done.steps[-1]
    later = decide(replace(last, written_at=None))
    if step.status is None and later.status is not None:
        assert step.again_after is not None
        assert 0 < step.again_after <= 5


@holds_of_status
def restarts_never_fall_and_those_counted_are_some_of_them(done: Pass, status: Object) -> None:
    if "restarts" in status:
        assert status["restarts"] >= done.seen.parent.status.get("restarts", 0)
        assert 0 <= status["restartsCounted"] <= status["restarts"]


@holds_of_status
def steps_once_told_are_never_lost(done: Pass, status: Object) -> None:
    if "progress" in done.seen.parent.status:
        assert "step" in status["progress"]


@holds_of_status
def progress_is_never_empty(done: Pass, status: Object) -> None:
    assert status.get("progress") != {}


@holds_of_status
def an_estimated_end_needs_a_running_pod(done: Pass, status: Object) -> None:
    if "eta" in status.get("progress", {}):
        assert is_true(status, "Running")


@holds_of_status
def the_status_is_of_the_present_generation(done: Pass, status: Object) -> None:
    assert status["observedGeneration"] == done.seen.parent.generation
    for condition in status["conditions"]:
        assert condition["observedGeneration"] <= max(done.seen.parent.generation, *_generations(done.seen.parent.status))


@holds_of_status
def every_reason_is_from_the_list_but_kueues_own(done: Pass, status: Object) -> None:
    assert all(c["reason"] in set(Reason) or c["type"] == "QuotaReserved" for c in status["conditions"])


@holds
def an_end_is_told_in_one_event_and_a_reason_only_once(done: Pass) -> None:
    step = done.settled
    reasons = Counter(event.reason for event in step.events)
    assert all(count == 1 for count in reasons.values())
    assert step.status is not None or not step.events
    if step.status is not None and finished(step.status):
        assert len(step.events) == 1


@holds
def the_way_to_an_end_is_no_event_of_its_own(done: Pass) -> None:
    step = done.settled
    if step.status is not None and step.status["state"] == "Ending":
        assert {event.reason for event in step.events} <= {"JobCreated", "JobNotAdjusted", "Terminated", "NotSuspended"}


@holds
def events_are_asked_for_only_about_what_is_ours_and_waits(done: Pass) -> None:
    for before, step in done.steps:
        if isinstance(step, Ask):
            assert before.job is not None
            assert step.uid in {before.job.uid, *(p.uid for p in before.pods if p.job_uid == before.job.uid)}
            assert not before.job.suspended


@holds
def the_api_server_is_asked_for_a_job_only_if_one_was_created(done: Pass) -> None:
    for before, step in done.steps:
        if isinstance(step, Look):
            assert before.bereft or is_true(before.parent.status, "Created")
            assert before.job is None


@holds
def who_had_a_job_gets_no_second_one(done: Pass) -> None:
    if done.seen.bereft or is_true(done.seen.parent.status, "Created"):
        assert not any(isinstance(step, Create) for _, step in done.steps)


@holds_of_status
def a_checkpoint_is_fresh_only_where_it_outlives_the_pod(done: Pass, status: Object) -> None:
    if is_true(status, "Running"):
        assert done.seen.parent.keeps_output or not is_true(status, "CheckpointFresh")


@holds_of_status
def kueues_word_is_quoted(done: Pass, status: Object) -> None:
    if going(done.last) and done.last.workload is not None and done.last.workload.quota is not None:
        quota, said = done.last.workload.quota, conditions(status)["QuotaReserved"]
        assert (said["status"], said["reason"], said["message"]) == (quota.status, quota.reason, quota.message)


def _generations(status: Object) -> list[int]:
    return [0, *(c["observedGeneration"] for c in status.get("conditions", []))]
