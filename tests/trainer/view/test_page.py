"""The page of a real run, of copies of it that lack something or are spoilt, and in a browser."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from models.pretraining import build_preparations
from odonata.door import app
from tests.runs import Finished, Runner
from tests.s3_server import S3Server, upload
from tests.trainer.test_card import EVALUATION, probe
from tests.trainer.test_objectives_together import OBJECTIVES, TOGETHER
from trainer.checkpoint.tools import Place, read_run_config
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.observe.probes import write_probe
from trainer.store.open import open_store
from trainer.view import clip
from trainer.view.clip import open_surround, write_clip_page
from trainer.view.page import write_page

HOSTILE = "</svg><script>alert('$x_{')</script>\"&"
KINDS = ("croco", "simipu")
CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """What a browser would see: headings, titles of plots and pictures, words of legends, and whatever could be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: dict[str, list[str]] = {}
        self.tags: list[str] = []
        self.references: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "img", "br"):
            self._open.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} closes what it did not open"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.setdefault(self._open[-1] if self._open else "", []).append(data.strip())


def view(folder: Path, **options: Any) -> tuple[Page, str]:
    text = write_page(Place(open_store(folder)), **options)
    return Page(text), text


@pytest.fixture(scope="module")
def finished(runner: Runner) -> Finished:
    """Two objectives for three steps, with pictures of steps 2 and 3."""
    objectives = f"objectives=[{', '.join(OBJECTIVES[kind] for kind in KINDS)}]"
    return runner.run("viewed", objectives, *TOGETHER, "steps=3", "observe.pictures_every_steps=2")


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Path:
    """The same run, to be changed, but for the tensors of its checkpoints."""

    def copy(source: str, target: str) -> None:
        os.link(source, target) if source.endswith(".bin") else shutil.copy2(source, target)

    return Path(shutil.copytree(finished.folder, tmp_path / "copied", copy_function=copy))


def test_the_page_of_a_run_has_its_curves_pictures_and_tables(finished: Finished) -> None:
    page, _ = view(finished.folder)
    assert page.words["h1"] == ["viewed"]
    objectives = [f"Objective: {kind}" for kind in sorted(KINDS)]
    headings = ["Steps", *objectives, "Pictures", "Speed", "Checkpoints", "Training", "Encoder", "Hardware and software"]
    assert sorted(page.words["h2"]) == sorted(headings)
    last = finished.steps[-1]
    evaluated = json.loads((finished.folder / "evaluations.jsonl").read_text()).keys() - {"step", "time_s", "seconds"}
    titles = [name.partition("/")[2].replace("_", " ") for name in last["parts"].keys() | evaluated]
    titles += ["loss", "learning rate", "grad norm"]
    titles += ["clips a second", "seconds a step", "share of it spent waiting for data", "GiB of rank 0"]
    assert sorted(page.words["figcaption"]) == sorted([*titles, *KINDS])
    assert page.words["li"].count("training") == 7 + len(last["parts"])
    assert page.words["li"].count("held-out") == len(evaluated)
    for value in (last["loss"], last["clips"] / last["step_seconds"], *last["parts"].values()):
        assert f"{value:.4g}" in page.words["b"]
    assert "3 of 3" in page.words["dd"] and "1, single, fp32" in page.words["dd"]
    assert page.words["td"].count("whole") == len(list((finished.folder / "checkpoints").glob("step-*")))


def test_the_newest_picture_of_each_objective_lies_in_the_page(finished: Finished) -> None:
    page, text = view(finished.folder)
    pictures = sorted((finished.folder / "pictures").glob("step-000003-*.png"))
    assert [path.stem.rpartition("-")[2] for path in pictures] == sorted(KINDS)
    assert page.tags.count("img") == len(KINDS)
    assert len(re.findall(r"data:image/png;base64,iVBORw0KGgo", text)) == len(KINDS)
    assert page.words["span"] == ["after step 3"] * len(KINDS)


def test_a_page_needs_nothing_from_anywhere(finished: Finished) -> None:
    page, text = view(finished.folder)
    outside = [one for one in page.references if not one.startswith(("data:", "#"))]
    assert not outside and "script" not in page.tags
    assert "://" not in text and "url(" not in text.replace("url(#", "") and "@import" not in text


