"""The own cluster: etcd, the control plane, containerd and a kubelet as plain processes of this machine.

Everything but images starts empty each time: that takes seconds and leaves no half state to repair. Where things lie:
`STATE` (build/cluster) has configuration, keys, logs, etcd and the kubelet's folder; `RUN` has sockets and mounts, because a
socket's path may have 107 characters at most; the image store is in `CACHE`, so that images outlive a cluster and a clone.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from pathlib import Path

from tests.cluster import cleanup, pki
from tests.cluster.binaries import binaries
from tests.cluster.cleanup import BRIDGE, RUN
from tests.cluster.host import (
    CACHE,
    KUBECONFIG,
    LOGS,
    START_SECONDS,
    STATE,
    daemons,
    install_packages,
    kubectl,
    need_root,
    run,
    say,
    start_daemon,
    succeeds,
    wait_until,
)

NODE_IP = "10.213.0.1"  # the bridge's own address: reachable from the host and from every pod, with no other network up
POD_NETWORK, SERVICE_NETWORK = "10.213.0.0/24", "10.214.0.0/16"
PAUSE = "localhost/pause:3.10"
DAEMONS = {"etcd", "apiserver", "containerd", "controller-manager", "scheduler", "kubelet", "proxy"}
PACKAGES = {
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "iptables": "iptables",
    "ip": "iproute2",
    "conntrack": "conntrack",
    "openssl": "openssl",
    "sysctl": "procps",
}


def is_up() -> bool:
    """Whether every daemon of this checkout's cluster runs and its node is ready."""
    running = {name for name, state in daemons().values() if state == STATE}
    if not running >= DAEMONS:
        return False
    _link_kubeconfig()  # it may lead to the cluster of an OTJ_KUBECONFIG meanwhile
    return succeeds(_node_is_ready)


def up() -> None:
    """Start the cluster; the caller has seen that it is not up.

    Raises:
        ClusterError: Something is missing, another cluster is in the way, or a step passed its deadline.
    """
    need_root("the one-node cluster")
    cleanup.refuse_others()
    install_packages(PACKAGES)
    components = binaries()
    cleanup.clean()
    say("starting etcd, the control plane, containerd and the kubelet")
    _make_network()
    pki.make_certificates(STATE / "pki", addresses=["127.0.0.1", NODE_IP, SERVICE_NETWORK.replace("0.0/16", "0.1")])
    pki.make_users(STATE / "pki", server=f"https://{NODE_IP}:6443")
    _link_kubeconfig()
    _start_containerd()
    _start_api_server(components)
    _start_controllers(components)
    _import_pause(components / "pause")
    _start_kubelet(components)
    wait_until("ready node", _node_is_ready, timeout_s=START_SECONDS, log=LOGS / "kubelet.log")
    account = ("get", "serviceaccount", "default", "-n", "default")  # before it exists no pod is admitted
    wait_until("default service account", lambda: kubectl(*account), timeout_s=START_SECONDS, log=LOGS / "controller-manager.log")


def ctr(*arguments: str | Path, timeout_s: float = 60) -> str:
    """Run containerd's client in the namespace of Kubernetes."""
    return run("ctr", "-a", RUN / "containerd.sock", "-n", "k8s.io", *arguments, timeout_s=timeout_s)


def _link_kubeconfig() -> None:
    KUBECONFIG.unlink(missing_ok=True)
    KUBECONFIG.symlink_to("pki/admin.kubeconfig")


def _node_is_ready() -> bool:
    conditions = 'jsonpath={.status.conditions[?(@.type=="Ready")].status}'
    return kubectl("get", "node", "node1", "-o", conditions, "--request-timeout=3s") == "True"


def _make_network() -> None:
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "address", "add", f"{NODE_IP}/24", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    addresses = {"type": "host-local", "dataDir": str(RUN / "addresses"), "ranges": [[{"subnet": POD_NETWORK}]]}
    bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "hairpinMode": True}
    bridge["ipam"] = {**addresses, "routes": [{"dst": "0.0.0.0/0"}]}
    network = {"cniVersion": "0.4.0", "name": BRIDGE, "plugins": [bridge]}
    (STATE / "cni").mkdir(parents=True)
    (STATE / "cni" / "bridge.conflist").write_text(json.dumps(network))


def _start_containerd() -> None:
    # restrict_oom_score_adj: without CAP_SYS_RESOURCE runc may not lower a process's oom_score_adj, and every pod sandbox
    # would fail with "can't get final child's PID from pipe: EOF". The namespaces' mounts belong under RUN, where
    # cleaning up finds them, and so does runc's own state.
    config = f"""
version = 2
root = "{CACHE}/containerd"
state = "{RUN}/containerd"
[grpc]
  address = "{RUN}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      Root = "{RUN}/runc"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{STATE}/cni"
"""
    (STATE / "containerd.toml").write_text(config)
    start_daemon("containerd", "containerd", "-c", STATE / "containerd.toml")
    wait_until("containerd", lambda: ctr("version"), timeout_s=START_SECONDS, log=LOGS / "containerd.log")
    # The image store is kept, and with it the records of containers that the last cluster did not live to remove.
    if stale := ctr("containers", "list", "-q").split():
        ctr("containers", "remove", *stale)


