"""A small kubelet and scheduler for tests: the pods of one node, as processes of this machine.

What it does as a real one: binds pods that fit, pulls images (from a list), mounts ConfigMaps, emptyDirs and claims, starts the container's
command with its environment, asks its readiness probe, posts its status, keeps its log and serves it to the API server, ends a deleted pod
with SIGTERM and, after its grace period, SIGKILL.

What it does not: isolate. A pod is a process of this user in the network of this machine, so paths of mounts are replaced by folders
wherever the container would read them (arguments, environment, files of ConfigMaps), ports of the meeting by free ones, and a preStop hook,
whose process 1 would be this machine's, is left out: SIGTERM says the same. Liveness and resources are not enforced.
"""

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from kubernetes import client, config

from tests.k8s.control_plane import ControlPlane
from tests.runs import ROOT, free_port, kill_tree

Manifest = dict[str, Any]

MACHINE = "machine-1"
_POLL_S = 0.2
_KUBE = {"auth_settings": ["BearerToken"], "response_type": "object", "_return_http_data_only": True}


@dataclass
class Container:
    """The process of a pod."""

    process: subprocess.Popen[bytes]
    started: str
    log: Path
    is_ready: bool = False
    terminated_s: float | None = None
    """When SIGTERM was sent."""
    ended: Manifest | None = None


