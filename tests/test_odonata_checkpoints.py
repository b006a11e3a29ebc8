"""`odonata checkpoints` and `odonata export`: what they print, what they refuse, and with which code they end."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from models.encoder import build_encoder
from odonata import door
from tests.command import Command, command
from tests.runs import SMALL_RUN
from tests.trainer.checkpoint.toy import save_now
from trainer.checkpoint.boxes import boxes_of
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.record import MANIFEST
from trainer.config.load import dump_run_config, parse_run_config
from trainer.config.training import CheckpointConfig
from trainer.store.open import open_store

__all__ = ["command"]  # a fixture


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a one-block encoder, whole at steps 10 and 20."""
    store = open_store(tmp_path_factory.mktemp("runs") / "video")
    content = yaml.safe_load(SMALL_RUN) | {"encoder": {"size": "tiny", "patch_px": 8, "positions": "sincos"}}
    config = parse_run_config(content, origin="the test")
    store.put("config.yaml", dump_run_config(config).encode())
    weights = build_encoder(config.encoder, config.token_grid).state_dict()
    for step in (10, 20):
        state = {f"model.encoder.{name}": boxes_of(torch.full_like(tensor, step)) for name, tensor in weights.items()}
        save_now(CheckpointManager(store, CheckpointConfig()), step, state, engine="fsdp2")
    return Path(store.uri)


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to spoil."""
    return Path(shutil.copytree(finished_run, tmp_path / "video"))


def folder_of(run: Path, step: int) -> Path:
    (folder,) = run.glob(f"checkpoints/step-{step:08d}-*")
    return folder


def damage(run: Path, step: int) -> None:
    path = folder_of(run, step) / "rank-00000.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


def test_a_list_has_a_line_for_every_save_and_says_what_is_wrong(run: Path, command: Command) -> None:
    (folder_of(run, 20) / MANIFEST).unlink()
    code, out, _ = command("checkpoints", "list", run)
    heading, newest, oldest = out.splitlines()
    assert code == 0
    assert heading.split() == ["step", "written", "size", "engine", "ranks", "folder", "whole?"]
    assert newest.split()[0] == "20"
    assert "unfinished: it has no manifest.json" in newest
    assert oldest.split()[0] == "10"
    assert " fsdp2 " in oldest
    assert oldest.rstrip().endswith("yes (sizes)")
    listed = json.loads(command("checkpoints", "list", run, "--json")[1])
    assert [(line["step"], line["state"], line["world_size"]) for line in listed] == [(20, "unfinished", None), (10, "whole", 1)]


def test_show_says_who_wrote_a_checkpoint_and_what_is_in_it(run: Path, command: Command) -> None:
    code, out, _ = command("checkpoints", "show", run, "--step", "10")
    assert code == 0
    assert "engine      fsdp2\n" in out
    assert "progress    step 10\n" in out
    rows = [line.split() for line in out.splitlines()]
    assert [
        "model.encoder.embed.weight",
        "192",
        "x",
        "3",
        "x",
        "1",
        "x",
        "8",
        "x",
        "8",
        "float32",
        f"{192 * 3 * 64 * 4:,}",
    ] in rows
    shown = json.loads(command("checkpoints", "show", folder_of(run, 20), "--json")[1])
    assert (shown["step"], shown["progress"], list(shown["totals"])) == (20, {"step": 20}, ["model"])
    assert shown["totals"]["model"]["bytes"] == shown["bytes"] == sum(tensor["bytes"] for tensor in shown["tensors"].values())


def test_verify_prints_all_and_ends_with_2_where_a_byte_is_wrong(run: Path, command: Command) -> None:
    code, out, _ = command("checkpoints", "verify", run)
    assert code == 0
    assert out.count("yes (every byte)") == 2
    damage(run, 20)
    code, out, err = command("checkpoints", "verify", run)
    assert code == 2
    assert "damaged: rank-00000.bin has the checksum" in out
    assert out.count("yes (every byte)") == 1
    assert err.startswith("odonata: ")
    assert "1 of 2 checkpoints are damaged" in err
    assert command("checkpoints", "verify", run, "--step", "10")[0] == 0
    code, out, _ = command("checkpoints", "verify", run, "--json")
    assert (code, [line["state"] for line in json.loads(out)]) == (2, ["damaged", "whole"])


def test_a_damaged_checkpoint_that_is_passed_over_is_a_line_on_stderr(run: Path) -> None:
    (folder_of(run, 20) / "rank-00000.bin").unlink()
    show = [sys.executable, "-m", "odonata", "checkpoints", "show", str(run), "--json"]
    done = subprocess.run(show, cwd=Path(door.__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["step"] == 10
    (line,) = done.stderr.splitlines()
    assert line.endswith("rank-00000.bin is missing")


def test_a_copy_says_where_it_lies_and_is_refused_a_second_time(run: Path, tmp_path: Path, command: Command) -> None:
    code, out, _ = command("checkpoints", "copy", run, tmp_path / "kept", "--step", "10")
    assert (code, out.strip()) == (0, f"{folder_of(tmp_path / 'kept', 10)}/")
    assert command("checkpoints", "verify", tmp_path / "kept")[0] == 0
    assert command("export", tmp_path / "kept")[0] == 0
    code, _, err = command("checkpoints", "copy", folder_of(run, 10), tmp_path / "kept")
    assert code == 2
    assert "where a checkpoint is already" in err
    code, _, err = command("checkpoints", "copy", run, folder_of(run, 20))
    assert code == 2
    assert f"give the run, {run}" in err


@pytest.mark.parametrize("name", [("export",), ("checkpoints", "export")])
def test_an_export_says_what_it_took_and_how_to_load_it(run: Path, name: tuple[str, ...], command: Command) -> None:
    code, out, _ = command(*name, run, "--step", "10")
    assert code == 0
    path = Path("video-step-00000010-model.safetensors")
    assert out.splitlines() == [
        f"{path}: the encoder of step 10, its weights",
        f"load it with safetensors.torch.load_file({str(path.absolute())!r})",
        "run it with the forward in docs/export.md",
    ]
    assert all(torch.equal(tensor, torch.full_like(tensor, 10)) for tensor in load_file(path).values())
    code, _, err = command(*name, run, "--step", "10")
    assert code == 2
    assert "is there already" in err
    assert command(*name, run, "--step", "10", "--overwrite")[0] == 0


def test_an_export_takes_the_newest_checkpoint_in_each_format(run: Path, tmp_path: Path, command: Command) -> None:
    for layout, weights in (("timm", tmp_path / "timm"), ("hf", tmp_path / "hf" / "model.safetensors")):
        code, out, _ = command("export", run, "--format", layout, "--out", tmp_path / layout)
        assert code == 0
        assert "the encoder of step 20" in out
        assert load_file(weights)


@pytest.mark.parametrize(
    "arguments", [("export", "--format", "coreml"), ("export", "--weights", "best"), ("checkpoints", "prune")]
)
def test_what_does_not_exist_is_refused_with_what_does(run: Path, arguments: tuple[str, ...], command: Command) -> None:
    code, _, err = command(*arguments, run)
    assert code == 2
    assert repr(arguments[-1]) in err
    assert not list(run.parent.glob("*.safetensors"))


@pytest.mark.parametrize("name", [("checkpoints", "show"), ("checkpoints", "verify"), ("checkpoints", "copy"), ("export",)])
def test_a_mistake_is_a_sentence_and_the_code_that_says_do_not_retry(
    run: Path, tmp_path: Path, name: tuple[str, ...], command: Command
) -> None:
    more = (tmp_path / "kept",) if "copy" in name else ()
    (folder_of(run, 20) / MANIFEST).write_bytes(b'{"format_version": 2, "che')
    (folder_of(run, 10) / MANIFEST).unlink()
    for arguments, sentence in (
        ((tmp_path / "nothing", *more), "there is no run"),
        ((run, *more, "--step", "11"), "holds no whole one"),
        ((run, *more, "--step", "20"), "is not JSON"),
        ((run, *more, "--step", "10"), "has no manifest.json"),
        ((f"{run}/checkpoints/step-00000030-0000-ab", *more), "nothing lies there"),
        (("gs://bucket/run", *more), "s3://bucket/prefix"),
    ):
        code, _, err = command(*name, *arguments)
        assert code == 2
        assert err.startswith("odonata: ")
        assert sentence in err
        assert "Traceback" not in err
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [("endpoint=x", "did you mean endpoint_url"), ("endpoint_url", "is not key=value"), ("threads=0", "store.threads")],
)
def test_a_way_to_a_store_that_is_none_is_refused(run: Path, setting: str, sentence: str, command: Command) -> None:
    code, _, err = command("checkpoints", "list", run, "--store", setting)
    assert code == 2
    assert sentence in err


@pytest.mark.parametrize("name", ["list", "show", "verify", "copy", "export"])
def test_help_has_an_example_for_every_command(name: str, command: Command) -> None:
    code, out, _ = command("checkpoints", name, "--help")
    assert code == 0
    assert f"Example: odonata checkpoints {name}" in out
