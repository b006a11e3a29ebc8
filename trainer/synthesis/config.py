"""What to synthesise."""

from pydantic import Field

from models.config import Section
from trainer.synthesis.rig import RIGS, RigName


class SynthesisConfig(Section):
    """A data set of short drives through synthetic cities; the same config always gives the same bytes."""

    scenes: int = Field(8, ge=1, le=9999)
    """Drives; every fourth one is held out for evaluation, and at least one as soon as there are two."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Another seed is other cities and other drives."""
    rig: RigName = "nuscenes"
    """Sensors of the car that drives there; another rig sees the same drives."""
    duration_s: float = Field(20.0, ge=1.0, le=60.0)
    """Seconds in a drive; nuScenes has 20."""
    scale: float = Field(0.25, ge=0.02, le=1.0)
    """Share of the full size of the rig's cameras, which is 1600 x 900 pixels for nuScenes."""
    jpeg_quality: int = Field(92, ge=50, le=100)
    """Quality of the images; higher is larger."""
    ground_truth: bool = True
    """Also write dense depth, flow both ways and instance numbers of every image."""

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of an image."""
        width, height = RIGS[self.rig].size_px
        return round(width * self.scale), round(height * self.scale)

    def is_held_out(self, scene: int) -> bool:
        """Whether a scene belongs to the val split."""
        return scene % 4 == 3 or (scene == self.scenes - 1 and 1 < self.scenes < 4)
