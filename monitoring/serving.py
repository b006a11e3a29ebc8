"""The exporter's small web server, in daemon threads that end with the process.

    /metrics        this rank's metrics
    /metrics/pod    those of all ranks of this pod on one page; only local rank 0 has peers
    /healthz        503 once nothing was finished for twice as long as a hang may last: the process should be replaced
    /readyz         503 before the first step, and once one lasts too long

The watchdog ends a hung process at once and says why, so /healthz waits twice as long: it is for the case that this does not work.

Left to whom: what there is to serve is `exporter`'s, how long a step may last `pulse`'s.
"""

import errno
import os
import socketserver
import sys
import threading
import time
import urllib.request
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from monitoring.pulse import Pulse

PORTS_TRIED = 100
"""Taken ports that are passed over before giving up."""

_PEER_TIMEOUT_S = 2.0
_PATIENCE = 2.0

Answer = tuple[int, str, bytes]
"""Status, content type and body."""


class Server:
    """Serves `registry`, and the health that `pulse` tells, on `port` of `host` or the next free one; 0 is any.

    OSError where there is none. `peer_ports` are those of the other ranks of this pod.
    """

    def __init__(
        self, registry: CollectorRegistry, host: str, port: int, *, pulse: Pulse | None = None, peer_ports: Sequence[int] = ()
    ) -> None:
        self.cpu_seconds = 0.0
        """Of answering, over all threads."""
        self._pages: dict[str, Callable[[], Answer]] = {
            "/metrics": lambda: _show(registry),
            "/metrics/pod": lambda: _show_pod(registry, peer_ports),
            "/healthz": lambda: _tell(pulse.why_hung(_PATIENCE) if pulse else None),
            "/readyz": lambda: _tell(pulse.why_not_ready() if pulse else None),
        }
        self._http = self._bind(host, port)
        self.port = int(self._http.server_address[1])
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True, name="odonata-metrics")
        self._thread.start()
        _close_after_fork(self._http)

    def close(self) -> None:
        """Serve no more."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, path: str) -> Answer:
        """What is at `path`."""
        started = time.thread_time()
        page = self._pages.get(path.partition("?")[0])
        answer = page() if page else (404, "text/plain", f"there are: {', '.join(self._pages)}\n".encode())
        self.cpu_seconds += time.thread_time() - started
        return answer

    def _bind(self, host: str, port: int) -> "_Http":
        last = port if port == 0 else min(port + PORTS_TRIED, 65535)
        for candidate in range(port, last + 1):
            try:
                return _Http(host, candidate, self.answer)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        raise OSError(
            errno.EADDRINUSE,
            f"ports {port} to {last} of {host} are all taken; set observe.metrics_port to another, or to 0 for any",
        )


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, answer: Callable[[str], Answer]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the name is http.server's
                status, kind, body = answer(self.path)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Probes come every few seconds: nothing is logged."""

        super().__init__((host, port), Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever asked and went before the answer came is no error of this process, and nothing to read in a training log."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        """Without asking a name server for our name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)


def _show_pod(own: CollectorRegistry, peer_ports: Sequence[int]) -> Answer:
    """One page of several ranks; one that does not answer is left out."""
    return 200, CONTENT_TYPE_PLAIN_0_0_4, merge_pages([generate_latest(own).decode(), *_ask_peers(peer_ports)]).encode()


def merge_pages(pages: Sequence[str]) -> str:
    """Each family once, with the samples of all `pages`: as text, for parsing what is only passed on would cost ten times as much."""
    heads: dict[str, str] = {}
    samples: dict[str, list[str]] = {}
    for page in pages:
        for family in page.split("# HELP ")[1:]:
            head, kind, lines = [*family.split("\n", 2), "", ""][:3]
            name = head.partition(" ")[0]
            heads.setdefault(name, f"# HELP {head}\n{kind}\n")
            samples.setdefault(name, []).append(lines)
    return "".join(head + "".join(samples[name]) for name, head in heads.items())


def _ask_peers(ports: Sequence[int]) -> list[str]:
    """All at once: ranks that are stopped take the time-out of one, so that a scrape of the others still comes in time."""
    if not ports:
        return []
    with ThreadPoolExecutor(len(ports)) as pool:
        return list(pool.map(_ask_peer, ports))


def _ask_peer(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=_PEER_TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except (OSError, ValueError):  # nobody, or somebody else, on that port
        return ""


def _show(registry: CollectorRegistry) -> Answer:
    return 200, CONTENT_TYPE_PLAIN_0_0_4, generate_latest(registry)


def _tell(problem: str | None) -> Answer:
    return 503 if problem else 200, "text/plain", f"{problem or 'ok'}\n".encode()


def _close_after_fork(http: _Http) -> None:
    """Loader workers are forked: one that outlives a killed rank would hold the port, and the next start would move on."""
    server = weakref.ref(http)

    def close_in_child() -> None:
        http = server()
        if http:
            http.socket.close()

    os.register_at_fork(after_in_child=close_in_child)