def _import_pause(binary: Path) -> None:
    layer = _tar({"pause": (binary.read_bytes(), 0o755)})
    settings = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [PAUSE], "Layers": ["layer.tar"]}]
    files = {"layer.tar": layer, "config.json": json.dumps(settings).encode(), "manifest.json": json.dumps(manifest).encode()}
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        archive.write(_tar({name: (content, 0o644) for name, content in files.items()}))
        archive.flush()
        ctr("images", "import", archive.name)


def _tar(files: dict[str, tuple[bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, (content, mode) in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _start_api_server(components: Path) -> None:
    etcd, keys = "http://127.0.0.1:2379", STATE / "pki"
    urls = [f"--listen-client-urls={etcd}", f"--advertise-client-urls={etcd}", "--listen-peer-urls=http://127.0.0.1:2380"]
    start_daemon("etcd", "etcd", f"--data-dir={STATE / 'etcd'}", "--unsafe-no-fsync", *urls)
    start_daemon(
        "apiserver",
        components / "kube-apiserver",
        f"--etcd-servers={etcd}",
        f"--bind-address={NODE_IP}",
        f"--advertise-address={NODE_IP}",
        "--secure-port=6443",
        f"--service-cluster-ip-range={SERVICE_NETWORK}",
        f"--token-auth-file={keys}/tokens.csv",
        "--authorization-mode=Node,RBAC",
        "--allow-privileged=true",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-signing-key-file={keys}/service-accounts.key",
        f"--service-account-key-file={keys}/service-accounts.key",
        f"--tls-cert-file={keys}/api.crt",
        f"--tls-private-key-file={keys}/api.key",
        f"--client-ca-file={keys}/ca.crt",
        f"--kubelet-client-certificate={keys}/kubelet-client.crt",
        f"--kubelet-client-key={keys}/kubelet-client.key",
        "--kubelet-preferred-address-types=InternalIP",  # names would need DNS, and logs and exec would fail
    )
    ready = "--request-timeout=3s"
    wait_until("API server", lambda: kubectl("get", "--raw=/readyz", ready), timeout_s=START_SECONDS, log=LOGS / "apiserver.log")


def _start_controllers(components: Path) -> None:
    keys = STATE / "pki"
    start_daemon(
        "controller-manager",
        components / "kube-controller-manager",
        f"--kubeconfig={keys}/controller-manager.kubeconfig",
        f"--service-account-private-key-file={keys}/service-accounts.key",
        f"--root-ca-file={keys}/ca.crt",
        "--use-service-account-credentials=true",
        "--leader-elect=false",
    )
    start_daemon("scheduler", components / "kube-scheduler", f"--kubeconfig={keys}/scheduler.kubeconfig", "--leader-elect=false")


def _start_kubelet(components: Path) -> None:
    keys = STATE / "pki"
    settings = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failSwapOn": False,
        "failCgroupV1": False,  # from 1.35 on the kubelet refuses a machine with cgroups v1 unless told so
        "cgroupDriver": "cgroupfs",
        "containerRuntimeEndpoint": f"unix://{RUN}/containerd.sock",
        "authentication": {"anonymous": {"enabled": False}, "x509": {"clientCAFile": f"{keys}/ca.crt"}},
        "authorization": {"mode": "AlwaysAllow"},
        "resolvConf": "",
        # A full disk must not make the kubelet remove images: nobody could pull them again, not even `pause`.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "0%", "imagefs.available": "0%"},
        "nodeStatusUpdateFrequency": "2s",  # the GPUs appear with an update; the default of 10 s would be most of the start
        "imageGCHighThresholdPercent": 100,  # an image that was loaded here could not be pulled again
    }
    (STATE / "kubelet.json").write_text(json.dumps(settings, indent=1))
    start_daemon(
        "kubelet",
        components / "kubelet",
        f"--config={STATE}/kubelet.json",
        f"--kubeconfig={keys}/kubelet.kubeconfig",
        f"--root-dir={STATE}/kubelet",
        f"--cert-dir={STATE}/kubelet/pki",
        "--hostname-override=node1",
        f"--node-ip={NODE_IP}",
    )
    start_daemon(
        "proxy",
        components / "kube-proxy",
        f"--kubeconfig={keys}/proxy.kubeconfig",
        "--proxy-mode=iptables",
        "--hostname-override=node1",
        f"--cluster-cidr={POD_NETWORK}",
    )
