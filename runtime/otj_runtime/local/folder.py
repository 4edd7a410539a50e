"""The folder of a run: what is kept between runs of one job, what is made anew, and who may use it.

<run dir>/job.yaml          the job, as last run
          output/           checkpoints, metrics.jsonl, the final model, caches    kept
          volumes/<name>/   the job's volumes that no --volume names               kept
          logs/             model.log, generator.log, trainer.log                  of this run
          scratch/          the pod's /tmp                                         of this run
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from otj_runtime.api import InvalidJobError, OnlineTrainingJob, parse_job
from otj_runtime.local.options import UsageError

SHARED_MEMORY = Path("/dev/shm")

_IDENTITY = ("algorithm", "model", "dataset")
"""Fields that a resumed run must have in common with the run whose checkpoints it goes on from."""

_KEPT_WHEN_CLEANED = ".cache"


class RunFolder:
    """The folder `root` of a run."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.output = self.root / "output"
        self.volumes = self.root / "volumes"
        self.logs = self.root / "logs"
        self.scratch = self.root / "scratch"
        self.termination = self.root / "termination.json"
        # The name follows from the folder, so that a run that was killed leaves nothing that the next one does not find.
        self.shared_memory = SHARED_MEMORY / f"otj-{os.getuid()}-{hashlib.sha256(str(self.root).encode()).hexdigest()[:12]}"

    def log(self, container: str) -> Path:
        """The log of a container."""
        return self.logs / f"{container}.log"

    @contextmanager
    def held(self, job: OnlineTrainingJob, *, clean: bool) -> Iterator[None]:
        """Make the folder ready for `job` and keep others out of it meanwhile.

        Raises:
            UsageError: if another run uses it, or it holds the checkpoints of a different job.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{self.root} is in use by another `otj run`; give this one another --run-dir") from None
            try:
                self._prepare(job, clean=clean)
                yield
            finally:
                shutil.rmtree(self.shared_memory, ignore_errors=True)

    def _prepare(self, job: OnlineTrainingJob, *, clean: bool) -> None:
        if clean:
            self._remove_output()
        else:
            self._refuse_another(job)
        for folder in (self.logs, self.scratch, self.shared_memory):
            shutil.rmtree(folder, ignore_errors=True)
        self.termination.unlink(missing_ok=True)
        for folder in (self.output, self.logs, self.scratch, self.shared_memory):
            folder.mkdir(parents=True, exist_ok=True)
        self._job_file.write_text(yaml.safe_dump(job.to_wire(), sort_keys=False))

    @property
    def _job_file(self) -> Path:
        return self.root / "job.yaml"

    def _remove_output(self) -> None:
        """Checkpoints, metrics and the final model; caches hold nothing of a run."""
        for entry in self.output.iterdir() if self.output.is_dir() else ():
            if entry.name == _KEPT_WHEN_CLEANED:
                continue
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def _refuse_another(self, job: OnlineTrainingJob) -> None:
        try:
            earlier = parse_job(yaml.safe_load(self._job_file.read_text()))
        except (FileNotFoundError, InvalidJobError, yaml.YAMLError):
            return
        names = [f"spec.{name}" for name in _IDENTITY if getattr(earlier.spec, name) != getattr(job.spec, name)]
        names += ["metadata.name"] if earlier.metadata.name != job.metadata.name else []
        if names:
            raise UsageError(
                f"{self.root} holds another run ({', '.join(names)} differ): give --run-dir to keep it, or --clean to start over in its place"
            )
