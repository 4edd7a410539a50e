"""One training rank of the weight sync's tests: pushes twice, then as a model that computes something else than it sends."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from otj_runtime.api import DType
from otj_runtime.weights.control import GeneratorControl
from otj_runtime.weights.errors import WeightsDiverged
from otj_runtime.weights.sync import SyncReport, WeightSync
from tests.integration.deadlines import HANG_SECONDS


def main() -> None:
    rank, size, store, output, model_path, url, mailbox, strategy = sys.argv[1:]
    dist.init_process_group("gloo", init_method=store, rank=int(rank), world_size=int(size), timeout=timedelta(seconds=HANG_SECONDS))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    if strategy == "fsdp2":
        _shard(model, int(size))
    sync = WeightSync(model=model, directory=Path(mailbox), control=GeneratorControl(url), dtype=DType.FLOAT32)
    reports = [_facts(sync.push(70), sync)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    reports.append(_facts(sync.push(71), sync))
    model.model.norm.register_forward_hook(lambda module, args, out: out * 1.01)
    sync.push(72)
    try:
        sync.proven(72)
        error = ""
    except WeightsDiverged as divergence:
        error = str(divergence)
    Path(output).write_text(json.dumps({"reports": reports, "error": error}))
    dist.barrier()


def _shard(model: torch.nn.Module, size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _facts(report: SyncReport, sync: WeightSync) -> dict[str, float]:
    return {"version": report.version, "bytes": report.bytes, "max_abs": sync.proven(report.version).agreement.max_abs}


if __name__ == "__main__":
    main()
