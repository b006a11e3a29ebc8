"""Several nodes on one machine: each pod of an Indexed Job in a network namespace of its own, with an address, a host name and a process 1.

What it does as a cluster does: joins the pods by a bridge, gives every new pod the next address, starts the rendered command with the
rendered environment and the variable that the Job controller sets, and answers for the names of the headless Service. A name leads to the
address of the pod's predecessor until its successor has one, as it does from a cache of DNS. A node loses its power as real ones do: the
cable first, so that nobody hears a goodbye of its connections, then every process at once.

What it does not: isolate files. Paths of mounts are replaced by folders wherever the container would read them.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from k8s.render import render
from k8s.workload import Workload
from tests.k8s.kubelet import Manifest, replace_mounts
from tests.runs import ROOT, kill_tree

_HOSTS = Path("/etc/netns")
"""`ip netns exec NAME` shows NAME/hosts of this folder as /etc/hosts."""
_SUBNET = "10.77.0"
_FIRST = 11
_UNSHARE = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
_BECOME = ["sh", "-c", 'hostname "$0" && exec "$@"']
"""Name the machine as a pod sees it, then be the pod's process 1."""


@dataclass(frozen=True)
class Pod:
    """One that was started."""

    host: str
    address: str
    cable: str
    """The bridge's end of its cable."""
    command: list[str]
    process: subprocess.Popen[str]

    def terminate(self) -> None:
        """SIGTERM to process 1, as a kubelet sends it."""
        self._find_first().terminate()

    def kill(self) -> None:
        """kill -9 of all its processes at once."""
        self._find_first().kill()

    def lose_power(self) -> None:
        """It is gone without a word to anybody."""
        _ip("link", "set", self.cable, "down")
        self.kill()

    def _find_first(self) -> psutil.Process:
        (first,) = psutil.Process(self.process.pid).children()
        return first


@dataclass
class Nodes:
    """Room for the pods of a Job; what they mount is made under `folder`, and claims are folders."""

    folder: Path
    claims: Mapping[str, Path]
    _bridge: str = f"odo{os.getpid()}"
    _namespaces: dict[str, str] = field(default_factory=dict)
    """By name, what its pod finds of itself in /etc/hosts."""
    _addresses: dict[str, str] = field(default_factory=dict)
    """By name in the Service."""
    _pods: list[Pod] = field(default_factory=list)

    @contextmanager
    def joined(self) -> Iterator["Nodes"]:
        """A bridge, and at the end nothing is left of it and of what hung on it."""
        _ip(*_bridge(self._bridge))
        try:
            _ip("link", "set", self._bridge, "up")
            yield self
        finally:
            for pod in self._pods:
                if pod.process.poll() is None:
                    kill_tree(pod.process.pid)
                pod.process.communicate()
            for namespace in self._namespaces:
                _ip("netns", "delete", namespace)
                shutil.rmtree(_HOSTS / namespace, ignore_errors=True)
            _ip("link", "delete", self._bridge)
            with suppress(OSError):  # others' namespaces are in it
                _HOSTS.rmdir()

    def start(self, workload: Workload, index: int) -> Pod:
        """A new pod of the rendered Job's `index`, at an address that nobody had before."""
        objects = render(workload)
        spec = objects["job.yaml"]["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        mounts = self._make_mounts(spec, objects["config.yaml"]["data"])
        environment = {each["name"]: replace_mounts(each["value"], mounts) for each in container["env"]}
        environment["JOB_COMPLETION_INDEX"] = str(index)
        command = [expand_variables(word, environment) for word in (*container["command"], *container["args"])]

        host, cable = f"{workload.name}-{index}", f"{self._bridge}v{len(self._pods)}"
        address = f"{_SUBNET}.{_FIRST + len(self._pods)}"
        namespace = self._plug_in(cable, address, host)
        if "subdomain" in spec:
            self._addresses[f"{host}.{spec['subdomain']}"] = address
        self._publish()
        process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *_UNSHARE, *_BECOME, host, *(replace_mounts(word, mounts) for word in command)],
            cwd=self.folder,
            env=environment | _imitate_image(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._pods.append(Pod(host, address, cable, command, process))
        return self._pods[-1]

    def _make_mounts(self, spec: Manifest, config: Mapping[str, str]) -> dict[str, Path]:
        """Folder of each place at which the container sees one."""
        place = self.folder / f"pod-{len(self._pods)}"
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {}
        for mount in spec["containers"][0]["volumeMounts"]:
            claim = volumes[mount["name"]].get("persistentVolumeClaim")
            if mount["mountPath"] != "/dev/shm":
                mounts[mount["mountPath"]] = self.claims[claim["claimName"]] if claim else place / mount["name"]
        for folder in mounts.values():
            folder.mkdir(parents=True, exist_ok=True)
        for name, text in config.items():
            (place / "config" / name).write_text(replace_mounts(text, mounts))
        return mounts

    def _plug_in(self, cable: str, address: str, host: str) -> str:
        """A namespace at the bridge."""
        namespace = f"{self._bridge}-{len(self._namespaces)}"
        _ip("netns", "add", namespace)
        self._namespaces[namespace] = f"{address} {host}"
        (_HOSTS / namespace).mkdir(parents=True)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", cable, "master", self._bridge, "up")
        _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", device, "up")
        return namespace

    def _publish(self) -> None:
        """The names of the Service, and each namespace's own; a pod that runs sees them change."""
        served = "".join(f"{address} {name}\n" for name, address in self._addresses.items())
        for namespace, own in self._namespaces.items():
            (_HOSTS / namespace / "hosts").write_text(f"127.0.0.1 localhost\n{own}\n{served}")


def find_missing() -> str | None:
    """Why there can be no nodes on this machine; None where there can."""
    if os.geteuid():
        return "network namespaces want root"
    for command in ("ip", "unshare"):
        if not shutil.which(command):
            return f"no {command} on PATH; launch/system.sh installs it"
    name = f"odo{os.getpid()}"
    for create, undo in ((("netns", "add", name), ("netns", "delete", name)), (_bridge(name), ("link", "delete", name))):
        done = subprocess.run(["ip", *create], capture_output=True, text=True)
        if done.returncode:
            return f"this machine lends no networks: ip {' '.join(create)} says {done.stderr.strip()}"
        _ip(*undo)
    return None


def expand_variables(word: str, environment: Mapping[str, str]) -> str:
    """As Kubernetes does with $(NAME) in a command; what it does not know it leaves."""
    return re.sub(r"\$\((\w+)\)", lambda found: environment.get(found[1], found[0]), word)


def _imitate_image() -> dict[str, str]:
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(ROOT),
    }


def _bridge(name: str) -> tuple[str, ...]:
    return ("link", "add", name, "type", "bridge")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
