"""Keys, certificates and bearer tokens of the own cluster, made anew at each start."""

from __future__ import annotations

import base64
import json
import secrets
from pathlib import Path

from tests.cluster.host import run

USERS = {  # name -> (user, groups): the identities that Kubernetes' built-in RBAC roles expect
    "admin": ("admin", "system:masters"),
    "kubelet": ("system:node:node1", "system:nodes"),
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "proxy": ("system:kube-proxy", ""),
}


def make_certificates(folder: Path, *, addresses: list[str]) -> None:
    """Write a CA, the API server's certificate for `addresses`, its client certificate for the kubelet, and the token key."""
    folder.mkdir(parents=True)
    run("openssl", "genrsa", "-out", folder / "service-accounts.key", "2048")
    run("openssl", "req", "-x509", *_new_key(folder / "ca.key"), "-out", folder / "ca.crt", "-subj", "/CN=test-ca", "-days", "30")
    names = ",".join([*(f"IP:{address}" for address in addresses), "DNS:kubernetes.default.svc"])
    _sign(folder, "api", subject="/CN=kube-apiserver", extension=f"subjectAltName={names}")
    _sign(folder, "kubelet-client", subject="/O=system:masters/CN=kubelet-client", extension="extendedKeyUsage=clientAuth")


def make_users(folder: Path, *, server: str) -> None:
    """Write `tokens.csv` for the API server and `<name>.kubeconfig` for each of `USERS`."""
    authority, lines = base64.b64encode((folder / "ca.crt").read_bytes()).decode(), []
    for name, (user, groups) in USERS.items():
        token = secrets.token_hex(16)
        lines.append(f'{token},{user},{name},"{groups}"\n')
        cluster = {"server": server, "certificate-authority-data": authority}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "otj",
            "contexts": [{"name": "otj", "context": {"cluster": "otj", "user": name}}],
            "clusters": [{"name": "otj", "cluster": cluster}],
            "users": [{"name": name, "user": {"token": token}}],
        }
        (folder / f"{name}.kubeconfig").write_text(json.dumps(config, indent=1))
    (folder / "tokens.csv").write_text("".join(lines))


def _new_key(path: Path) -> list[str | Path]:
    return ["-newkey", "rsa:2048", "-nodes", "-keyout", path]


def _sign(folder: Path, name: str, *, subject: str, extension: str) -> None:
    request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
    extensions.write_text(extension)
    run("openssl", "req", *_new_key(folder / f"{name}.key"), "-out", request, "-subj", subject)
    ca: list[str | Path] = ["-CA", folder / "ca.crt", "-CAkey", folder / "ca.key", "-CAcreateserial"]
    out = folder / f"{name}.crt"
    run("openssl", "x509", "-req", "-in", request, *ca, "-out", out, "-days", "30", "-extfile", extensions)
