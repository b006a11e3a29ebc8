"""Same clips, order and pixels: from the dataroot, a folder of shards and S3, for any number of ranks and workers, and after a resume."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.batch import Batch
from models.config import CrocoConfig, EncoderConfig, Grid, SimipuConfig
from models.pretraining import build_preparations
from tests.s3_server import S3Server
from tests.trainer.packed import CLIP, packed
from trainer.config.data import NuscenesData, ShardsData
from trainer.data.build import build_source
from trainer.data.loader import PlacedSamples, PlaceSampler, needed_fields, read_batches
from trainer.data.mixed_source import portions_of
from trainer.data.order import Order, Share

SEED, GLOBAL_BATCH, STEPS = 3, 4, 5
PATCH_PX = 16


def read_steps(
    config: NuscenesData | ShardsData, *, ranks: int = 1, workers: int = 0, reads_in_flight: int = 1, first_step: int = 0
) -> dict[tuple[int, int], str]:
    """A digest of everything that each place of the run gets, read by `ranks` loaders."""
    grid = Grid(t=CLIP["frames"], v=1, h=CLIP["height_px"] // PATCH_PX, w=CLIP["width_px"] // PATCH_PX)
    objectives = (CrocoConfig(decoder="tiny"), SimipuConfig(points="tiny"))
    preparations = build_preparations(objectives, grid, EncoderConfig(size="tiny", patch_px=PATCH_PX), cameras=6)
    source = build_source(config, "train", needed_fields(preparations), augment=True)
    assert source is not None
    samples = PlacedSamples(source, Order(SEED, portions_of(source), GLOBAL_BATCH), preparations)
    digests = {}
    for rank in range(ranks):
        share = Share(rank, ranks, GLOBAL_BATCH // ranks, 1)
        batches = read_batches(
            samples, PlaceSampler(share, first_step, STEPS), workers=workers, reads_in_flight=reads_in_flight, timeout_s=60.0
        )
        for step, batch in zip(range(first_step, STEPS), batches, strict=True):
            digests |= {(step, slot): digest for slot, digest in zip(share.slots(0), digests_of(batch), strict=True)}
    assert len(digests) == (STEPS - first_step) * GLOBAL_BATCH
    return digests


def digests_of(batch: Batch) -> Iterator[str]:
    """One a sample, of its name, its fields and what was prepared."""
    fields = {**batch.shared, **{f"{o} {name}": field for o, of_one in batch.prepared.items() for name, field in of_one.items()}}
    for place, clip in enumerate(batch.clips):
        digest = hashlib.sha256(clip.encode())
        for name in sorted(fields):
            digest.update(name.encode() + fields[name][place].numpy().tobytes())
        yield digest.hexdigest()


@pytest.fixture(scope="module")
def wanted(loose: NuscenesData) -> dict[tuple[int, int], str]:
    """What the dataroot gives one rank without workers."""
    digests = read_steps(loose)
    assert len(set(digests.values())) == len(digests)
    return digests


@pytest.mark.parametrize(("ranks", "workers", "reads_in_flight"), [(1, 0, 1), (1, 2, 3), (2, 1, 2), (4, 0, 4)], ids=str)
def test_shards_give_every_place_what_the_dataroot_gives(
    loose: NuscenesData,
    packed_folder: Path,
    wanted: dict[tuple[int, int], str],
    ranks: int,
    workers: int,
    reads_in_flight: int,
) -> None:
    config = packed(packed_folder, loose)
    assert read_steps(config, ranks=ranks, workers=workers, reads_in_flight=reads_in_flight) == wanted


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (4, 1)])
def test_s3_gives_every_place_what_the_dataroot_gives(
    loose: NuscenesData, packed_s3: str, s3_server: S3Server, wanted: dict[tuple[int, int], str], ranks: int, workers: int
) -> None:
    config = packed(packed_s3, loose, s3_server.config())
    assert read_steps(config, ranks=ranks, workers=workers, reads_in_flight=3) == wanted


def test_a_run_that_begins_later_gets_the_same_from_there_on(
    loose: NuscenesData, packed_folder: Path, wanted: dict[tuple[int, int], str]
) -> None:
    later = read_steps(packed(packed_folder, loose), ranks=2, workers=1, first_step=3)
    assert later == {place: digest for place, digest in wanted.items() if place[0] >= 3}
