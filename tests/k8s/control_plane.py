"""A real Kubernetes control plane for tests, on free ports of this machine: etcd, kube-apiserver, and where a test wants what a Job does,
kube-controller-manager. Nodes are `kubelet`'s.

The binaries lie in the folder that KUBEBUILDER_ASSETS names, as for other users of envtest; where it is not set, an archive of them in
`shared/kube` beside the checkout is unpacked. etcd may also be on the path (launch/system.sh).
"""

import json
import os
import shutil
import ssl
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.runs import ROOT, free_port

Manifest = dict[str, Any]

_TOKEN = "admin-of-a-test"
_READY_S = 60.0


@dataclass(frozen=True)
class Assets:
    """The binaries of a control plane."""

    apiserver: Path
    etcd: Path
    controller_manager: Path | None
    """Not among those that envtest brings."""


def find_assets(folder: Path) -> Assets | str:
    """The binaries, unpacked into `folder` where need be, or what is missing."""
    named = os.environ.get("KUBEBUILDER_ASSETS")
    archives = sorted((ROOT.parent / "shared" / "kube").glob("*.tar.xz"))
    if named is None and not archives:
        return "no Kubernetes API server: KUBEBUILDER_ASSETS names no folder with kube-apiserver"
    place = Path(named) if named else folder
    etcd = shutil.which("etcd", path=f"{place}:{os.environ.get('PATH', '')}")
    if etcd is None:
        return "no etcd in KUBEBUILDER_ASSETS or on the path; launch/system.sh installs it"
    if named is None:
        with tarfile.open(archives[-1]) as archive:
            archive.extractall(place, filter="data")
    controller_manager = place / "kube-controller-manager"
    return Assets(place / "kube-apiserver", Path(etcd), controller_manager if controller_manager.exists() else None)


@dataclass(frozen=True)
class ControlPlane:
    """A running API server, asked by its administrator through kubectl."""

    url: str
    folder: Path

    @property
    def kubeconfig(self) -> Path:
        """Of its administrator."""
        return self.folder / "kubeconfig"

    def write_kubeconfig(self, name: str, token: str) -> Path:
        """One for whoever has `token`."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                {
                    "name": "test",
                    "cluster": {
                        "server": self.url,
                        "certificate-authority": str(self.folder / "certificates" / "apiserver.crt"),
                        "tls-server-name": "kubernetes.default.svc",
                    },
                }
            ],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name, "namespace": "perception"}}],
            "current-context": "test",
        }
        path = self.folder / name
        path.write_text(json.dumps(config))
        return path

    def log_in(self, namespace: str, account: str) -> Path:
        """The kubeconfig of a service account."""
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        place = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        answer = self.must("create", "--raw", place, "-f", "-", content=json.dumps(request))
        return self.write_kubeconfig(account, json.loads(answer)["status"]["token"])

    def must(self, *arguments: str, content: str = "") -> str:
        """Run kubectl, which has to succeed; what it says."""
        done = self.kubectl(*arguments, content=content)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def dry_run(self, manifest: Manifest) -> subprocess.CompletedProcess[str]:
        """Create `manifest` as far as the server's admission and validation go; its answer is JSON."""
        return self.kubectl(
            "create", "--dry-run=server", "--validate=false", "-o", "json", "-f", "-", content=yaml.safe_dump(manifest)
        )

    def kubectl(self, *arguments: str, content: str = "", kubeconfig: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run kubectl of the test extra, as the administrator or as whom `kubeconfig` names."""
        command = [Path(sys.executable).with_name("kubectl"), "--kubeconfig", kubeconfig or self.kubeconfig, *arguments]
        environment = os.environ | {"HOME": str(self.folder), "NO_PROXY": "127.0.0.1"}
        return subprocess.run(command, input=content, env=environment, capture_output=True, text=True, timeout=60)


@contextmanager
def running(assets: Assets, folder: Path) -> Iterator[ControlPlane]:
    """A control plane in `folder` until the end of the block."""
    port, client, peer = free_port(), free_port(), free_port()
    plane = ControlPlane(f"https://127.0.0.1:{port}", folder)
    _write_identities(plane)
    etcd = f"http://127.0.0.1:{client}"
    commands = [
        [assets.etcd, "--data-dir", folder / "etcd", "--unsafe-no-fsync", *_etcd_addresses(etcd, f"http://127.0.0.1:{peer}")],
        [
            assets.apiserver,
            f"--etcd-servers={etcd}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            *_apiserver_options(folder),
        ],
    ]
    with (folder / "log").open("wb") as log:
        processes = [subprocess.Popen(command, stdout=log, stderr=log, cwd=folder) for command in commands]
    try:
        _wait_until_ready(plane, processes)
        yield plane
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


@contextmanager
def controlling(assets: Assets, plane: ControlPlane) -> Iterator[None]:
    """What keeps Jobs in pods, deletes what deleted objects own, counts quotas and makes tokens, until the end of the block."""
    assert assets.controller_manager, "the caller has looked"
    options = {
        "kubeconfig": plane.kubeconfig,
        "bind-address": "127.0.0.1",
        "secure-port": free_port(),
        "port": 0,
        "leader-elect": "false",
        "service-account-private-key-file": plane.folder / "account.key",
        "controllers": "job,garbagecollector,resourcequota,serviceaccount,serviceaccount-token,namespace,disruption",
    }
    with (plane.folder / "controllers.log").open("wb") as log:
        command = [assets.controller_manager, *(f"--{name}={value}" for name, value in options.items())]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=plane.folder)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _etcd_addresses(client: str, peer: str) -> list[str]:
    options = {
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"default={peer}",
    }
    return [f"--{name}={value}" for name, value in options.items()]


def _apiserver_options(folder: Path) -> list[str]:
    options = {
        "cert-dir": folder / "certificates",  # it makes its own
        "token-auth-file": folder / "tokens.csv",
        "service-account-key-file": folder / "account.key",
        "service-account-signing-key-file": folder / "account.key",
        "service-account-issuer": "https://localhost",
        "service-cluster-ip-range": "10.0.0.0/24",
        "authorization-mode": "RBAC",
    }
    return [f"--{name}={value}" for name, value in options.items()]


def _write_identities(plane: ControlPlane) -> None:
    folder = plane.folder
    subprocess.run(["openssl", "genrsa", "-out", folder / "account.key", "2048"], check=True, capture_output=True)
    (folder / "tokens.csv").write_text(f"{_TOKEN},admin,admin,system:masters\n")
    plane.write_kubeconfig(plane.kubeconfig.name, _TOKEN)


def _wait_until_ready(plane: ControlPlane, processes: list[subprocess.Popen[bytes]]) -> None:
    request = urllib.request.Request(f"{plane.url}/readyz", headers={"Authorization": f"Bearer {_TOKEN}"})
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
    )
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            opener.open(request, timeout=2).close()
        except (urllib.error.URLError, OSError):
            alive = all(process.poll() is None for process in processes)
            assert alive and time.monotonic() < deadline, (plane.folder / "log").read_text()[-4000:]
            time.sleep(0.1)
        else:
            return
