"""One experiment over all its starts."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from tests.gloo import run_ranks
from tests.runs import SMALL_RUN
from trainer.config.load import dump_run_config, parse_run_config
from trainer.config.run import RunConfig
from trainer.config.training import WarmStartConfig
from trainer.data.shards.layout import Version, commit_version
from trainer.errors import ConfigError, DataError, RetryError
from trainer.experiment import check_same_beginning, check_same_experiment, pin_data
from trainer.store.local import LocalStore


def config_of(run: Path, *uris: Path, **data: Any) -> RunConfig:
    content = yaml.safe_load(SMALL_RUN)
    clip = content["data"]["clip"]
    content["run"]["uri"] = str(run)
    content["data"] = {"kind": "shards", "datasets": [{"uri": str(uri)} for uri in uris], "clip": clip, **data}
    return parse_run_config(content, origin="a test")


def grow(folder: Path) -> None:
    """One more version of a data set; without packs, since only its number counts here."""
    store = LocalStore(folder)
    versions = len(store.list("versions"))
    commit_version(store, Version(version=versions + 1, created="2026-01-01T00:00:00Z", packs=()))


def versions_of(config: RunConfig) -> list[int]:
    return [dataset["version"] for dataset in config.model_dump()["data"]["datasets"]]


def test_a_new_run_reads_the_newest_version_and_a_resumed_one_that_of_its_beginning(tmp_path: Path) -> None:
    grow(tmp_path / "one")
    grow(tmp_path / "one")
    grow(tmp_path / "two")
    store = LocalStore(tmp_path / "run")
    begun = pin_data(config_of(tmp_path / "run", tmp_path / "one", tmp_path / "two"), store)
    assert versions_of(begun) == [2, 1]
    store.put("config.yaml", dump_run_config(begun).encode())
    grow(tmp_path / "one")
    grow(tmp_path / "two")
    assert versions_of(pin_data(config_of(tmp_path / "run", tmp_path / "one", tmp_path / "two"), store)) == [2, 1]
    assert versions_of(pin_data(config_of(tmp_path / "other", tmp_path / "one"), LocalStore(tmp_path / "other"))) == [3]


def test_data_that_moved_is_the_same_experiment_and_another_version_is_not(tmp_path: Path) -> None:
    grow(tmp_path / "one")
    store = LocalStore(tmp_path / "run")
    begun = pin_data(config_of(tmp_path / "run", tmp_path / "one"), store)
    store.put("config.yaml", dump_run_config(begun).encode())
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = pin_data(
        config_of(tmp_path / "run", tmp_path / "moved", workers=2, reads_in_flight=7, store={"region": "eu-west-1"}), store
    )
    check_same_experiment(moved, store)
    grow(tmp_path / "moved")
    content = moved.model_dump(mode="json")
    content["data"]["datasets"][0]["version"] = 2
    with pytest.raises(ConfigError, match=r"data\.datasets\[0\]\.version 1 -> 2"):
        check_same_experiment(parse_run_config(content, origin="a test"), store)


def test_a_data_set_that_is_not_packed_is_told_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no version"):
        pin_data(config_of(tmp_path / "run", tmp_path / "nothing"), LocalStore(tmp_path / "run"))


def begin(folder: Path, versions: tuple[int, int], checkpoints: tuple[str, str]) -> str:
    """What this rank of two says to its version of the data and its checkpoint."""
    rank = dist.get_rank()
    config = config_of(folder / "run", folder / "data")
    dataset = config.data.datasets[0].model_copy(update={"version": versions[rank]})
    data = config.data.model_copy(update={"datasets": (dataset,)})
    config = config.model_copy(update={"data": data, "warm_start": WarmStartConfig(uri=checkpoints[rank])})
    try:
        check_same_beginning(config)
    except RetryError as error:
        return str(error)
    return "begins"


def begin_three_times(folder: Path) -> list[str]:
    same, other = "base/checkpoints/step-1", "base/checkpoints/step-2"
    return [begin(folder, *found) for found in (((1, 1), (same, same)), ((1, 2), (same, same)), ((1, 1), (same, other)))]


def test_ranks_that_found_other_data_or_another_checkpoint_try_again(tmp_path: Path) -> None:
    for said in run_ranks(begin_three_times, 2, tmp_path):
        assert said[0] == "begins"
        assert "different values of data.datasets[...].version ([[1], [2]])" in said[1] and "start the same job again" in said[1]
        assert "different values of warm_start.uri" in said[2] and "step-2" in said[2]
