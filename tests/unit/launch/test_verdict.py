"""One cause out of notes, exit status and output."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from otj_runtime.api import Progress, Reason
from otj_runtime.launch.verdict import TERMINATION_BYTES, Tail, decide, digest, termination_message
from otj_runtime.pod.errors import FailureNote


def note(reason: Reason, *, at: float) -> FailureNote:
    """A note of that reason and time."""
    return FailureNote(reason=reason, message=reason.value, time=at)


REWARD, DIVERGED, LOST, TOLD, SAVED = (
    note(Reason.REWARD_FAILED, at=1.0),
    note(Reason.WEIGHTS_DIVERGED, at=3.0),
    note(Reason.GENERATOR_LOST, at=2.0),
    note(Reason.TERMINATED, at=2.0),
    note(Reason.TERMINATED, at=4.0),
)


@pytest.mark.parametrize(
    ("status", "rank", "own", "asked", "expected"),
    [
        pytest.param(0, None, None, False, None, id="success"),
        pytest.param(1, REWARD, None, False, Reason.REWARD_FAILED, id="a rank's note"),
        pytest.param(0, REWARD, None, False, Reason.REWARD_FAILED, id="a rank's note in spite of status 0"),
        pytest.param(1, REWARD, LOST, False, Reason.REWARD_FAILED, id="the rank's note was first"),
        pytest.param(1, DIVERGED, LOST, False, Reason.GENERATOR_LOST, id="the launcher's note was first"),
        pytest.param(-9, None, LOST, False, Reason.GENERATOR_LOST, id="ranks killed by the launcher"),
        pytest.param(0, None, LOST, False, Reason.GENERATOR_LOST, id="ranks that ended well when the launcher stopped them"),
        pytest.param(1, SAVED, TOLD, True, Reason.TERMINATED, id="told to stop"),
        pytest.param(-15, None, TOLD, True, Reason.TERMINATED, id="told to stop, nobody wrote"),
        pytest.param(0, None, TOLD, True, None, id="finished just when told to stop"),
        pytest.param(1, SAVED, None, False, Reason.TRAINER_CRASHED, id="torchrun stopped the writer after another rank's death"),
        pytest.param(1, SAVED, LOST, False, Reason.GENERATOR_LOST, id="stopped by the launcher for its own reason"),
        pytest.param(1, None, None, False, Reason.TRAINER_CRASHED, id="no note at all"),
    ],
)
def test_the_earliest_true_cause_decides(
    status: int, rank: FailureNote | None, own: FailureNote | None, asked: bool, expected: Reason | None
) -> None:
    found = decide(status=status, rank_note=rank, own_note=own, asked_to_stop=asked, tail=[])
    assert (found and found.reason) == expected


def test_a_stopped_run_says_what_the_trainer_saved() -> None:
    assert decide(status=1, rank_note=SAVED, own_note=TOLD, asked_to_stop=True, tail=[]) is SAVED


def test_a_crash_shows_the_ranks_last_words_and_not_the_launchers() -> None:
    tail = Tail()
    tail.feed(b"step 3\nTraceback (most recent call last):\n  File train.py\nZeroDivisionError: div")
    tail.feed(b"ision by zero\nTraceback (most recent call last):\n  File accelerate/commands/launch.py\nCalledProcessError: exit 1\n")
    found = decide(status=1, rank_note=None, own_note=None, asked_to_stop=False, tail=tail.lines())
    assert found is not None
    assert found.message.endswith("ZeroDivisionError: division by zero")
    assert "exit status 1" in found.message


def test_a_crash_of_the_launcher_alone_shows_its_words() -> None:
    lines = ["Traceback (most recent call last):", "  File accelerate/commands/launch.py", "ValueError: unknown key foo"]
    assert digest(lines).endswith("unknown key foo")


def test_what_all_ranks_say_is_told_once_and_torchruns_log_not_at_all() -> None:
    words = ["Traceback (most recent call last):", "  File train.py", "KeyError: 'answer'"]
    log = "W1124 10:00 1 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 7 closing signal SIGTERM"
    assert digest([*words, *words, log, *words]) == "\n".join(words)


def test_the_tail_keeps_the_end_of_endless_output() -> None:
    tail = Tail()
    for number in range(1000):
        tail.feed(f"line {number}\n".encode())
    tail.feed(b"x" * 100_000)
    assert tail.lines()[-2] == "line 999"
    assert sum(map(len, tail.lines())) < 10_000


@given(message=st.text(max_size=3500), advice=st.text(max_size=256), transfer=st.text(max_size=256))
@example(message="x" * 3500, advice="\U0001f600" * 256, transfer="\U0001f600" * 256)
def test_a_termination_message_is_whole_json_within_the_limit(message: str, advice: str, transfer: str) -> None:
    progress = Progress(step=3, advice=advice, weight_transfer=transfer)
    text = termination_message(FailureNote(reason=Reason.TRAINER_CRASHED, message=message, rank=1, time=1.0, progress=progress))
    assert len(text.encode()) <= TERMINATION_BYTES
    assert json.loads(text)["reason"] == "TrainerCrashed"
