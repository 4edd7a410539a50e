"""Weights on their way into a real vLLM server, and the proof that they arrived."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from otj_runtime.api import DType
from otj_runtime.pod.errors import GeneratorNotReady
from otj_runtime.pod.names import GENERATE_ROUTE
from otj_runtime.pod.ports import free_port
from otj_runtime.pod.transfer import Transfer
from otj_runtime.rollout.types import Completion
from otj_runtime.rollout.vllm_engine import parse_choice
from otj_runtime.train.generator import make_weights, pod_generator
from otj_runtime.weights.control import GeneratorControl
from otj_runtime.weights.errors import WeightsDiverged, WeightSyncFailed
from otj_runtime.weights.install import Installer, Phases
from otj_runtime.weights.layout import Layout, Ticket
from otj_runtime.weights.mailbox import MailboxWriter
from otj_runtime.weights.probe import EXACT_BOUND, random_sequences, trainer_scores
from otj_runtime.weights.sync import WeightSync
from otj_runtime.weights.tensors import policy_tensors
from tests.integration.conftest import Generator
from tests.integration.deadlines import HANG_SECONDS
from tests.integration.models import VOCABULARY

pytestmark = pytest.mark.integration

FAMILIES = ["embed_tokens", "norm", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEQUENCES = random_sequences(VOCABULARY)
PROMPT = [5, 6, 7, 8]
OWN_ROUTE = "/inference/v1/generate"


# The runs of test_otj_run.py have an untied output layer, proven at every sync.
@pytest.fixture(params=["tied", pytest.param("untied", marks=pytest.mark.nightly)])
def server(request: pytest.FixtureRequest, generator: Callable[..., Generator]) -> Generator:
    """A generator of a model with and without tied embeddings."""
    return generator(request.getfixturevalue(f"{request.param}_model"))


@pytest.fixture
def tied_server(generator: Callable[..., Generator], tied_model: Path) -> Generator:
    return generator(tied_model)


def _load(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def _sync(server: Generator, model: Any, *, delta: bool = False) -> WeightSync:
    return WeightSync(
        model=model,
        directory=Path(server.config.mailbox),
        control=server.control,
        dtype=DType.FLOAT32,
        ready_timeout_s=HANG_SECONDS,
        delta=delta,
    )


def _perturb(model: Any, family: str, *, seed: int = 0, every: int = 1, by: float = 0.1) -> int:
    """Change one element of so many of every parameter of a family, by that share of the mean; return the number of parameters."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [parameter for name, parameter in model.named_parameters() if family in name]
    with torch.no_grad():
        for parameter in chosen:
            noise = by * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
            parameter.view(-1)[::every] += noise.view(-1)[::every]
    return len(chosen)


def _scores(server: Generator) -> list[list[float]]:
    """What the only engine gives the probe."""
    (scores,) = server.control.score(SEQUENCES)
    return scores


def _largest_difference(left: list[list[float]], right: list[list[float]]) -> float:
    return max(abs(a - b) for row, other in zip(left, right, strict=True) for a, b in zip(row, other, strict=True))


def test_after_a_push_the_generator_serves_the_trainers_weights_instead_of_its_dummy_ones(server: Generator) -> None:
    sync = _sync(server, _load(server.model))
    report = sync.push(0)
    assert server.control.weight_version() == "0"
    assert _proven(sync, 0) <= EXACT_BOUND
    assert report.attempts == 1
    assert report.bytes == 4 * sum(tensor.numel() for tensor in policy_tensors(_load(server.model)).values())


def test_every_family_of_parameters_arrives(server: Generator) -> None:
    model = _load(server.model)
    sync = _sync(server, model)
    sync.push(10)
    _families_arrive(server, sync, model, [*FAMILIES, *(["lm_head"] if not model.config.tie_word_embeddings else [])])


