"""What users write reaches processes as whole arguments or as data: no shell reads it, and no secret is copied out of its Secret."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from otj_runtime.api import parse_job
from otj_runtime.pod.manifest import build_job
from tests.unit.api.specs import changed

Object = dict[str, Any]

HOSTILE = ["$(reboot)", "; rm -rf /", "`id`", "a b'c\"d", "--flag=0.0.0.0", "| tee /etc/passwd", "\n#"]
SHELLS = {"sh", "bash", "dash", "ash", "zsh", "env", "eval", "xargs"}


def containers(spec: Object) -> Iterator[Object]:
    document = changed(spec)
    document["metadata"]["uid"] = "1"
    pod = build_job(parse_job(document), default_image="x")["spec"]["template"]["spec"]
    yield from pod["initContainers"] + pod["containers"]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    "spec",
    [
        lambda text: {"dataset": {"path": f"/data/{text}.jsonl"}, "rewards": [{"function": "my.reward"}]},
        lambda text: {"model": {"path": f"/models/{text}"}},
        lambda text: {"rewards": [{"function": "my.reward", "args": {"a": text}}]},
        lambda text: {"dataset.args": {"a": text}},
        lambda text: {"env": [{"name": "MINE", "value": text}]},
        lambda text: {"generation.extraArgs": [text]},
    ],
    ids=["dataset", "model", "reward", "task", "env", "extraArgs"],
)
def test_no_shell_ever_reads_what_a_user_wrote(spec: Any, text: str) -> None:
    for container in containers(spec(text)):
        words = [*container["command"], *container.get("args", [])]
        assert not {word.rsplit("/", 1)[-1] for word in words[:1]} & SHELLS
        # The user's words are never joined into something longer that a program takes apart again, other than JSON.
        carriers = [word for word in words if text in word and not word.startswith(("/", "{", text))]
        assert carriers == []


def test_a_token_stays_in_its_secret() -> None:
    reference = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    for container in containers({"env": [reference]}):
        if any(variable["name"] == "HF_TOKEN" for variable in container["env"]):
            assert reference in container["env"]
        assert "hub" not in json.dumps([container["command"], container.get("args", [])])


def test_only_the_trainers_progress_port_is_not_on_loopback() -> None:
    by_name = {container["name"]: container for container in containers({})}
    assert [port["name"] for container in by_name.values() for port in container.get("ports", [])] == ["progress"]
    command = by_name["generator"]["command"]
    assert command[command.index("--host") + 1] == "127.0.0.1"


@pytest.mark.parametrize("name", ["model", "generator", "trainer"])
def test_every_container_passes_the_restricted_standard_on_a_read_only_root(name: str) -> None:
    (container,) = (container for container in containers({}) if container["name"] == name)
    security = container["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize("text", ["Solve $$x^2$$.", "$(HOME)", "\\$(HOME)", "$"])
def test_text_with_dollars_reaches_the_trainer_as_it_was_written(text: str) -> None:
    """In the value of a variable Kubernetes replaces $(NAME), and $$ by $."""
    (trainer,) = (container for container in containers({"dataset.args": {"instruction": text}}) if container["name"] == "trainer")
    (value,) = (variable["value"] for variable in trainer["env"] if variable["name"] == "OTJ_CONFIG")
    assert "$" not in value
    assert json.loads(value)["dataset"]["args"] == {"instruction": text}
