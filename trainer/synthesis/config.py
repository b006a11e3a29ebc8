"""What to synthesise."""

from pydantic import Field

from models.config import Section


class SynthesisConfig(Section):
    """A data set of short drives through synthetic cities; the same config always gives the same bytes."""

    scenes: int = Field(8, ge=1, le=9999)
    """Drives; every fourth one is held out for evaluation, and at least one as soon as there are two."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Another seed is other cities and other drives."""
    duration_s: float = Field(20.0, ge=1.0, le=60.0)
    """Seconds in a drive; nuScenes has 20."""
    scale: float = Field(0.25, ge=0.02, le=1.0)
    """Share of the 1600 x 900 pixels of the nuScenes cameras."""
    jpeg_quality: int = Field(92, ge=50, le=100)
    """Quality of the images; higher is larger."""
    ground_truth: bool = True
    """Also write dense depth, forward flow and instance numbers of every image."""

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of an image."""
        return round(1600 * self.scale), round(900 * self.scale)

    def is_held_out(self, scene: int) -> bool:
        """Whether a scene belongs to the val split."""
        return scene % 4 == 3 or (scene == self.scenes - 1 and 1 < self.scenes < 4)
