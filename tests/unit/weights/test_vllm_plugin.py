"""The plugin as vLLM finds it."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from otj_runtime.weights.errors import UnsupportedVLLM
from otj_runtime.weights.vllm_plugin import BACKEND, MailboxEngine, register, require_supported


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1rc1", "0.32.0+cpu"])
def test_versions_in_range_are_taken(version: str) -> None:
    require_supported(version)


@pytest.mark.parametrize("version", ["0.17.1", "0.31.0", "0.33.0", "1.0.0", "dev"])
def test_versions_outside_the_range_are_refused_by_name(version: str) -> None:
    with pytest.raises(UnsupportedVLLM, match=f"vLLM {version} is not supported"):
        require_supported(version)


def test_vllm_finds_the_backend_and_may_register_it_twice() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name=BACKEND)
    assert found.load() is register
    register()
    register()
    assert WeightTransferEngineFactory._registry[BACKEND]() is MailboxEngine


def test_the_engine_leaves_nothing_of_vllms_interface_open() -> None:
    assert not MailboxEngine.__abstractmethods__
