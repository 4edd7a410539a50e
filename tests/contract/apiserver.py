"""A real kube-apiserver with etcd and nothing else: no controllers, no kubelet. Tests play those by writing status.

It listens on free loopback ports, keeps everything in one temporary folder, and is up in about five seconds.
"""

from __future__ import annotations

import base64
import json
import secrets
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otj_runtime.pod.ports import free_ports
from tests.cluster.binaries import binaries
from tests.cluster.host import START_SECONDS, run, tool
from tests.cluster.pki import make_certificates

OPERATOR_ACCOUNT = "system:serviceaccount:online-training-system:online-training-operator"

_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "users": [OPERATOR_ACCOUNT]}, {"level": "None"}],
}
"""The operator's requests, and nobody else's."""


@dataclass(frozen=True, kw_only=True)
class ApiServer:
    """A running API server, the folder it lives in and a kubeconfig with every right."""

    url: str
    folder: Path
    admin: Path

    def kubeconfig(self, name: str, token: str) -> Path:
        """Write a kubeconfig that shows `token`."""
        authority = base64.b64encode((self.folder / "pki" / "ca.crt").read_bytes()).decode()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
            "clusters": [{"name": "test", "cluster": {"server": self.url, "certificate-authority-data": authority}}],
            "users": [{"name": name, "user": {"token": token}}],
        }
        path = self.folder / f"{name}.kubeconfig"
        path.write_text(json.dumps(config))
        return path

    def requests(self) -> list[dict[str, Any]]:
        """What the operator asked for since the start, as audit events."""
        return [json.loads(line) for line in (self.folder / "audit.log").read_text().splitlines()]

    def kubectl(self, *arguments: str, stdin: str | None = None, kubeconfig: Path | None = None) -> str:
        """Run kubectl as admin, or with another kubeconfig.

        Raises:
            ClusterError: if it fails; the text holds what it printed.
        """
        return run("kubectl", *arguments, stdin=stdin, env={"KUBECONFIG": str(kubeconfig or self.admin), "NO_PROXY": "127.0.0.1"})


@contextmanager
def api_server(folder: Path, *, plugins: Sequence[str] = ()) -> Iterator[ApiServer]:
    """Start etcd and kube-apiserver, with more admission plugins than the default ones, in `folder`, and end them."""
    etcd, peer, secure = free_ports(3)
    make_certificates(folder / "pki", addresses=["127.0.0.1"])
    token = secrets.token_hex(16)
    (folder / "audit-policy.json").write_text(json.dumps(_AUDIT_POLICY))
    (folder / "tokens.csv").write_text(f'{token},admin,admin,"system:masters"\n')
    url = f"https://127.0.0.1:{secure}"
    with (
        _process(folder, "etcd", _etcd(folder, etcd, peer)),
        _process(folder, "kube-apiserver", _kube_apiserver(folder, etcd, secure, plugins)) as server,
    ):
        started = ApiServer(url=url, folder=folder, admin=folder / "admin.kubeconfig")
        started.kubeconfig("admin", token)
        _wait_until_ready(url, folder, server)
        yield started


@contextmanager
def controllers(server: ApiServer) -> Iterator[None]:
    """The controllers of Kubernetes that act on Jobs: they make pods, judge, clean up. There is still no kubelet."""
    command = [
        str(binaries() / "kube-controller-manager"),
        *(f"--kubeconfig={server.admin}", "--leader-elect=false", "--secure-port=0"),
        "--controllers=job-controller,garbage-collector-controller,ttl-after-finished-controller",
    ]
    with _process(server.folder, "kube-controller-manager", command):
        yield


def _etcd(folder: Path, client: int, peer: int) -> list[str]:
    urls = f"http://127.0.0.1:{client}"
    return [
        *(tool("etcd"), "--data-dir", str(folder / "etcd"), "--unsafe-no-fsync", "--log-level", "warn"),
        *("--listen-client-urls", urls, "--advertise-client-urls", urls, "--listen-peer-urls", f"http://127.0.0.1:{peer}"),
    ]


def _kube_apiserver(folder: Path, etcd: int, secure: int, plugins: Sequence[str]) -> list[str]:
    pki = folder / "pki"
    return [
        str(binaries() / "kube-apiserver"),
        f"--etcd-servers=http://127.0.0.1:{etcd}",
        *("--bind-address=127.0.0.1", f"--secure-port={secure}", "--service-cluster-ip-range=10.0.0.0/24"),
        *(f"--tls-cert-file={pki}/api.crt", f"--tls-private-key-file={pki}/api.key", f"--client-ca-file={pki}/ca.crt"),
        *("--authorization-mode=RBAC", f"--token-auth-file={folder}/tokens.csv", "--allow-privileged=true"),
        *("--service-account-issuer=https://kubernetes.default.svc", f"--service-account-signing-key-file={pki}/service-accounts.key"),
        f"--service-account-key-file={pki}/service-accounts.key",
        *(f"--audit-policy-file={folder}/audit-policy.json", f"--audit-log-path={folder}/audit.log", "--audit-log-mode=batch"),
        *([f"--enable-admission-plugins={','.join(plugins)}"] if plugins else []),
        # No controller makes service accounts here, so pods of tests must not need one.
        "--disable-admission-plugins=ServiceAccount",
    ]


@contextmanager
def _process(folder: Path, name: str, command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / f"{name}.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            process.kill()


def _wait_until_ready(url: str, folder: Path, process: subprocess.Popen[bytes]) -> None:
    trusted = ssl.create_default_context(cafile=str(folder / "pki" / "ca.crt"))
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusted))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if direct.open(f"{url}/readyz", timeout=2).status == 200:
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise RuntimeError(f"kube-apiserver is not ready after {START_SECONDS:.0f} s:\n{(folder / 'kube-apiserver.log').read_text()[-3000:]}")