@dataclass
class Kubelet:
    """One node with the images `images`, where claims are folders."""

    plane: ControlPlane
    folder: Path
    images: Sequence[str]
    claims: dict[str, Path] = field(default_factory=dict)
    cores: float = 8.0
    _containers: dict[str, Container] = field(default_factory=dict)
    """By UID of the pod."""
    _posted: dict[str, Manifest] = field(default_factory=dict)
    _closing: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator["Kubelet"]:
        """A node that is ready, until the end of the block."""
        self._api = client.ApiClient(self._settings())
        server = self._serve_logs()
        self._register(server.server_port)
        threads = [threading.Thread(target=target, daemon=True) for target in (server.serve_forever, self._work)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._closing.set()
            server.shutdown()
            server.server_close()
            for thread in threads:
                thread.join()
            for container in self._containers.values():
                if container.process.poll() is None:
                    kill_tree(container.process.pid)
                container.process.wait()

    def _settings(self) -> client.Configuration:
        settings = client.Configuration()
        config.load_kube_config(str(self.plane.kubeconfig), client_configuration=settings)
        return settings

    def _call(self, method: str, path: str, body: Manifest | None = None, content_type: str = "application/json") -> Any:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        return self._api.call_api(path, method, body=body, header_params=headers, **_KUBE)

    def _register(self, port: int) -> None:
        labels = {"kubernetes.io/hostname": MACHINE}
        self._call("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": MACHINE, "labels": labels}})
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
        }
        self._patch("/api/v1/nodes/" + MACHINE + "/status", {"status": status})

    def _patch(self, path: str, body: Manifest) -> None:
        self._call("PATCH", path, body, "application/merge-patch+json")

    def _work(self) -> None:
        while not self._closing.wait(_POLL_S):
            for pod in self._call("GET", "/api/v1/pods?labelSelector=odonata/run")["items"]:
                with suppress(client.ApiException):  # gone, or changed, since it was listed
                    self._look_after(pod)

    def _look_after(self, pod: Manifest) -> None:
        uid, metadata = pod["metadata"]["uid"], pod["metadata"]
        container = self._containers.get(uid)
        if container:
            self._follow(pod, container)
        if metadata.get("deletionTimestamp") and (container is None or container.ended):
            self._call("DELETE", _path(pod), {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}})
        elif not pod["spec"].get("nodeName"):
            self._schedule(pod)
        elif container is None and pod["status"]["phase"] == "Pending":
            self._start(pod)

    # Scheduling

    def _schedule(self, pod: Manifest) -> None:
        if reason := self._why_not_here(pod):
            condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": reason}
            self._post(pod, {"phase": "Pending", "conditions": [condition]})
            return
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod["metadata"]["name"]}}
        self._call("POST", _path(pod) + "/binding", binding | {"target": {"apiVersion": "v1", "kind": "Node", "name": MACHINE}})

    def _why_not_here(self, pod: Manifest) -> str | None:
        requests = pod["spec"]["containers"][0]["resources"]["requests"]
        if pod["spec"].get("nodeSelector"):
            return "0/1 nodes are available: 1 node(s) didn't match node selector."
        if _cores(requests["cpu"]) > self.cores:
            return "0/1 nodes are available: 1 Insufficient cpu."
        return None

    # Starting

    def _start(self, pod: Manifest) -> None:
        spec = pod["spec"]["containers"][0]
        if spec["image"] not in self.images:
            message = f'Back-off pulling image "{spec["image"]}"'
            self._post(pod, _pending(spec, "ImagePullBackOff", message))
            return
        place = self.folder / pod["metadata"]["uid"]
        place.mkdir(parents=True, exist_ok=True)
        try:
            folders = self._make_volumes(pod, place)
            environment = self._read_environment(pod, folders)
        except LookupError as error:
            self._post(pod, _pending(spec, "CreateContainerConfigError", str(error)))
            return
        command = [replace_mounts(word, folders) for word in (*spec["command"], *spec["args"])]
        log = place / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, f"--main-port={free_port()}"],
                cwd=place,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._containers[pod["metadata"]["uid"]] = container = Container(process, _now(), log)
        self._post_running(pod, container)

    def _make_volumes(self, pod: Manifest, place: Path) -> dict[str, Path]:
        """Folder of each place at which the container sees one."""
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        folders = {path: self._find_folder(volumes[name], place) for path, name in mounts.items() if path != "/dev/shm"}
        for volume in volumes.values():
            if "configMap" in volume:
                namespace, name = pod["metadata"]["namespace"], volume["configMap"]["name"]
                files = self._find(f"/api/v1/namespaces/{namespace}/configmaps/{name}", f'configmap "{name}" not found')["data"]
                for file, text in files.items():
                    (self._find_folder(volume, place) / file).write_text(replace_mounts(text, folders))
        return folders

    def _find_folder(self, volume: Manifest, place: Path) -> Path:
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        folder = self.claims[claim] if claim else place / volume["name"]
        folder.mkdir(exist_ok=True)
        return folder

    def _read_environment(self, pod: Manifest, folders: Mapping[str, Path]) -> dict[str, str]:
        spec = pod["spec"]["containers"][0]
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        for source in spec.get("envFrom", ()):
            name = source["secretRef"]["name"]
            secret = self._find(f"/api/v1/namespaces/{pod['metadata']['namespace']}/secrets/{name}", f'secret "{name}" not found')
            environment |= {key: _decode(value) for key, value in secret["data"].items()}
        return environment | {each["name"]: replace_mounts(each["value"], folders) for each in spec["env"]}

    def _find(self, path: str, otherwise: str) -> Manifest:
        try:
            found: Manifest = self._call("GET", path)
        except client.ApiException as error:
            raise LookupError(otherwise) from error
        return found

    # From start to end

    def _follow(self, pod: Manifest, container: Container) -> None:
        if container.ended:
            return
        code = container.process.poll()
        if code is not None:
            container.ended = self._describe_end(container, code)
            phase = "Succeeded" if code == 0 else "Failed"
            self._post(pod, {"phase": phase, **_statuses(pod, {"terminated": container.ended}), "conditions": _ready(False)})
            return
        if deleted := pod["metadata"].get("deletionTimestamp"):
            self._end(pod, container, deleted)
        is_ready = self._asks_well(pod)
        if is_ready != container.is_ready:
            container.is_ready = is_ready
            self._post_running(pod, container)

    def _end(self, pod: Manifest, container: Container, deleted: str) -> None:
        if container.terminated_s is None:
            container.terminated_s = time.monotonic()
            container.process.terminate()
        elif time.monotonic() - container.terminated_s > pod["metadata"]["deletionGracePeriodSeconds"]:
            kill_tree(container.process.pid)

    def _describe_end(self, container: Container, code: int) -> Manifest:
        exit_code = 128 - code if code < 0 else code
        ended = {"exitCode": exit_code, "reason": "Error" if code else "Completed"}
        if code == -signal.SIGKILL:
            ended["reason"] = "OOMKilled"
        if code:  # terminationMessagePolicy: FallbackToLogsOnError
            ended["message"] = container.log.read_text(errors="replace")[-2048:]
        return {**ended, "startedAt": container.started, "finishedAt": _now()}

    def _asks_well(self, pod: Manifest) -> bool:
        """The readiness probe; while an older pod lives, its port is that one's."""
        if sum(container.process.poll() is None for container in self._containers.values()) > 1:
            return False
        spec = pod["spec"]["containers"][0]
        probe = spec["readinessProbe"]["httpGet"]
        ports = {port["name"]: port["containerPort"] for port in spec["ports"]}
        try:
            with _direct.open(f"http://127.0.0.1:{ports[probe['port']]}{probe['path']}", timeout=1) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _post_running(self, pod: Manifest, container: Container) -> None:
        state = {"running": {"startedAt": container.started}}
        statuses = _statuses(pod, state, ready=container.is_ready)
        self._post(pod, {"phase": "Running", "podIP": find_address(), **statuses, "conditions": _ready(container.is_ready)})

    def _post(self, pod: Manifest, status: Manifest) -> None:
        if self._posted.get(pod["metadata"]["uid"]) != status:
            self._patch(_path(pod) + "/status", {"status": status})
            self._posted[pod["metadata"]["uid"]] = status

    # Logs

    def _serve_logs(self) -> ThreadingHTTPServer:
        """As the API server asks a kubelet: /containerLogs/NAMESPACE/POD/CONTAINER."""
        kubelet = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                place = urllib.parse.urlsplit(self.path)
                _, _, namespace, name, _ = place.path.split("/")
                query = urllib.parse.parse_qs(place.query)
                uid = kubelet._call("GET", f"/api/v1/namespaces/{namespace}/pods/{name}")["metadata"]["uid"]
                self.send_response(200)
                self.end_headers()
                container = kubelet._containers[uid]
                tail = int(query["tailLines"][0]) if "tailLines" in query else None
                for piece in _read_log(container, tail=tail, follow=query.get("follow") == ["true"]):
                    self.wfile.write(piece)
                    self.wfile.flush()

            def log_message(self, *arguments: object) -> None:
                """Nothing: a test has its own words."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        key, certificate = self.folder / "kubelet.key", self.folder / "kubelet.crt"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={MACHINE}", "-days", "2"]
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        return server


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def find_address() -> str:
    """An address of this machine that is none of its loopback, to which no API server would lead; that where it has no other."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def _read_log(container: Container, *, tail: int | None, follow: bool) -> Iterator[bytes]:
    lines = container.log.read_bytes().splitlines(keepends=True)
    content = b"".join(lines if tail is None else lines[len(lines) - min(tail, len(lines)) :])
    offset = sum(map(len, lines))
    yield content
    while follow:
        is_over = container.process.poll() is not None
        with container.log.open("rb") as file:
            file.seek(offset)
            piece = file.read()
        offset += len(piece)
        yield piece
        if is_over:
            return
        time.sleep(_POLL_S)