# transformers keeps the experts of a layer in two tensors, checkpoints keep two for each expert. vLLM's loader knows both.
def test_experts_and_their_router_arrive(generator: Callable[..., Generator], mixture_model: Path) -> None:
    server, model = generator(mixture_model), _load(mixture_model)
    sync = _sync(server, model)
    sync.push(10)
    assert _proven(sync, 10) <= EXACT_BOUND
    _families_arrive(server, sync, model, ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.", "o_proj"])


def _families_arrive(server: Generator, sync: WeightSync, model: Any, families: list[str]) -> None:
    for version, family in enumerate(families, start=11):
        before = _scores(server)
        assert _perturb(model, family) > 0
        sync.push(version)
        assert _proven(sync, version) <= EXACT_BOUND
        # The change was large enough that the probe would have missed it.
        assert _largest_difference(before, _scores(server)) > 5 * EXACT_BOUND, family


def test_a_corrupted_mailbox_is_refused_and_the_previous_weights_go_on_serving(tied_server: Generator) -> None:
    model = _load(tied_server.model)
    sync = _sync(tied_server, model)
    sync.push(30)
    before = _scores(tied_server)
    path = Path(tied_server.config.mailbox) / "policy.mailbox"
    _perturb(model, "proj")
    layout = _layout(model)
    writer = MailboxWriter(path, layout)
    ticket = _publish(writer, model, version=31)
    with path.open("r+b") as file:
        # Both slots: the damage must hit the one that was published.
        for slot in (0, 1):
            file.seek(layout.slots_offset + slot * layout.slot_bytes + layout.tensors[5].offset)
            file.write(b"\xff\xff\xff\xff")
    with pytest.raises(
        WeightSyncFailed, match=f"update: .*tensor {layout.tensors[5].name} of version 31 does not fit its checksum"
    ) as caught:
        _install(tied_server, writer, ticket)
    assert caught.value.phase == "update"
    assert tied_server.control.weight_version() == "30"
    assert _scores(tied_server) == before
    assert sync.push(32).attempts == 1


def test_a_model_of_another_shape_is_refused_with_the_phase(tied_server: Generator) -> None:
    model = _load(tied_server.model)
    sync = _sync(tied_server, model)
    sync.push(33)
    path = Path(tied_server.config.mailbox) / "policy.mailbox"
    del model.model.layers[1]
    writer = MailboxWriter.create(path, _layout(model))
    ticket = _publish(writer, model, version=34)
    with pytest.raises(WeightSyncFailed, match=r"install: .*version 34 brings nothing for \d+ parameters, the first is model.layers.1"):
        _install(tied_server, writer, ticket)
    assert tied_server.control.weight_version() == "33"
    sync = _sync(tied_server, _load(tied_server.model))
    sync.push(35)
    assert _proven(sync, 35) <= EXACT_BOUND


def test_a_trainer_that_is_another_model_than_it_sends_diverges(tied_server: Generator) -> None:
    model = _load(tied_server.model)
    model.model.norm.register_forward_hook(lambda module, args, output: output * 1.01)
    sync = _sync(tied_server, model)
    sync.push(40)
    with pytest.raises(WeightsDiverged, match=r"policy version 40 \(float32\): .* Worst: token \d+ at position"):
        sync.proven(40)


def test_a_request_in_flight_goes_on_with_the_new_weights_and_each_token_names_those_that_gave_it(tied_server: Generator) -> None:
    model = _load(tied_server.model)
    sync = _sync(tied_server, model)
    sync.push(50)
    policies = {50: copy.deepcopy(model)}
    choices: list[dict[str, Any]] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():  # whichever side is the faster one, something is under way at an installation
            choices.extend(_generate(tied_server.url, tokens=100, count=48)["choices"])

    asking = threading.Thread(target=ask)
    asking.start()
    versions = [51, 52, 53]
    try:
        for version in versions:
            _perturb(model, "proj", seed=version)
            sync.push(version)
            policies[version] = copy.deepcopy(model)
            assert _proven(sync, version) <= EXACT_BOUND
    finally:
        over.set()
        asking.join(timeout=HANG_SECONDS)
    spans = [choice["weight_versions"] for choice in choices]
    assert [row[-1]["end"] for row in spans] == [len(choice["token_ids"]) for choice in choices]
    for row in spans:
        seen = [int(span["version"]) for span in row]
        assert seen == sorted(seen)
        assert set(seen) <= {50, *versions}
        assert [span["start"] for span in row] == [0, *(span["end"] for span in row[:-1])]
    mixed = [completion for choice in choices if (completion := parse_choice(choice, 50)).spans]
    assert mixed, "no request was in flight at an install"
    for completion in mixed[:8]:
        assert completion.logprobs == pytest.approx(_replayed(policies, PROMPT, completion), abs=EXACT_BOUND)


@pytest.mark.nightly  # test_otj_run.py has a run whose generator is killed; here are the corners
def test_a_restarted_generator_gets_the_current_version_back_from_the_mailbox(tied_server: Generator) -> None:
    model = _load(tied_server.model)
    _perturb(model, "proj", seed=60)
    sync = _sync(tied_server, model)
    sync.push(60)
    assert _proven(sync, 60) <= EXACT_BOUND
    scores = _scores(tied_server)
    _perturb(model, "proj", seed=61)  # the trainer has moved on; the mailbox has not
    tied_server.kill()
    assert tied_server.control.weight_version() is None
    tied_server.start()
    sync.reinstall()
    assert tied_server.control.weight_version() == "60"
    assert _largest_difference(_scores(tied_server), scores) <= EXACT_BOUND
    sync.reinstall()  # nothing to do
    sync.push(61)
    assert _proven(sync, 61) <= EXACT_BOUND


def test_when_the_engine_dies_the_call_that_it_was_to_answer_ends_and_the_server_after_it(tied_server: Generator) -> None:
    (engine,) = tied_server.engines()
    os.kill(engine, signal.SIGSTOP)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(tied_server.control.install, 5)
        time.sleep(1)  # for the call to be with the engine
        assert not waiting.done()
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(WeightSyncFailed, match=r"/otj/install with 500: the engine has died"):
            waiting.result(HANG_SECONDS)
    tied_server.wait_ended()
    tied_server.start()


def test_deltas_arrive_as_whole_weights_do_and_come_back_after_a_restart(tied_server: Generator) -> None:
    model = _load(tied_server.model)
    sync = _sync(tied_server, model, delta=True)
    whole = sync.push(80)
    for version, family in enumerate(["embed_tokens", "norm", "q_proj", "down_proj"], start=81):
        before = _scores(tied_server)
        _perturb(model, family, every=40, by=4.0)
        report = sync.push(version)
        assert (report.attempts, report.patched) == (1, True)
        assert report.bytes <= whole.bytes / 10
        assert _proven(sync, version) <= EXACT_BOUND
        assert _largest_difference(before, _scores(tied_server)) > 5 * EXACT_BOUND, family
    tied_server.control.init_transfer(str(Path(tied_server.config.mailbox) / "policy.mailbox"), None)  # as a restart: it knows nothing
    tied_server.control.label(0)
    sync.reinstall()
    assert tied_server.control.weight_version() == "84"
    _perturb(model, "proj")
    report = sync.push(85)
    assert (report.attempts, report.patched) == (1, False)  # too many changes
    assert _proven(sync, 85) <= EXACT_BOUND


def test_a_trainer_that_speaks_vllms_own_interface_reaches_the_generator(tied_server: Generator) -> None:
    from vllm.distributed.weight_transfer.base import ModuleSource
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.plugins import load_general_plugins

    from otj_runtime.weights.vllm_trainer import MailboxTrainerInitInfo

    load_general_plugins()
    model = _load(tied_server.model)
    info = MailboxTrainerInitInfo(path=f"{tied_server.config.mailbox}/other.mailbox", dtype="float32", rank=0)
    engine = WeightTransferTrainerFactory.trainer_init(info, client=HTTPVLLMWeightSyncClient(tied_server.url), source=ModuleSource(model))
    Installer(tied_server.control, Path(info.path), None).open()  # of a trainer that is gone
    for version in ("1", "2"):
        _perturb(model, "proj", seed=int(version))
        engine.send_weights()
        assert tied_server.control.weight_version() == version
        tied_server.control.reset_prefix_cache()
        scores = trainer_scores(model, SEQUENCES, DType.FLOAT32).logprobs
        assert _largest_difference(_scores(tied_server), scores) <= EXACT_BOUND


def test_an_absent_generator_fails_the_push_after_its_deadline(tied_model: Path, tmp_path: Path) -> None:
    control = GeneratorControl(f"http://127.0.0.1:{free_port()}")
    sync = WeightSync(model=_load(tied_model), directory=tmp_path, control=control, dtype=DType.FLOAT32, ready_timeout_s=0.5)
    with pytest.raises(GeneratorNotReady, match=r"readyTimeoutSeconds"):
        sync.push(0)
    with pytest.raises(WeightSyncFailed, match="nothing was pushed yet"):
        sync.reinstall()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_three_ranks_push_together(tied_server: Generator, tmp_path: Path, strategy: str) -> None:
    store = f"tcp://127.0.0.1:{free_port()}"
    outputs = [tmp_path / f"{rank}.json" for rank in range(3)]
    arguments = [str(tied_server.model), tied_server.url, tied_server.config.mailbox, strategy]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.push_rank", str(rank), "3", store, str(output), *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank, output in enumerate(outputs)
    ]
    assert [rank.wait(timeout=HANG_SECONDS) for rank in ranks] == [0, 0, 0]
    seen = [json.loads(output.read_text()) for output in outputs]
    # Every rank gets the same report, and the same error where the probe failed.
    assert seen[0] == seen[1] == seen[2]
    assert [entry["version"] for entry in seen[0]["reports"]] == [70, 71]
    assert all(entry["max_abs"] <= EXACT_BOUND for entry in seen[0]["reports"])
    assert "policy version 72 (float32): trainer and generator disagree" in seen[0]["error"]


