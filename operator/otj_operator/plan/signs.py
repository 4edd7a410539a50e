"""The vital signs of a run whose trainer container runs: does it move, has the generator the weights, is there a checkpoint."""

from __future__ import annotations

from otj_operator.plan.draft import Draft, timestamp
from otj_operator.plan.observed import Observed, Report
from otj_operator.plan.parent import Parent
from otj_operator.plan.pods import PodView
from otj_operator.plan.waiting import generator_state
from otj_runtime.api import ConditionType, Reason

VERSIONS_BEHIND = 4
"""Steps that the generator's weights may be behind: a sync after each step leaves one, training one step off two."""

CHECKPOINT_INTERVALS = 2
"""Intervals of output.saveSteps without a checkpoint after which it is late: one may be in the making."""


def say_running(draft: Draft, observed: Observed, pod: PodView) -> None:
    """Running, Progressing and WeightsInSync of a pod whose trainer runs."""
    report = observed.report if observed.report is not None and observed.report.pod_uid == pod.uid else None
    before = draft.before(ConditionType.RUNNING)
    same_pod = draft.start_time == pod.start_time
    draft.start_time = pod.start_time
    if report is None and same_pod and before is not None and before.status == "True":
        # This process has not asked the launcher yet, an earlier one has: its words stand.
        for kind in (ConditionType.RUNNING, ConditionType.PROGRESSING, ConditionType.WEIGHTS_IN_SYNC):
            draft.keep(kind)
    else:
        training = report is not None and report.body.phase != "starting"
        unheard = "The trainer container runs; its launcher has not answered yet." if report is None else ""
        draft.say(ConditionType.RUNNING, True, Reason.TRAINING if training else Reason.STARTING, unheard)
        _say_progressing(draft, pod, report, unheard=unheard)
        _say_weights(draft, pod)
    if observed.silent_since is not None:
        since = f"The launcher of pod {pod.name} has not answered since {timestamp(observed.silent_since)}. "
        draft.say(ConditionType.PROGRESSING, False, Reason.LAUNCHER_SILENT, since + Reason.LAUNCHER_SILENT.advice)


def say_checkpoint(draft: Draft, parent: Parent) -> None:
    """CheckpointFresh, from what the launcher told of the output folder."""
    step = draft.progress.step if draft.progress is not None else None
    saved = draft.progress.checkpoint_step if draft.progress is not None else None
    late = (step or 0) - (saved or 0) > CHECKPOINT_INTERVALS * parent.save_steps
    if not parent.keeps_output:
        draft.say(ConditionType.CHECKPOINT_FRESH, False, Reason.OUTPUT_NOT_KEPT)
    elif late:
        draft.say(ConditionType.CHECKPOINT_FRESH, False, Reason.CHECKPOINT_LATE)
    elif saved is None:
        draft.say(ConditionType.CHECKPOINT_FRESH, False, Reason.NO_CHECKPOINT_YET)
    else:
        draft.say(ConditionType.CHECKPOINT_FRESH, True, Reason.CHECKPOINT_SAVED)


def _say_progressing(draft: Draft, pod: PodView, report: Report | None, *, unheard: str) -> None:
    if report is not None and report.body.phase != "starting":
        if report.body.overdue:
            draft.say(ConditionType.PROGRESSING, False, Reason.STEP_OVERDUE, report.body.overdue)
        else:
            draft.say(ConditionType.PROGRESSING, True, Reason.TRAINING)
    elif not pod.generator.ready and not (report is not None and report.body.generator_ready):
        draft.say(ConditionType.PROGRESSING, False, *generator_state(pod.generator))
    else:
        draft.say(ConditionType.PROGRESSING, False, Reason.STARTING, unheard)


def _say_weights(draft: Draft, pod: PodView) -> None:
    version = draft.progress.policy_version if draft.progress is not None else None
    step = (draft.progress.step or 0) if draft.progress is not None else 0
    if not pod.generator.ready:
        draft.say(ConditionType.WEIGHTS_IN_SYNC, False, *generator_state(pod.generator))
    elif version is None:
        draft.say(ConditionType.WEIGHTS_IN_SYNC, False, Reason.NO_SYNC_YET)
    elif step - version > VERSIONS_BEHIND:
        message = f"The generator has the weights of step {version}, the trainer is at step {step}; {Reason.WEIGHTS_BEHIND.advice}"
        draft.say(ConditionType.WEIGHTS_IN_SYNC, False, Reason.WEIGHTS_BEHIND, message)
    else:
        draft.say(ConditionType.WEIGHTS_IN_SYNC, True, Reason.WEIGHTS_PROVEN)
