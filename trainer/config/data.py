"""Where clips come from, what a clip is, and how pairs are chosen and cropped."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from models.config import Section
from trainer.config.store import StoreConfig

SURROUND_CAMERAS = (
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_RIGHT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_FRONT_LEFT",
)


class ClipConfig(Section):
    """The shape of a clip as the encoder sees it."""

    frames: int = Field(1, ge=1, le=64)
    """Timestamps in a clip; 1 is an image."""
    spacing_s: float = Field(0.5, gt=0)
    """Seconds between two frames of a clip; the nearest camera images are taken."""
    height_px: int = Field(224, ge=16)
    """Height of the crop that the encoder sees."""
    width_px: int = Field(224, ge=16)
    """Width of the crop that the encoder sees."""


class PairConfig(Section):
    """Which second view completes a clip; chosen by frustum overlap from calibration and pose."""

    cross_camera_share: float = Field(0.5, ge=0, le=1)
    """Share of pairs from a neighbouring camera at the same instants; the rest is the same camera at another time."""
    min_overlap: float = Field(0.05, ge=0, le=1)
    """Least share of the target's frustum that the reference sees."""
    max_overlap: float = Field(0.95, ge=0, le=1)
    """Most: near-duplicates teach copying, not geometry."""
    max_gap_s: float = Field(2.0, gt=0)
    """Longest time between target and reference of the same camera."""
    min_motion_m: float = Field(0.5, ge=0)
    """Least distance the camera moved between target and reference of the same camera."""

    @model_validator(mode="after")
    def overlap_bounds_are_ordered(self) -> "PairConfig":
        if self.min_overlap >= self.max_overlap:
            raise ValueError(
                f"min_overlap {self.min_overlap} is not below max_overlap {self.max_overlap}; "
                "set min_overlap lower, 0.05 and 0.95 are the defaults"
            )
        return self


class AugmentConfig(Section):
    """Crops and colours, drawn for each view on its own as in CroCo (its random crop is 224 of 256 pixels)."""

    crop_share: tuple[float, float] = (0.875, 0.875)
    """Side of the crop as a share of the largest window of the target's aspect ratio: least and most."""
    colour_jitter: float = Field(0.4, ge=0, lt=1)
    """Brightness, contrast and saturation change by a factor between 1 - this and 1 + this."""
    flip_probability: float = Field(0.0, ge=0, le=1)
    """Probability that a whole sample, both its views, is mirrored left to right."""

    @model_validator(mode="after")
    def crop_shares_are_ordered_shares(self) -> "AugmentConfig":
        least, most = self.crop_share
        if not 0 < least <= most <= 1:
            raise ValueError(f"crop_share {self.crop_share} is not 0 < least <= most <= 1; (0.875, 0.875) is the default")
        return self


def _refuse_uri(place: object) -> object:
    if isinstance(place, str) and "://" in place:
        raise ValueError(f"{place} is no folder; data in a store is packed first (odonata pack) and read as kind: shards")
    return place


Folder = Annotated[Path, BeforeValidator(_refuse_uri)]
"""A folder of this machine; Path alone would take s3://bucket for one."""


class DataSection(Section):
    """What every kind of source shares."""

    clip: ClipConfig = ClipConfig()
    augment: AugmentConfig = AugmentConfig()
    workers: int = Field(4, ge=0)
    """Loader processes on each rank; 0 loads in the training process. Changes speed only."""
    prefetch_batches: int = Field(4, ge=1)
    """Micro-batches each worker keeps ready. Changes speed and memory only."""
    reads_in_flight: int = Field(2, ge=1, le=64)
    """Samples that a worker reads at once; more of them hide the latency of a store. Changes speed and memory only."""
    timeout_s: float = Field(300.0, gt=0)
    """Seconds to wait for a batch before the run ends with exit 75, as after a store that is dead."""
    max_replaced_share: float = Field(0.01, ge=0, le=1)
    """The run stops when more than this share of its clips had to be replaced because they could not be read."""

    def tolerates(self, replaced: int, clips: int) -> bool:
        """Whether so many of `clips` may be replaced; one always may, or a single broken clip among the first would be a catastrophe."""
        return replaced <= max(1, self.max_replaced_share * clips)