def _layout(model: Any) -> Layout:
    return Layout.of(((name, tuple(tensor.shape)) for name, tensor in policy_tensors(model).items()), torch.float32)


def _proven(sync: WeightSync, version: int) -> float:
    """Largest difference that the probe found; the version was right at once."""
    proof = sync.proven(version)
    assert not proof.again
    return proof.agreement.max_abs


def _publish(writer: MailboxWriter, model: Any, *, version: int) -> Ticket:
    """Publish the model as `version`, without asking the generator to install it."""
    ticket = writer.begin(version)
    writer.write(ticket, policy_tensors(model).items())
    writer.publish(ticket)
    return ticket


def _install(server: Generator, writer: MailboxWriter, ticket: Ticket) -> None:
    installer = Installer(server.control, Path(server.config.mailbox) / "policy.mailbox")
    installer.begin(ticket, Phases())
    installer.end(ticket, writer.receipts, Phases())


def _replayed(policies: dict[int, Any], prompt: list[int], completion: Completion) -> list[float]:
    """Log-probabilities of a completion's tokens, each from the weights that it names, on keys and values that stay those of the weights
    which read the token: what a request goes on with after an install."""
    found: list[float] = []
    unread, cache = prompt, DynamicCache()
    with torch.no_grad():
        for span in completion.spans:
            for token in completion.token_ids[span.start : span.end]:
                output = policies[span.version](torch.tensor([unread]), past_key_values=cache)
                found.append(float(output.logits[0, -1].log_softmax(-1)[token]))
                unread = [token]
    return found


