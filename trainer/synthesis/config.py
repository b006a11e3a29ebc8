"""What a synthetic data set is asked to be.

Everything here changes the result; how many processes write it does not and is no part of it. A dataroot keeps its config
in `synthesis.json` and is only ever continued under the same one.
"""

from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict, Field, field_validator


class SynthesisConfig(BaseModel):
    """A synthetic data set, as a function of its seed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    scenes: int = Field(8, ge=1, le=7000)
    """Scenes to drive. The first 96 each have streets of their own (see `city.district_of_scene`)."""
    seed: int = Field(0, ge=0)
    """Another seed is another city with other traffic."""
    duration_s: float = Field(20.0, ge=0.5, le=120.0)
    """Seconds from a scene's first keyframe to its last, rounded down to the 0.5 s between keyframes."""
    scale: float = Field(0.25, ge=0.02, le=1.0)
    """Share of the cameras' 1600 x 900 pixels, along each side."""
    val_every: int = Field(4, ge=2)
    """Every n-th scene is held out, and the last one where that would hold out none (see `val_scenes`)."""
    jpeg_quality: int = Field(92, ge=1, le=100)
    """Pillow's scale; below 85 the blocks begin to disturb photometric losses."""
    lidar: bool = True
    """Write the 20 Hz LiDAR sweeps; without them keyframes have cameras only and annotations count no points."""
    ground_truth: bool = True
    """Write dense depth, forward flow and instance ids beside the pictures."""
    version: str = "v1.0-mini"
    """Folder of the tables, the `version` to open the devkit with."""

    @field_validator("version")
    @classmethod
    def version_is_one_folder_name(cls, version: str) -> str:
        """The tables lie directly in the dataroot, where the devkit looks."""
        taken = ("samples", "sweeps", "maps", "ground_truth", "scenes")
        if len(PurePosixPath(version).parts) != 1 or version in (".", "..", *taken):
            raise ValueError(f"version {version!r} is not a folder name of its own; v1.0-mini is the default")
        return version

    @property
    def samples(self) -> int:
        """Keyframes in a scene, two a second, both ends included."""
        return int(self.duration_s * 2) + 1

    @property
    def val_scenes(self) -> tuple[int, ...]:
        """Numbers of the held-out scenes: with two scenes or more, neither split is empty."""
        held_out = tuple(range(self.val_every - 1, self.scenes, self.val_every))
        return held_out or ((self.scenes - 1,) if self.scenes > 1 else ())
