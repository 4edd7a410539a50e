"""What the tests of the trainer share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from otj_runtime.data.model import build_tiny


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A model this small loses more by handing work to threads than it wins."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, as saved."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> tuple[Any, Any]:
    """The tiny model and its tokenizer, loaded. Copy the model before changing it."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)