def test_names_cannot_break_out_of_the_page(copied: Path) -> None:
    lines = [json.loads(line) for line in (copied / "steps.jsonl").read_text().splitlines()]
    for line in lines:
        line["parts"] = {f"{HOSTILE}/{HOSTILE}": 1.0}
    (copied / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    incident = {"step": 3, "rank": 0, "loss": HOSTILE, "clips": [HOSTILE]}
    store = open_store(copied)
    store.put("incidents/step-00000003-rank-0.json", json.dumps(incident).encode())
    store.put("pictures/step-000003-<img onerror=alert(1)>.png", b"no picture")
    page, _ = view(copied, evaluations=[EVALUATION | {"task": HOSTILE, "encoder": HOSTILE, "trivial": HOSTILE}])
    assert "script" not in page.tags
    objective, _, part = f"{HOSTILE}/{HOSTILE}".partition("/")
    assert f"Objective: {objective}" in page.words["h2"] and part.replace("_", " ") in page.words["figcaption"]
    assert f"Evaluation: {HOSTILE}, frozen, of another encoder: {HOSTILE}" in page.words["h2"]
    assert any(cell.startswith(f"skipped: loss {HOSTILE}") for cell in page.words["td"])
    assert page.tags.count("img") == len(KINDS) + 1 and "<img onerror=alert(1)>" in page.words["figcaption"]


def test_evaluations_stand_in_the_page_with_whose_encoder_it_is_where_it_is_not_the_runs(copied: Path) -> None:
    page, _ = view(copied, evaluations=[EVALUATION | {"encoder": "copied-step-3"}, EVALUATION])
    assert [word for word in page.words["h2"] if "Evaluation" in word] == [
        "Evaluation: depth, frozen",
        "Evaluation: depth, frozen, of another encoder: base-step-4",
    ]
    assert page.words["td"].count("0.7071 ± 0.012") == 2


def test_probes_stand_beside_the_loss_each_with_the_trivial_answer(copied: Path, finished: Finished) -> None:
    for step in (2, 3):
        write_probe(open_store(copied), probe(step))
    page, text = view(copied)
    assert "Probe: depth" in page.words["h2"]
    section = Page(text[text.index("<h2>Probe: depth") : text.index("<h2>Speed")])
    assert section.words["figcaption"] == ["loss of the run", "delta1", "rmse_m"]
    assert section.words["li"] == ["training", "probe", "trivial answer", "probe", "trivial answer"]
    assert section.words["b"] == [f"{finished.losses[-1]:.4g}", "0.53", "0.25", "not a number", "9.5"]


def test_a_clip_of_the_run_is_shown_with_what_each_objective_draws_for_it(finished: Finished) -> None:
    text = write_clip_page("5", run=open_store(finished.folder))
    page = Page(text)
    objectives = [f"Objective: {kind}" for kind in sorted(KINDS)]
    assert sorted(word for word in page.words["h2"] if word.startswith("Objective")) == objectives
    assert len(re.findall(r"data:image/png;base64,iVBORw0KGgo", text)) == len(KINDS)


def test_each_objective_of_a_run_draws_the_clip_that_was_asked_for_or_says_that_it_has_none(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(finished.folder)
    config = read_run_config(store)
    assert config is not None
    config = config.model_copy(update={"data": config.data.model_copy(update={"train_split": "all"})})
    source = open_surround(config.data)
    wanted = " ".join(source.name(5).split()[:2])
    preparations = build_preparations(config.objectives, config.token_grid, config.encoder, cameras=config.cameras)
    for kind, preparation in preparations.items():
        batch = clip.read_clip(config, kind, preparation, wanted)
        assert batch is not None and batch.clips[0].startswith(f"{wanted} ")
        assert clip.read_clip(config, kind, preparation, wanted[:-1]) is None
    monkeypatch.setattr(clip, "read_clip", lambda *arguments: None)
    page = Page(write_clip_page("5", run=store))
    assert page.words["p"].count("None of its samples begins with this clip.") == len(KINDS)


def test_a_clip_of_a_run_whose_data_has_moved_is_shown_by_where_it_is_now(
    copied: Path, city: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = yaml.safe_load((copied / "config.yaml").read_text())
    config["data"]["root"] = "city"
    (copied / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    store = open_store(copied)
    with pytest.raises(DataError, match=rf"city was to be read as a dataroot and is not a folder in {tmp_path}; give"):
        write_clip_page("5", run=store)
    assert "Objective" in write_clip_page("5", run=store, data=[f"root={city}"])


def test_a_run_on_s3_has_the_page_that_it_has_in_a_folder(copied: Path, s3_server: S3Server, s3_owner: None) -> None:
    shutil.rmtree(copied / "checkpoints")
    store = open_store(f"s3://{s3_server.bucket}/view/copied", s3_server.config())
    upload(copied, store)
    assert write_page(Place(store)) == view(copied)[1]


def test_what_was_not_recorded_is_not_there(copied: Path) -> None:
    for name in ("pictures", "checkpoints"):
        shutil.rmtree(copied / name)
    for name in ("evaluations.jsonl", "environment.json", "steps.jsonl"):
        (copied / name).unlink()
    page, _ = view(copied)
    assert page.words["h2"] == ["Checkpoints", "Training", "Encoder"]
    assert "None yet." in page.words["p"] and "0 of 3" in page.words["dd"]


def test_a_run_that_goes_on_is_shown_up_to_its_last_whole_line(copied: Path, finished: Finished) -> None:
    lines = (copied / "steps.jsonl").read_text().splitlines()
    skipped = json.loads(lines[1]) | {"loss": None, "grad_norm": None, "skipped": True}
    (copied / "steps.jsonl").write_text("\n".join([lines[0], json.dumps(skipped), lines[2][:60]]))
    failed = {"step": 2, "seconds": 1.0, "stall_seconds": 0.0, "bytes": 0, "error": "the store is full", "time_s": 0.0}
    with (copied / "checkpoints.jsonl").open("a") as file:
        file.write(json.dumps(failed) + "\n")
    for folder in (copied / "checkpoints").glob("step-00000003-*"):
        shutil.rmtree(folder)
    page, _ = view(copied)
    assert "2 of 3" in page.words["dd"] and "3 of 3" not in page.words["dd"]
    assert f"{finished.losses[0]:.4g}" in page.words["b"]
    assert "not saved: the store is full" in page.words["td"]


def test_where_there_is_no_run_a_sentence_says_so(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no run"):
        view(tmp_path / "nowhere")
    (copied / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"there is no config\.yaml; put the one of its run there"):
        view(copied)


def test_imported_weights_are_shown_with_where_they_come_from_and_no_training(copied: Path) -> None:
    (copied / "steps.jsonl").unlink()
    open_store(copied).put("import.json", json.dumps({"file": "vit.pth"}).encode())
    page, _ = view(copied)
    assert "vit.pth" in page.words["dd"] and "weights of" in page.words["dt"]
    assert not {"Steps", "Speed", "Training"} & set(page.words["h2"])


def test_an_incident_that_cannot_be_read_is_named(copied: Path) -> None:
    open_store(copied).put("incidents/step-00000002-rank-0.json", b"{")
    with pytest.raises(CheckpointError, match=r"incidents/step-00000002-rank-0\.json is not JSON .*remove or mend it"):
        view(copied)


def test_the_command_names_the_page_after_the_run_and_writes_over_nothing_unasked(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for options in ([], ["--overwrite"]):
        done = CliRunner().invoke(app, ["view", str(finished.folder), *options])
        assert done.output.strip() == "viewed.html"
    assert "<h1>viewed</h1>" in (tmp_path / "viewed.html").read_text()
    with pytest.raises(
        ConfigError, match=r"viewed\.html was to be written and is there already; give another --out, or --overwrite"
    ):
        CliRunner().invoke(app, ["view", str(finished.folder)], catch_exceptions=False)


@pytest.mark.parametrize("command", ["view", "card"])
def test_an_evaluation_goes_by_its_folder_or_its_file_and_that_of_another_encoder_is_told(
    command: str, finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result, written = tmp_path / "depth" / "evaluation.json", tmp_path / "written"
    result.parent.mkdir()
    for encoder, told in (("viewed-step-3-ema", 0), ("base-step-4", 1)):
        result.write_text(json.dumps(EVALUATION | {"encoder": encoder}))
        caplog.clear()
        for given in (result.parent, result):
            options = ["--evaluation", str(given), "--out", str(written), "--overwrite"]
            assert CliRunner().invoke(app, [command, str(finished.folder), *options]).exit_code == 0
        assert encoder in written.read_text()
        assert caplog.text.count(f"is of {encoder}, not of the run viewed") == 2 * told


def browse(path: Path) -> tuple[str, str]:
    """The document as Chromium has it when loaded, with no name resolved, and what its console says."""
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr", "--dump-dom")
    profile = f"--user-data-dir={path.parent / 'profile'}"
    done = subprocess.run(
        [CHROMIUM or "", *options, profile, "--host-resolver-rules=MAP * ~NOTFOUND", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH; launch/system.sh installs it")
def test_a_browser_shows_the_page_and_has_nothing_to_say(finished: Finished, tmp_path: Path) -> None:
    own, text = view(finished.folder)
    path = tmp_path / "page.html"
    path.write_text(text)
    document, console = browse(path)
    assert not console
    assert Page(document).words["h2"] == own.words["h2"]
    path.write_text(text.replace("<h1>", '<img src="http://example.org/a.png"><script>1</script><h1>'))
    assert browse(path)[1].count("Content Security Policy") >= 2  # the policy forbids both, and the console would have told
