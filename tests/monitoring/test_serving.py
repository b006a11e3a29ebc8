"""The pages beside /metrics: health that follows the pulse, and one page for a pod."""

import http.client
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from prometheus_client.parser import text_string_to_metric_families

from monitoring import serving
from monitoring.exporter import Exporter
from monitoring.pulse import Pulse
from tests.runs import free_port


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def exporters() -> Iterator[list[Exporter]]:
    exporters = [Exporter({"rank": str(rank)}) for rank in range(3)]
    yield exporters
    for exporter in exporters:
        exporter.close()


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_probes_follow_the_pulse(exporters: list[Exporter]) -> None:
    clock = Clock()
    pulse = Pulse(factor=10, least_s=5, grace_s=100, clock=clock)
    port = exporters[0].serve("127.0.0.1", 0, pulse=pulse)
    assert get(port, "/healthz") == (200, "ok\n")
    assert get(port, "/readyz") == (503, "no step is finished yet\n")
    for step in (1, 2, 3):
        pulse.tell_step(step, 1.0)
    assert get(port, "/readyz") == (200, "ok\n")
    clock.now = 11.0
    assert get(port, "/readyz")[0] == 503
    assert get(port, "/healthz")[0] == 200  # the watchdog has had no time to end the process yet
    clock.now = 21.0
    assert get(port, "/healthz") == (503, "step after step 3 has not ended for 21 s, and 20 s are allowed\n")


def test_a_pod_is_one_page_with_each_family_once_and_every_rank_that_answers(exporters: list[Exporter]) -> None:
    silent = free_port()
    peers = [exporter.serve("127.0.0.1", 0) for exporter in exporters[1:]]
    port = exporters[0].serve("127.0.0.1", 0, peer_ports=[*peers, silent])
    for exporter in exporters:
        exporter.set("odonata_loss", 0.5)
        exporter.increase("odonata_clips_total", 8)
        exporter.observe("odonata_step_seconds", 0.4)
    page = get(port, "/metrics/pod")[1]
    assert page.count("# TYPE odonata_clips_total counter") == 1
    families = {family.name: family.samples for family in text_string_to_metric_families(page)}
    assert {sample.labels["rank"]: sample.value for sample in families["odonata_clips"]} == {"0": 8, "1": 8, "2": 8}
    assert {sample.labels["rank"] for sample in families["odonata_step_seconds"]} == {"0", "1", "2"}
    assert len({(sample.name, *sorted(sample.labels.items())) for sample in families["odonata_loss"]}) == 3


def test_ranks_that_are_stopped_hold_the_page_up_once_and_not_each(
    exporters: list[Exporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_PEER_TIMEOUT_S", 0.4)
    with ExitStack() as stack:
        stopped = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)
        ]  # take connections and say nothing
        port = exporters[0].serve("127.0.0.1", 0, peer_ports=[each.getsockname()[1] for each in stopped])
        began = time.monotonic()
        assert 'odonata_clips_total{rank="0"}' in get(port, "/metrics/pod")[1]
        assert 0.4 < time.monotonic() - began < 1.4


def test_a_page_that_is_not_ours_adds_nothing_to_the_pod_s() -> None:
    own = "# HELP a What.\n# TYPE a gauge\na 1.0\n"
    assert serving.merge_pages([own, "<html>hello</html>", "", "# HELP"]) == own


def test_the_page_of_a_rank_is_its_own(exporters: list[Exporter]) -> None:
    peer = exporters[1].serve("127.0.0.1", 0)
    port = exporters[0].serve("127.0.0.1", 0, peer_ports=[peer])
    assert 'rank="1"' not in get(port, "/metrics")[1]


def test_who_goes_before_the_answer_comes_leaves_no_traceback(
    exporters: list[Exporter], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(*_: object) -> None:
        raise BrokenPipeError

    port = exporters[0].serve("127.0.0.1", 0)
    monkeypatch.setattr("http.server.BaseHTTPRequestHandler.send_response", break_off)
    with pytest.raises(http.client.RemoteDisconnected):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5)
    assert capsys.readouterr().err == ""


def test_another_path_says_what_there_is(exporters: list[Exporter]) -> None:
    status, text = get(exporters[0].serve("127.0.0.1", 0), "/metrix")
    assert status == 404
    assert "/metrics/pod" in text


def test_serving_is_counted(exporters: list[Exporter]) -> None:
    port = exporters[0].serve("127.0.0.1", 0)
    for _ in range(3):
        get(port, "/metrics")
    assert 0 < exporters[0].cpu_seconds < 1
