"""Builds the project's two images and puts them into the cluster, with Docker or without.

Without a Docker engine buildah does it, in a chroot instead of a container, which needs no more than root. Its base image is
made from Debian packages, since a test machine may reach no image registry: a base for tests only, with this machine's CA
bundle inside, which a released image never gets. Layers are cached: a change of code rebuilds the last one, in seconds.

Loading sends only what the node lacks. skopeo writes the image as a folder of blobs (an OCI layout); those that containerd has
already are left out of the archive that it imports, so a change of code moves kilobytes and not seven gigabytes. What was sent
is then hollowed out, a sparse file of the same length: enough for skopeo to see that the blob need not be written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster import node
from tests.cluster.cleanup import RUN
from tests.cluster.host import CACHE, REPOSITORY, ClusterError, install_packages, need_root, run, say, tool
from tests.cluster.providers import KIND_NAME, choose, docker_answers, kind

SUITE = "bookworm"
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
LAYOUT = CACHE / "oci"
LABEL = "dev.onlinetraining.test-image"
BUILD_S = 1800
HOLLOW_FROM = 1 << 20
"""Blobs of at least this many bytes are hollowed out once the node has them."""


@dataclass(frozen=True)
class Image:
    """One image of the project: its name in the cluster, its Dockerfile, and the build arguments that tests use."""

    name: str
    dockerfile: str
    arguments: tuple[str, ...] = ()


IMAGES = (
    Image("localhost/online-training-operator:dev", "operator/Dockerfile"),
    Image("localhost/online-training-runtime:dev", "runtime/Dockerfile", ("EXTRA=cpu",)),
)


def make() -> None:
    """Build both images and put them into the cluster; what has not changed is neither built nor sent again."""
    provider = choose()
    docker = docker_answers()
    if provider == "own" and not node.is_up():
        raise ClusterError("no cluster runs to put the images into: `make cluster` first")
    for image in IMAGES:
        started = time.monotonic()
        _build_with_docker(image) if docker else _build_with_buildah(image)
        built = time.monotonic()
        if provider == "kind":
            run(kind(), "load", "docker-image", image.name, "--name", KIND_NAME, timeout_s=BUILD_S)
        elif provider == "own":
            _load(image.name)
        say(f"{image.name}: built in {built - started:.1f} s, loaded in {time.monotonic() - built:.1f} s")
    if provider == "external":
        names = ", ".join(image.name for image in IMAGES)
        say(f"built {names}. Nothing is put into the nodes of OTJ_KUBECONFIG: push them to a registry that it pulls from")


def _build_with_docker(image: Image) -> None:
    arguments = [f"--build-arg={argument}" for argument in image.arguments]
    if base := os.environ.get("OTJ_BASE_IMAGE"):
        arguments.append(f"--build-arg=BASE_IMAGE={base}")
    run("docker", "build", *arguments, "-t", image.name, "-f", image.dockerfile, ".", cwd=REPOSITORY, timeout_s=BUILD_S)


def _build_with_buildah(image: Image) -> None:
    need_root("building images without Docker")
    install_packages({"buildah": "buildah", "skopeo": "skopeo"})
    base = os.environ.get("OTJ_BASE_IMAGE") or _base_image()
    arguments = [f"--build-arg={argument}" for argument in (f"BASE_IMAGE={base}", *image.arguments)]
    command = ("bud", "--isolation", "chroot", "--layers", "--label", f"{LABEL}=1", *arguments, "-t", image.name)
    run("buildah", *command, "-f", image.dockerfile, ".", cwd=REPOSITORY, timeout_s=BUILD_S)
    replaced = run("buildah", "images", "--quiet", "--filter", "dangling=true", "--filter", f"label={LABEL}").split()
    if replaced:
        try:
            run("buildah", "rmi", *replaced)
        except ClusterError as error:  # a build that was killed left a container on one of them: that costs disk, not the tests
            say(f"images that were replaced could not all be removed: {error}")


def _base_image() -> str:
    """Debian with Python and this machine's CA bundle; made once, and again when the bundle changes."""
    name = f"localhost/otj-test-base:{SUITE}-{hashlib.sha256(CA_BUNDLE.read_bytes()).hexdigest()[:12]}"
    if name in run("buildah", "images", "--format", "{{.Name}}:{{.Tag}}").split():
        return name
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    install_packages({"debootstrap": "debootstrap", keys: "debian-archive-keyring"})
    say(f"making the base image {name} (under a minute, once per machine)")
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        packages = "--include=python3,python3-venv,ca-certificates"
        run("debootstrap", "--variant=minbase", f"--keyring={keys}", packages, SUITE, scratch, timeout_s=600)
        shutil.rmtree(f"{scratch}/var/cache/apt")
        shutil.copy(CA_BUNDLE, f"{scratch}{CA_BUNDLE}")
        container = run("buildah", "from", "scratch").strip()
        run("buildah", "add", "--quiet", container, scratch, "/", timeout_s=120)
        variables = [f"{name}={CA_BUNDLE}" for name in ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE")]
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        run("buildah", "config", *(f"--env={variable}" for variable in (path, *variables)), container)
        run("buildah", "commit", "--quiet", "--rm", container, name, timeout_s=120)
    return name


def _load(name: str) -> None:
    present = set(node.ctr("content", "list", "-q").split())
    manifest = _export(name)
    missing = [digest for digest in _blobs(manifest["digest"]) if digest not in present]
    if any(is_hollow(digest) for digest in missing):  # the node's image store was lost meanwhile: export in full
        shutil.rmtree(LAYOUT)
        manifest = _export(name)
    if manifest["digest"] != (old := _node_manifest(name)):
        stale = _config(old) if old else None
        _import(name, manifest, missing)
        if stale:  # the kubelet's runtime knows each image by this name too, which would keep the old layers for ever
            node.ctr("images", "remove", "--sync", stale)
    for digest in _blobs(manifest["digest"]):
        hollow_out(digest)


def _export(name: str) -> dict[str, Any]:
    """Write the image into the layout folder; the descriptor of its manifest."""
    LAYOUT.mkdir(parents=True, exist_ok=True)
    tag = name.rpartition("/")[2].replace(":", "-")
    # Uncompressed, a layer keeps the digest that buildah knows it by, so one that is there is recognised and not written again.
    options = ("copy", "--quiet", "--dest-oci-accept-uncompressed-layers")
    run("skopeo", *options, f"containers-storage:{name}", f"oci:{LAYOUT}:{tag}", timeout_s=BUILD_S)
    manifests = json.loads((LAYOUT / "index.json").read_text())["manifests"]
    key = "org.opencontainers.image.ref.name"  # earlier pushes of the tag are listed too, without it
    found: dict[str, Any] = next(entry for entry in manifests if entry.get("annotations", {}).get(key) == tag)
    return found


def _import(name: str, manifest: dict[str, Any], blobs: list[str]) -> None:
    index = {"schemaVersion": 2, "manifests": [{**manifest, "annotations": {"io.containerd.image.name": name}}]}
    command = [tool("ctr"), "-a", str(RUN / "containerd.sock"), "-n", "k8s.io", "images", "import", "-"]
    with (
        tempfile.TemporaryDirectory() as scratch,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as importer,
    ):
        Path(scratch, "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        Path(scratch, "index.json").write_text(json.dumps(index))
        with tarfile.open(fileobj=importer.stdin, mode="w|") as archive:
            archive.add(scratch, arcname="", recursive=True)
            for digest in blobs:
                archive.add(_path(digest), arcname=f"blobs/{digest.replace(':', '/')}")
        output, _ = importer.communicate(timeout=BUILD_S)
    if importer.returncode:
        raise ClusterError(f"the node did not take {name}: {output.decode(errors='replace')[-2000:]}")


def _blobs(manifest_digest: str) -> list[str]:
    manifest = json.loads(_path(manifest_digest).read_text())
    return [manifest_digest, manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]


def _path(digest: str) -> Path:
    return LAYOUT / "blobs" / digest.replace(":", "/")


def hollow_out(digest: str) -> None:
    """Free the space of a large blob of the layout, keeping its length."""
    blob = _path(digest)
    size = blob.stat().st_size
    if size >= HOLLOW_FROM:
        os.truncate(blob, 0)
        os.truncate(blob, size)


def is_hollow(digest: str) -> bool:
    """Whether a blob of the layout was hollowed out."""
    found = _path(digest).stat()
    return found.st_size >= HOLLOW_FROM and found.st_blocks * 512 < found.st_size // 2


def _node_manifest(name: str) -> str | None:
    """The digest of the manifest that the node has under `name`."""
    found = re.search(r"sha256:[0-9a-f]{64}", node.ctr("images", "list", f"name=={name}"))
    return found[0] if found else None


def _config(manifest_digest: str) -> str:
    """The digest of an image's configuration, by which the kubelet's runtime names it, as the node's store has it."""
    config: str = json.loads(node.ctr("content", "get", manifest_digest))["config"]["digest"]
    return config
