"""What of the test cluster's tool can be seen without a cluster."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.cluster import cleanup, host, images, providers
from tests.cluster.host import ClusterError


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host, "STATE", tmp_path)
    monkeypatch.setattr(host, "LOGS", tmp_path / "log")
    return tmp_path


def command(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("docker", "kubeconfig", "provider"),
    [
        (None, None, "own"),
        ("echo 'Cannot connect to the Docker daemon' >&2; exit 1", None, "own"),
        ("exit 0", None, "kind"),
        ("exit 0", "/some/kubeconfig", "external"),
    ],
)
def test_a_given_cluster_comes_before_kind_and_kind_before_our_own(
    docker: str | None, kubeconfig: str | None, provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("OTJ_KUBECONFIG", raising=False)
    if docker is not None:
        command(tmp_path, "docker", docker)
    if kubeconfig is not None:
        monkeypatch.setenv("OTJ_KUBECONFIG", kubeconfig)
    assert providers.choose() == provider


def test_a_failing_command_is_named_with_what_it_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(tmp_path, "fragile", "echo no luck today >&2; exit 3")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ClusterError, match=r"`fragile now` failed with 3:\nno luck today"):
        host.run("fragile", "now")


def test_a_wait_that_is_over_names_the_log_and_its_end(tmp_path: Path) -> None:
    log = tmp_path / "kubelet.log"
    log.write_text("starting\nno cgroup for you\n")
    with pytest.raises(ClusterError, match=rf"no ready node after 0 s; see {log}, which ends with:\nstarting\nno cgroup for you"):
        host.wait_until("ready node", lambda: False, timeout_s=0, log=log)


def test_a_daemon_is_found_by_its_name_and_ended_even_when_it_ignores_the_request(state: Path) -> None:
    host.start_daemon("stubborn", "sh", "-c", "trap '' TERM; echo up; while true; do sleep 0.1; done")
    try:
        host.wait_until("output", lambda: (state / "log/stubborn.log").read_text() == "up\n", timeout_s=20)
        assert host.daemons()[host.daemon_ids("stubborn")[0]] == ("stubborn", state)
    finally:
        host.stop(lambda: host.daemon_ids("stubborn"), grace_s=0.3)
    assert host.daemon_ids("stubborn") == []


def test_the_daemons_of_another_checkout_are_left_alone(state: Path) -> None:
    host.start_daemon("bystander", "sleep", "60")
    # The kernel shows no environment for a moment while it puts a new program in place of the old.
    host.wait_until("bystander", lambda: state in (owner for _, owner in host.daemons().values()), timeout_s=20)
    (process,) = [process for process, (_, owner) in host.daemons().items() if owner == state]
    try:
        with pytest.raises(ClusterError, match=f"a test cluster runs from .*{state}"):
            cleanup.refuse_others()
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_a_blob_that_the_node_has_takes_no_space_but_keeps_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "LAYOUT", tmp_path)
    blob = tmp_path / "blobs/sha256/abc"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(os.urandom(4 << 20))
    assert not images.is_hollow("sha256:abc")
    images.hollow_out("sha256:abc")
    assert images.is_hollow("sha256:abc")
    assert blob.stat().st_size == 4 << 20