def replace_mounts(text: str, folders: Mapping[str, Path]) -> str:
    """`text` with the folder of each mount in its place, all in one go, since a folder may lie under the name of another mount."""
    names = "|".join(re.escape(path) for path in sorted(folders, key=len, reverse=True))
    return re.sub(rf"(?<![\w./-])(?:{names})(?![\w.-])", lambda found: str(folders[found[0]]), text)


def _path(pod: Manifest) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def _pending(spec: Manifest, reason: str, message: str) -> Manifest:
    waiting = {"waiting": {"reason": reason, "message": message}}
    container = {"name": spec["name"], "image": spec["image"], "imageID": "", "ready": False, "restartCount": 0, "state": waiting}
    return {"phase": "Pending", "containerStatuses": [container]}


def _statuses(pod: Manifest, state: Manifest, *, ready: bool = False) -> Manifest:
    spec = pod["spec"]["containers"][0]
    container = {"name": spec["name"], "image": spec["image"], "imageID": "", "ready": ready, "restartCount": 0, "state": state}
    return {"containerStatuses": [container]}


def _ready(is_ready: bool) -> list[Manifest]:
    return [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": str(is_ready)}]


def _cores(quantity: str) -> float:
    return float(quantity[:-1]) / 1000 if quantity.endswith("m") else float(quantity)


def _decode(value: str) -> str:
    import base64

    return base64.b64decode(value).decode()


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
