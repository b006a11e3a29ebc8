"""A proxy before an S3 server that spoils the exchanges it is told to: a network, or a busy service, on a bad day.

It passes requests on whole and as they are signed, answers too; `faults` is what happens to the next ones that match.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

_REFUSALS = {
    "slow down": (503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"),
    "internal error": (500, b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"),
    "full": (507, b"<Error><Code>InsufficientStorage</Code><Message>There is no room left.</Message></Error>"),
}

Kind = Literal[
    "slow down",
    "internal error",
    "full",
    "drop request",
    "drop answer",
    "cut answer",
    "flip in answer",
    "flip in request",
    "slow",
]


@dataclass
class Fault:
    """What happens to the next `times` requests of `method` whose target contains `target`."""

    kind: Kind
    method: str
    times: int = 1
    target: str = ""
    seconds: float = 0.05
    """How slow "slow" is."""
    action: Callable[[], None] | None = None
    """Called when it happens: before the request is passed on, or after it where the answer is what is spoilt."""


@dataclass
class FaultyProxy:
    """Where it listens, what it is to spoil, and what it has answered: method and target."""

    url: str
    upstream_port: int
    faults: list[Fault] = field(default_factory=list)
    answered: list[tuple[str, str]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take_fault(self, method: str, target: str) -> Fault | None:
        """The fault of this request, which counts as used."""
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.method == method and fault.target in target:
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def faulty_proxy(upstream_port: int) -> Iterator[FaultyProxy]:
    """A proxy to a server of this machine."""

    class Handler(_Handler):
        pass

    with _Listener(("127.0.0.1", 0), Handler) as listener:
        Handler.proxy = FaultyProxy(f"http://127.0.0.1:{listener.server_port}", upstream_port)
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield Handler.proxy
        finally:
            listener.shutdown()
            thread.join()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is nothing to print."""


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultyProxy
    protocol_version = "HTTP/1.1"

    def exchange(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.proxy.take_fault(self.command, self.path)
        kind = fault.kind if fault else None
        if fault and fault.action and kind != "drop answer":
            fault.action()
        if kind == "drop request":
            self.close_connection = True
            return
        if kind in _REFUSALS:
            status, content = _REFUSALS[kind]
            self.answer(status, [("Content-Type", "application/xml")], content)
            return
        if fault and kind == "slow":
            time.sleep(fault.seconds)
        status, headers, content = self.pass_on(_flipped(body) if kind == "flip in request" else body)
        self.proxy.answered.append((self.command, self.path))
        if kind == "drop answer":
            if fault and fault.action:
                fault.action()
            self.close_connection = True
            return
        self.answer(status, headers, _flipped(content) if kind == "flip in answer" else content, cut=kind == "cut answer")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = exchange  # noqa: N815

    def pass_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """Status, headers and content of the server's answer to this request with `body`."""
        connection = HTTPConnection("127.0.0.1", self.proxy.upstream_port, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False) -> None:
        """Give an answer, or the first half of it and then nothing more."""
        self.send_response_only(status)
        lengths = [value for name, value in headers if name.lower() == "content-length"] if self.command == "HEAD" else []
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", lengths[0] if lengths else str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection |= cut

    def log_message(self, *args: Any) -> None:
        """Tests say what they need."""


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
