"""A real Kubernetes API server for tests, on free ports of this machine: etcd and kube-apiserver, with no nodes behind them.

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
            archive.extract("kube-apiserver", place, filter="data")
    return Assets(place / "kube-apiserver", Path(etcd))


@dataclass(frozen=True)
class ControlPlane:
    """A running API server, asked by its administrator through kubectl."""

    url: str
    folder: Path

    def dry_run(self, manifest: Manifest) -> subprocess.CompletedProcess[str]:
        """Create `manifest` as far as the server's admission and validation go; its answer is JSON."""
        return self.kubectl(
            "create", "--dry-run=server", "--validate=false", "-o", "json", "-f", "-", content=yaml.safe_dump(manifest)
        )

    def kubectl(self, *arguments: str, content: str = "") -> subprocess.CompletedProcess[str]:
        """Run kubectl of the test extra."""
        command = [Path(sys.executable).with_name("kubectl"), "--kubeconfig", self.folder / "kubeconfig", *arguments]
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
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": plane.url, "insecure-skip-tls-verify": True}}],
        "users": [{"name": "admin", "user": {"token": _TOKEN}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        "current-context": "test",
    }
    (folder / "kubeconfig").write_text(json.dumps(config))


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
