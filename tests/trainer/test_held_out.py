"""Held-out clips: which they are."""

from pathlib import Path

from models.config import EncoderConfig, Grid, SimipuConfig
from models.pretraining import build_preparations
from tests.trainer.packed import packed
from trainer.config.data import DatasetConfig, NuscenesData
from trainer.config.training import ParallelConfig
from trainer.data.build import build_source
from trainer.data.loader import needed_fields
from trainer.data.mixed_source import MixedSource
from trainer.held_out import read_held_out
from trainer.parallel.launch import read_launch


def test_of_data_sets_of_any_weights_every_clip_is_held_out_once(
    loose: NuscenesData, packed_folder: Path, packed_again: Path
) -> None:
    weighted = (DatasetConfig(uri=str(packed_folder), weight=5), DatasetConfig(uri=str(packed_again)))
    data = packed(packed_folder, loose).model_copy(update={"datasets": weighted})
    preparations = build_preparations(
        [SimipuConfig(points="tiny")], Grid(2, 1, 4, 8), EncoderConfig(size="tiny", patch_px=8), cameras=6
    )
    source = build_source(data, "val", needed_fields(preparations), augment=False)
    assert isinstance(source, MixedSource)
    alone = read_launch({}, ParallelConfig())
    clips = len(source)
    held_out = read_held_out(source, source, preparations, seed=0, clips=clips, micro_batch=4, launch=alone)
    names = [name for batch in held_out.batches for name in batch.clips]
    counted = [bool(counts) for of_batch in held_out.counted for counts in of_batch]
    assert sorted(name for name, counts in zip(names, counted, strict=True) if counts) == sorted(map(source.name, range(clips)))
