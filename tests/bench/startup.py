"""From a pod's start to its first optimizer step, by phase, and how much longer that is than the slower of its two sides.

    python -m tests.bench.startup                                                      # the sample's job, on the CPU
    python -m tests.bench.startup --job mine.yaml --otj --volume models=build/models   # more arguments for `otj run` after --otj

The job runs twice as `otj run` starts it, for one step: first with empty caches, then with what the first run left on its output volume
(vLLM's and torch's compiled code, what vLLM knows of the model's class). Phases are what the launcher notes; `beyond the slower side` is
the first sync and the first step, to which the bar allows 5 s beyond the step's own seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from otj_runtime.local.folder import RunFolder
from otj_runtime.pod.metrics import read_metrics
from otj_runtime.pod.names import METRICS_FILE
from tests.bench.report import Bar, conclude, machine, table

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "manifests" / "samples" / "grpo-copy.yaml"


def run_once(job: dict[str, Any], folder: Path, arguments: list[str]) -> dict[str, float]:
    """Seconds by phase of one run of `job`."""
    manifest = folder.parent / "job.yaml"
    manifest.write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "otj_runtime.cli", "run", str(manifest), "--run-dir", str(folder), *arguments]
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report = json.loads(RunFolder(folder).termination.read_text())
    found = {name: float(seconds) for name, seconds in report["startup"].items()}
    line = next(line for path in folder.rglob(METRICS_FILE) for line in read_metrics(path)[0] if "step_time" in line.metrics)
    found["step"] = line.metrics["step_time"]
    found["beyond"] = found["first_step"] - max(found["generator"], found["trainer"]) - found["step"]
    found["whole_run"] = time.monotonic() - began
    return found


def main() -> int:
    """0 if every bar was reached."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--job", type=Path, default=SAMPLE)
    parser.add_argument("--limit", type=float, default=45.0, help="seconds from pod start to first step with warm caches")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--otj", nargs=argparse.REMAINDER, default=[], help="everything after it goes to `otj run`")
    options = parser.parse_args()
    job = yaml.safe_load(options.job.read_text())
    job["spec"].setdefault("training", {}).update({"max_steps": 1, "eval_prompts": 0})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        # --clean keeps the caches of the output volume and nothing else; `otj run` would use the machine's own cache of vLLM.
        arguments = ["--clean", "--env", f"VLLM_CACHE_ROOT={folder}/output/.cache/vllm", *options.otj]
        runs = {name: run_once(job, folder, arguments) for name in ("cold", "warm")}
    columns = ["launcher", "generator", "trainer", "first_step", "step", "beyond"]
    print(machine())
    print(table(["caches", *columns], [[name, *(found[column] for column in columns)] for name, found in runs.items()]))
    figures = {f"{column}_s[{name}]": found[column] for name, found in runs.items() for column in columns}
    bars = [Bar("first_step_s[warm]", options.limit, at_least=False), Bar("beyond_s[warm]", 5.0, at_least=False)]
    return 0 if conclude("startup", figures, bars, json_file=options.json) else 1


if __name__ == "__main__":
    sys.exit(main())
