"""The plan of the data: what it says of a sample is what reading that sample does."""

import json
from pathlib import Path
from typing import Any

import pytest

from odonata.door import app
from tests.trainer.packed import CLIP
from trainer.config.load import parse_run_config
from trainer.config.run import RunConfig
from trainer.data.build import build_source
from trainer.data.mixed_source import portions_of
from trainer.data.order import Order, Purpose, random_stream
from trainer.data.pair_source import PAIR_FIELDS
from trainer.data.surround_source import CAMERA_FIELDS, LIDAR_FIELDS
from trainer.errors import ConfigError
from trainer.plan.data import plan_data, reads_of
from trainer.store.local import LocalStore


def run_config(folder: Path, tmp_path: Path, **data: Any) -> RunConfig:
    return parse_run_config(
        {
            "schema_version": 1,
            "steps": 10,
            "global_batch": 4,
            "run": {"uri": str(tmp_path / "run")},
            "data": {
                "kind": "shards",
                "datasets": [{"uri": str(folder)}],
                "clip": CLIP,
                "pairs": {"min_overlap": 0.01, "max_overlap": 0.99, "min_motion_m": 0.1},
                "index_folder": str(tmp_path / "index"),
                **data,
            },
            "encoder": {"size": "tiny", "patch_px": 8},
            "objectives": [{"kind": "croco", "decoder": "tiny"}, {"kind": "simipu", "points": "tiny"}],
        },
        origin="a test",
    )


@pytest.fixture
def gets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Every range that is read of a shard."""
    seen: list[tuple[str, int, int]] = []
    read = LocalStore.get

    def get(self: LocalStore, key: str, offset: int = 0, length: int | None = None) -> bytes:
        if key.startswith("shards/"):
            assert length is not None
            seen.append((key, offset, length))
        return read(self, key, offset, length)

    monkeypatch.setattr(LocalStore, "get", get)
    return seen


@pytest.mark.parametrize("needs", [PAIR_FIELDS, CAMERA_FIELDS, CAMERA_FIELDS | LIDAR_FIELDS])
def test_planned_requests_are_those_that_loading_makes(
    packed_folder: Path, tmp_path: Path, gets: list[tuple[str, int, int]], needs: frozenset[str]
) -> None:
    config = run_config(packed_folder, tmp_path)
    source = build_source(config.data, "train", needs, augment=True)
    assert source is not None
    order = Order(config.seed, portions_of(source), config.global_batch)
    for step in range(6):
        index = order.sample(step, 0)
        gets.clear()
        planned = reads_of(source, index, random_stream(0, Purpose.LOAD, step=step, slot=0))
        assert not gets, "a plan fetches nothing"
        source.load(index, random_stream(0, Purpose.LOAD, step=step, slot=0))
        assert [(offset, length) for _, offset, length in gets] == [(span.offset, span.bytes) for span in planned.requests]


def test_demand_grows_with_gpus_and_falls_with_the_length_of_a_step(packed_folder: Path, tmp_path: Path) -> None:
    config = run_config(packed_folder, tmp_path)
    needs, (one, many) = plan_data(config, [8, 512], step_s=0.5, clips_per_gpu=4, read_clips=2)
    assert one.clips_per_s == 8 * 4 / 0.5
    assert many.gets_per_s == pytest.approx(64 * one.gets_per_s)
    assert one.gb_per_s == pytest.approx(one.clips_per_s * needs.bytes / 1e9)
    assert one.gb_per_s_per_node == pytest.approx(many.gb_per_s_per_node)
    assert one.cores_per_gpu == many.cores_per_gpu == pytest.approx(8 * needs.cpu_s)
    assert many.prefixes == -(-many.gets_per_s // 5500)
    assert one.epoch_hours == pytest.approx(64 * many.epoch_hours)


def test_a_cache_spares_its_share_of_the_data_set(packed_folder: Path, tmp_path: Path) -> None:
    cache = {"folder": str(tmp_path / "cache"), "size_gb": 0.001}
    _, (plan,) = plan_data(run_config(packed_folder, tmp_path, cache=cache), [8], step_s=1.0, clips_per_gpu=1, read_clips=1)
    assert plan.cached_share == pytest.approx(0.001 / plan.dataset_gb)


def test_data_that_is_not_packed_cannot_be_planned(city: Path, packed_folder: Path, tmp_path: Path) -> None:
    config = run_config(packed_folder, tmp_path)
    loose_data = {"kind": "nuscenes", "root": str(city)}
    with pytest.raises(ConfigError, match="pack it with `odonata pack`"):
        plan_data(
            parse_run_config({**config.model_dump(mode="json"), "data": loose_data}, origin="a test"),
            [8],
            step_s=1.0,
            clips_per_gpu=1,
            read_clips=1,
        )


def test_the_command_prints_a_table_and_json(packed_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text(run_config(packed_folder, tmp_path).model_dump_json())
    assert call("plan", str(path), "--data", "--gpus", "8,64", "--read-clips", "1") == 0
    assert "GET/s" in capsys.readouterr().out
    assert call("plan", str(path), "--data", "--gpus", "8,64", "--read-clips", "1", "--json") == 0
    assert [plan["gpus"] for plan in json.loads(capsys.readouterr().out)["plans"]] == [8, 64]


@pytest.mark.parametrize(("arguments", "sentence"), [(("--data", "--gpus", "8,x"), "no list of numbers from 1 on")])
def test_what_is_asked_wrongly_is_told(packed_folder: Path, tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(run_config(packed_folder, tmp_path).model_dump_json())
    with pytest.raises(ConfigError, match=sentence):
        call("plan", str(path), *arguments)


def call(*arguments: str) -> int:
    return app(list(arguments), standalone_mode=False) or 0