def test_the_short_answer_says_what_vllms_own_says(tied_server: Generator) -> None:
    _sync(tied_server, _load(tied_server.model)).push(90)
    short, own = (_generate(tied_server.url, tokens=20, count=1, temperature=0.0, route=route) for route in (GENERATE_ROUTE, OWN_ROUTE))
    for ours, theirs in zip(short["choices"], own["choices"], strict=True):
        assert {name: ours[name] for name in ("index", "token_ids", "finish_reason", "weight_versions")} == {
            name: theirs[name] for name in ("index", "token_ids", "finish_reason", "weight_versions")
        }
        assert ours["logprobs"] == pytest.approx([entry["logprob"] for entry in theirs["logprobs"]["content"]], abs=1e-5)


@pytest.mark.parametrize(("tokens", "model", "status"), [(-1, "policy", 400), (4, "nobody", 404)])
def test_the_short_route_refuses_as_vllms_own(tied_server: Generator, tokens: int, model: str, status: int) -> None:
    for route in (GENERATE_ROUTE, OWN_ROUTE):
        with pytest.raises(urllib.error.HTTPError) as refused:
            _generate(tied_server.url, tokens=tokens, count=1, model=model, route=route)
        assert refused.value.code == status


def _generate(
    url: str, *, tokens: int, count: int, temperature: float = 1.0, model: str = "policy", route: str = GENERATE_ROUTE
) -> dict[str, Any]:
    parameters = {"n": count, "max_tokens": tokens, "temperature": temperature, "logprobs": 0, "output_kind": 2, "ignore_eos": True}
    body = json.dumps({"model": model, "token_ids": PROMPT, "sampling_params": parameters}).encode()
    request = urllib.request.Request(url + route, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=HANG_SECONDS) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def test_a_hand_over_that_fails_leaves_a_generator_that_serves_and_takes_the_mailbox(tied_server: Generator) -> None:
    model = _load(tied_server.model)
    sync = _sync(tied_server, model)
    sync.push(70)
    info = {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2}  # no CPU speaks NCCL
    with pytest.raises(WeightSyncFailed, match="init: the generator answered POST /init_weight_transfer_engine with 500"):
        tied_server.control.relay("init_weight_transfer_engine", {"init_info": {"backend": "nccl", "init_info": info}})
    before = _scores(tied_server)
    _perturb(model, "proj")
    sync = _sync(tied_server, model)
    sync.push(71)
    assert _proven(sync, 71) <= EXACT_BOUND
    assert _largest_difference(before, _scores(tied_server)) > 5 * EXACT_BOUND


def test_a_generator_that_was_held_goes_on_with_what_is_installed(tied_server: Generator) -> None:
    model = _load(tied_server.model)
    sync = _sync(tied_server, model)
    sync.push(80)
    _proven(sync, 80)
    before = _scores(tied_server)
    tied_server.control.hold()
    _perturb(model, "proj")
    sync.push(81)
    assert _proven(sync, 81) <= EXACT_BOUND  # it answers again
    assert _largest_difference(before, _scores(tied_server)) > 5 * EXACT_BOUND


def test_where_the_generator_computes_is_seen_by_the_probe_and_named_in_the_reason(tied_server: Generator, tmp_path: Path) -> None:
    model = _load(tied_server.model)
    wanted = dataclasses.replace(pod_generator(tied_server.config), wish="nccl", note=tmp_path)
    weights = make_weights(wanted, model=model, control=tied_server.control, prompts=[])
    assert weights.push(90).attempts == 1
    assert weights.proven(90).agreement.max_abs <= EXACT_BOUND
    assert Transfer.read(tmp_path) == Transfer(
        "mailbox", "nccl was asked for, but nccl is not possible: it goes from GPU to GPU, and one side computes on a CPU"
    )
