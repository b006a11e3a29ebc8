"""The synthetic city packed once, into a folder and into S3: fixtures that `tests/trainer/conftest.py` hands out."""

from pathlib import Path

import pytest

from tests.s3_server import S3Server
from trainer.config.data import DatasetConfig, NuscenesData, PairConfig, ShardsData
from trainer.config.store import StoreConfig
from trainer.data.build import open_nuscenes_index
from trainer.data.shards.packing import pack
from trainer.data.shards.recording import NuscenesRecording

CLIP = {"frames": 2, "spacing_s": 0.5, "height_px": 32, "width_px": 64}
PAIRS = PairConfig(min_overlap=0.01, max_overlap=0.99, min_motion_m=0.1)


@pytest.fixture(scope="session")
def loose(city: Path, tmp_path_factory: pytest.TempPathFactory) -> NuscenesData:
    """The city as it lies in its dataroot."""
    return NuscenesData(root=city, clip=CLIP, pairs=PAIRS, index_folder=tmp_path_factory.mktemp("index"))


@pytest.fixture(scope="session")
def recording(loose: NuscenesData) -> NuscenesRecording:
    return NuscenesRecording(open_nuscenes_index(loose))


@pytest.fixture(scope="session")
def packed_folder(recording: NuscenesRecording, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The city, packed two drives a shard; nobody may change it."""
    folder = tmp_path_factory.mktemp("packed") / "city"
    pack(recording, str(folder), drives_per_shard=2, workers=1)
    return folder


@pytest.fixture(scope="session")
def packed_again(loose: NuscenesData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as another data set: its drives have other names."""
    folder = tmp_path_factory.mktemp("packed") / "again"
    pack(NuscenesRecording(open_nuscenes_index(loose), "again-"), str(folder), drives_per_shard=2, workers=1)
    return folder


def packed(uri: object, loose: NuscenesData, store: StoreConfig | None = None, **changes: object) -> ShardsData:
    """How a run reads what lies at `uri`."""
    shared = {name: getattr(loose, name) for name in ("clip", "pairs", "cameras", "augment", "index_folder")}
    return ShardsData(datasets=(DatasetConfig(uri=str(uri)),), store=store or StoreConfig(), **{**shared, **changes})


@pytest.fixture
def packed_s3(recording: NuscenesRecording, s3_server: S3Server, s3_owner: None) -> str:
    """The city in S3; packed by the first test that wants it."""
    uri = f"s3://{s3_server.bucket}/shards/city"
    pack(recording, uri, s3_server.config(), drives_per_shard=2, workers=1)
    return uri
