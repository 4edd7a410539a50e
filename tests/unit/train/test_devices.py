"""Which device generates on a bare machine, and what a user is told who asks for one that is not there."""

from __future__ import annotations

import pytest

from otj_runtime.train.devices import Placement, place_generator, shared_warning, visible_devices


@pytest.mark.parametrize(
    ("wish", "ranks", "gpus", "on_cpu", "expected"),
    [
        ("auto", 3, 4, False, Placement((3,))),
        ("auto", 1, 8, False, Placement((1,))),
        ("auto", 2, 0, True, Placement(())),
        ("auto", 1, 4, True, Placement(())),
        ("cpu", 1, 4, False, Placement(())),
        ("cuda:4", 4, 8, False, Placement((4,))),
        ("cuda:6,7", 6, 8, False, Placement((6, 7))),
        ("cuda:0", 1, 1, False, Placement((0,), shared=(0,))),
        ("cuda:0", 2, 1, True, Placement((0,))),
    ],
)
def test_the_generator_gets_the_device_that_was_asked_for(wish: str, ranks: int, gpus: int, on_cpu: bool, expected: Placement) -> None:
    assert place_generator(wish, training_ranks=ranks, gpus=gpus, on_cpu=on_cpu) == expected


@pytest.mark.parametrize(
    ("wish", "ranks", "gpus", "advice"),
    [
        ("auto", 4, 4, "--num_processes 3"),
        ("cuda:9", 1, 4, "cuda:9.*--num_processes 3"),
        ("auto", 1, 1, "at least two GPUs.*there is 1"),
        ("auto", 1, 0, "at least two GPUs.*there are 0"),
        ("cuda:1", 1, 1, "shows 1 GPU$"),
        ("gpu:1", 1, 4, "gpu:1.*is no device"),
        ("cuda:6-7", 1, 8, 'use "auto"'),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_the_fix(wish: str, ranks: int, gpus: int, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        place_generator(wish, training_ranks=ranks, gpus=gpus, on_cpu=False)


def test_a_generator_on_a_training_device_is_warned_about() -> None:
    assert shared_warning(place_generator("cuda:2", training_ranks=3, gpus=4, on_cpu=False)) is not None
    assert shared_warning(place_generator("cuda:3", training_ranks=3, gpus=4, on_cpu=False)) is None


@pytest.mark.parametrize(("inherited", "expected"), [(None, "3"), ("", "3"), ("4,5,6,7", "7"), ("GPU-a, GPU-b,GPU-c,GPU-d", "GPU-d")])
def test_the_generators_gpu_keeps_its_number_on_the_machine(inherited: str | None, expected: str) -> None:
    assert visible_devices(Placement((3,)), inherited=inherited) == expected