class DrivesData(DataSection):
    """What recorded drives share, wherever they lie."""

    kind: str

    train_split: str = "train"
    """Scenes to train on: a name from splits.json beside the tables or a split of the devkit; `all` is every scene."""
    val_split: str | None = "val"
    """Held-out scenes for evaluation; none evaluates nothing."""
    cameras: tuple[str, ...] = SURROUND_CAMERAS
    """Cameras to use, clockwise from the front."""
    pairs: PairConfig = PairConfig()
    index_folder: Path | None = None
    """Where the columnar index is kept on this node; none is a folder under the system's temporary one."""


class NuscenesData(DrivesData):
    """A dataroot in nuScenes format, recorded or written by `odonata synthesize`."""

    kind: Literal["nuscenes", "synthetic"] = "nuscenes"
    """synthetic is the same format, with dense ground truth beside the tables."""
    root: Folder
    """Folder that holds the version folder, samples and sweeps."""
    version: str | None = None
    """Version folder, as v1.0-trainval; none takes the only one there is."""


class DatasetConfig(Section):
    """One data set that `odonata pack` wrote."""

    uri: str
    """Folder or s3://bucket/prefix that it was packed into."""
    version: int | None = Field(None, ge=1)
    """Which version of it; none takes the newest, so a run that is to be repeated names one."""
    weight: float = Field(1.0, gt=0)
    """Share of the samples that come from it, against the weights of the others; in steps of 1/1024."""
    cameras: tuple[str, ...] | None = None
    """Its cameras where its rig calls them otherwise, as many as data.cameras and in the same order; none takes those."""


class CacheConfig(Section):
    """What was fetched, kept on this node's disk; it is shared by its ranks and outlives the run."""

    folder: Path
    """Folder to keep it in, on a fast local disk."""
    size_gb: float = Field(100.0, gt=0)
    """Bound; what was not read for the longest time goes first."""


class ShardsData(DrivesData):
    """Data sets packed by `odonata pack`, read by byte ranges from a folder or S3."""

    kind: Literal["shards"] = "shards"
    datasets: tuple[DatasetConfig, ...] = Field(min_length=1)
    """What to train on, mixed by weight."""
    store: StoreConfig = StoreConfig()
    """How s3:// is reached; left out, it is the run's own `store` section."""
    cache: CacheConfig | None = None
    """Keep what was fetched; none fetches it again in each epoch."""

    @model_validator(mode="after")
    def rigs_have_as_many_cameras(self) -> "ShardsData":
        for place, dataset in enumerate(self.datasets):
            if dataset.cameras is not None and len(dataset.cameras) != len(self.cameras):
                raise ValueError(
                    f"datasets[{place}].cameras names {len(dataset.cameras)} and data.cameras {len(self.cameras)}; "
                    "name as many, so that all samples have one shape"
                )
        return self

    @model_validator(mode="after")
    def datasets_are_different(self) -> "ShardsData":
        uris = [dataset.uri for dataset in self.datasets]
        if len(set(uris)) != len(uris):
            raise ValueError(f"datasets are {uris}; list each once and give it its weight")
        return self


class ImagePairsData(DataSection):
    """A folder of image pairs with a pairs.txt: two paths a line, relative to root."""

    kind: Literal["image_pairs"] = "image_pairs"
    root: Folder
    """Folder that holds the list and the images."""
    train_list: str = "pairs.txt"
    """File that lists the training pairs."""
    val_list: str | None = None
    """File that lists the held-out pairs; none evaluates nothing."""

    @model_validator(mode="after")
    def pairs_are_images(self) -> "ImagePairsData":
        if self.clip.frames != 1:
            raise ValueError(f"clip.frames is {self.clip.frames}, but image pairs have one frame; set clip.frames to 1")
        return self


DataConfig = Annotated[NuscenesData | ShardsData | ImagePairsData, Field(discriminator="kind")]
