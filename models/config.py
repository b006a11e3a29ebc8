"""The sections of a run config that describe the encoder, the objectives and the downstream tasks. Imports no torch.

Sizes follow the ViT literature: tiny and small from DeiT (Touvron et al. 2021), base to huge from Dosovitskiy et al.
2021, giant and gigantic from Zhai et al. 2022. Point encoders: `reference` is that of SimIPU (Li et al. 2022).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator


class Section(BaseModel):
    """A part of a run config: unknown keys are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TransformerShape(NamedTuple):
    """Width, depth, heads and hidden width of the MLP of a stack of blocks."""

    width: int
    depth: int
    heads: int
    hidden: int


class Grid(NamedTuple):
    """Tokens of a clip along time, cameras, height and width; they lie in this order."""

    t: int
    v: int
    h: int
    w: int

    @property
    def tokens(self) -> int:
        return self.t * self.v * self.h * self.w


ENCODER_SHAPES = {
    "nano": TransformerShape(128, 6, 4, 512),
    "tiny": TransformerShape(192, 12, 3, 768),
    "small": TransformerShape(384, 12, 6, 1536),
    "base": TransformerShape(768, 12, 12, 3072),
    "large": TransformerShape(1024, 24, 16, 4096),
    "huge": TransformerShape(1280, 32, 16, 5120),
    "giant": TransformerShape(1408, 40, 16, 6144),
    "gigantic": TransformerShape(1664, 48, 16, 8192),
}

DECODER_SHAPES = {
    "tiny": TransformerShape(128, 4, 4, 512),
    "small": TransformerShape(512, 8, 16, 2048),
    "base": TransformerShape(768, 12, 12, 3072),
}


class SetAbstractionShape(NamedTuple):
    """One level of a PointNet++: how many points go on, what each gathers around it, and through which layers."""

    centres: int
    radii_m: tuple[float, ...]
    """Outer radii of rings around a centre: [0, r0), [r0, r1), ..."""
    neighbours: tuple[int, ...]
    """Points gathered in each ring."""
    widths: tuple[tuple[int, ...], ...]
    """Layers of the MLP of each ring."""
    out: int
    """Width after the rings are joined."""


class PointShape(NamedTuple):
    """A point encoder: the points of a cloud that it takes, and its levels."""

    points: int
    levels: tuple[SetAbstractionShape, ...]

    @property
    def centres(self) -> int:
        """Points that come out."""
        return self.levels[-1].centres

    @property
    def width(self) -> int:
        """Width of each."""
        return self.levels[-1].out


POINT_SHAPES = {
    "tiny": PointShape(
        2048,
        (
            SetAbstractionShape(256, (1.6, 3.2), (16, 16), ((16, 16, 32),) * 2, 32),
            SetAbstractionShape(128, (3.2, 6.4), (16, 16), ((32, 32, 64),) * 2, 64),
            SetAbstractionShape(64, (6.4, 12.8), (8, 8), ((64, 64, 128),) * 2, 128),
        ),
    ),
    "lean": PointShape(
        8192,
        (
            SetAbstractionShape(2048, (0.2, 0.4, 0.8), (32, 32, 64), ((32, 32, 64), (32, 32, 64), (64, 64, 128)), 128),
            SetAbstractionShape(1024, (0.4, 0.8, 1.6), (32, 32, 64), ((64, 64, 128), (64, 64, 128), (128, 128, 256)), 256),
            SetAbstractionShape(512, (1.6, 3.2, 4.8), (16, 16, 16), ((128, 128, 256), (128, 128, 256), (256, 256, 512)), 512),
        ),
    ),
    "reference": PointShape(
        16384,
        (
            SetAbstractionShape(4096, (0.2, 0.4, 0.8), (32, 32, 64), ((32, 32, 64), (32, 32, 64), (64, 64, 128)), 128),
            SetAbstractionShape(2048, (0.4, 0.8, 1.6), (32, 32, 64), ((64, 64, 128), (64, 64, 128), (128, 128, 256)), 256),
            SetAbstractionShape(1024, (1.6, 3.2, 4.8), (16, 16, 16), ((128, 128, 256), (128, 128, 256), (256, 256, 512)), 1024),
        ),
    ),
}

EncoderSize = Literal["nano", "tiny", "small", "base", "large", "huge", "giant", "gigantic"]
AttentionBackend = Literal["auto", "xformers", "sdpa"]


class EncoderConfig(Section):
    """The video ViT that all objectives share."""

    size: EncoderSize = "base"
    """Width, depth and heads, by the names of the literature; nano is ours, for looks and studies on a CPU."""
    patch_px: int = Field(16, ge=4)
    """Side of a square patch in pixels; halving it makes four times the tokens."""
    tubelet_frames: int = Field(1, ge=1, le=8)
    """Frames that one token spans; 1 for images, 2 for video."""
    positions: Literal["sincos", "rope", "learned"] = "rope"
    """Absolute sin-cos tables; rotary angles over (y, x), and over (t, y, x) when a clip has more than one tubelet; a learned table."""
    registers: int = Field(0, ge=0, le=32)
    """Learned tokens beside those of each clip, which all attend to and no objective sees; the class token of a plain ViT is one."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Probability with which the last block is skipped for a sample; earlier blocks less, linearly."""
    attention: AttentionBackend = "auto"
    """Which kernel runs attention; auto takes xFormers on CUDA where it can run, SDPA elsewhere."""
    has_time: bool | None = None
    """Whether positions know time; none where a clip has more than one tubelet. To be said where an encoder of clips gets images."""
    learned_grid: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Tubelets, rows and columns of a learned table; none are those of a clip. To be said where the encoder gets other clips."""

    def knows_time(self, grid: Grid) -> bool:
        """Whether positions of clips with `grid` know time."""
        return (self.tubelet_frames > 1 or grid.t > 1) if self.has_time is None else self.has_time

    def table_grid(self, grid: Grid) -> Grid:
        """Places of a learned table, for clips with `grid`."""
        t, h, w = self.learned_grid or (grid.t, grid.h, grid.w)
        return Grid(t, 1, h, w)

    def as_trained_on(self, grid: Grid) -> "EncoderConfig":
        """The same encoder, of clips with `grid`, to be given other clips: what follows from the clips is written down."""
        t, _, h, w = self.table_grid(grid)
        learned = {"learned_grid": (t, h, w)} if self.positions == "learned" else {}
        return self.model_copy(update={"has_time": self.knows_time(grid), **learned})

    @property
    def shape(self) -> TransformerShape:
        return ENCODER_SHAPES[self.size]


class MaskConfig(Section):
    """Which tokens of the target clip are hidden from the encoder."""

    kind: Literal["random", "tube"] = "random"
    """Every tubelet on its own, or the same places in every frame (Tong et al. 2022, VideoMAE)."""
    ratio: float = Field(0.9, gt=0, lt=1)
    """Share of the tokens that is hidden."""


class CompletionConfig(Section):
    """What CroCo and MAE share."""

    kind: str
    weight: float = Field(1.0, gt=0)
    """Factor on this objective's loss in the sum over objectives."""
    decoder: Literal["tiny", "small", "base"] = "small"
    """Size of the decoder: small is CroCo's and MAE's 512 x 8, base is CroCo v2's 768 x 12."""
    mask: MaskConfig = MaskConfig()
    normalise_target: bool = True
    """Regress each patch after subtracting its mean and dividing by its deviation."""


class CrocoConfig(CompletionConfig):
    """Cross-view completion (Weinzaepfel et al. 2022, 2023)."""

    kind: Literal["croco"] = "croco"


class MaeConfig(CompletionConfig):
    """Masked autoencoding of single views (He et al. 2022): CroCo without its second view."""

    kind: Literal["mae"] = "mae"
    mask: MaskConfig = MaskConfig(ratio=0.75)


SIMIPU_PRESETS: dict[str, dict[str, Any]] = {
    "modern": {},
    "reference": {
        "use_xyz": False,
        "stop_gradient": "head",
        "match_gate_m": None,
        "gather_negatives": False,
        "norm": "batch",
        "one_pair_per_patch": False,
    },
}
"""What a preset says instead of the defaults, unless the config says it itself."""


class SimipuConfig(Section):
    """Image-LiDAR contrast (Li et al. 2022, SimIPU)."""

    kind: Literal["simipu"] = "simipu"
    weight: float = Field(1.0, gt=0)
    """Factor on this objective's loss in the sum over objectives."""
    preset: Literal["modern", "reference"] = "modern"
    """modern is what the keys below have by default; reference sets them as the authors released them, whatever is not given."""
    points: Literal["tiny", "lean", "reference"] = "lean"
    """Size of the point encoder: points taken of a sweep, and centres that come out."""
    use_xyz: bool = True
    """Let the point encoder see coordinates relative to a centre; without, it sees intensity alone and ignores rotation."""
    stop_gradient: Literal["feature", "head", "none"] = "feature"
    """Image to point: stop before the head of the points (it learns), after it (it stays random, as released), or nowhere."""
    match_gate_m: float | None = Field(1.0, gt=0)
    """Centres of the two views further apart are no pair; none keeps all."""
    gather_negatives: bool = True
    """Contrast with the pairs of all ranks, so that the number of ranks does not change the loss; else with a rank's own."""
    norm: Literal["layer", "batch"] = "layer"
    """Norm of point encoder and heads; batch norm sees a rank's samples alone."""
    one_pair_per_patch: bool = True
    """Of the centres that fall on one patch of an image keep the nearest to the camera."""
    embedding: int = Field(128, ge=8)
    """Width of the space in which images and points are compared."""
    temperature: float = Field(0.07, gt=0)
    """Of both contrasts: lower looks at the hardest negatives only."""
    intra_weight: float = Field(1.0, ge=0)
    """Factor on the contrast of a sweep with its transformed copy, which is what trains the point encoder."""
    inter_weight: float = Field(1.0, ge=0)
    """Factor on the contrast of image and points, which is what trains the video encoder."""
    max_range_m: float = Field(60.0, gt=1)
    """Points further from the LiDAR are left out."""

    @model_validator(mode="before")
    @classmethod
    def preset_fills_what_is_not_given(cls, given: Any) -> Any:
        return _fill_preset(given, SIMIPU_PRESETS)

    @property
    def shape(self) -> PointShape:
        return POINT_SHAPES[self.points]


class VolumeShape(NamedTuple):
    """What MIM4D builds around the car: the box in the ego frame and its cells, depth, channels, decoder and renderer."""

    low_m: tuple[float, float, float]
    high_m: tuple[float, float, float]
    cells: tuple[int, int, int]
    """Along x, y, z."""
    depth_m: tuple[float, float]
    """Nearest and farthest depth that patches are lifted to."""
    depth_bins: int
    lifted: int
    """Channels of a lifted volume."""
    rendered: int
    """Channels of the volume that is rebuilt and rendered."""
    short_width: int
    long_width: int
    """Of the temporal decoder's branches."""
    coarse: int
    fine: int
    """Samples on a ray."""


VOLUME_SHAPES = {
    "tiny": VolumeShape((-25.6, -25.6, -3.2), (25.6, 25.6, 4.8), (32, 32, 5), (1.0, 33.0), 32, 32, 16, 64, 32, 32, 12),
    "base": VolumeShape((-51.2, -51.2, -3.2), (51.2, 51.2, 4.8), (128, 128, 5), (1.0, 65.0), 64, 128, 32, 128, 64, 72, 24),
    "fine": VolumeShape((-54.0, -54.0, -3.2), (54.0, 54.0, 4.8), (180, 180, 5), (1.0, 60.0), 118, 256, 32, 128, 64, 72, 24),
}

MIM4D_PRESETS: dict[str, dict[str, Any]] = {
    "modern": {},
    "reference": {"mask_ratio": 0.3, "targets": "current_and_past", "eikonal_weight": 0.0},
}
"""What a preset says instead of the defaults, unless the config says it itself."""


class Mim4dConfig(Section):
    """Masked multi-view video with volume rendering (Zou et al. 2024, MIM4D)."""

    kind: Literal["mim4d"] = "mim4d"
    weight: float = Field(1.0, gt=0)
    """Factor on this objective's loss in the sum over objectives."""
    preset: Literal["modern", "reference"] = "modern"
    """modern is what the keys below have by default; reference sets them as published, whatever is not given."""
    mode: Literal["frame", "surround", "spacetime"] = "frame"
    """What attends to what: an image to itself, all cameras of an instant to each other, or the whole clip but the withheld instant."""
    volume: Literal["tiny", "base", "fine"] = "base"
    """Box around the car, its cells, and sizes of decoder and renderer; base and fine are the published grids of 0.8 and 0.6 m."""
    lift: Literal["pull", "push"] = "pull"
    """How patches get into cells: each cell looks up what projects to it, or each patch is spread along its depths (LSS)."""
    mask_ratio: float = Field(0.5, ge=0, lt=1)
    """Share of the image cells that is hidden from the encoder."""
    mask_cell_px: int = Field(32, ge=4)
    """Side of the square cells that are hidden or seen as a whole."""
    targets: Literal["any", "current_and_past"] = "any"
    """Which two instants are rebuilt and rendered: any two of the clip, or the newest and one before it."""
    rays: int = Field(512, ge=1)
    """Rays for each camera of a target."""
    depth_supervision: bool = True
    """Learn from LiDAR where it hits; without, colours alone, and no LiDAR is needed."""
    rgb_weight: float = Field(10.0, ge=0)
    """Factor on the mean absolute error of colours, which lie in [0, 1]."""
    depth_weight: float = Field(10.0, ge=0)
    """Factor on the mean absolute error of depths, in units of the grid's largest bound."""
    eikonal_weight: float = Field(0.01, ge=0)
    """Factor on how far the signed distance's gradient is from unit length."""

    @model_validator(mode="before")
    @classmethod
    def preset_fills_what_is_not_given(cls, given: Any) -> Any:
        return _fill_preset(given, MIM4D_PRESETS)

    @property
    def shape(self) -> VolumeShape:
        return VOLUME_SHAPES[self.volume]


class DepthConfig(Section):
    """Downstream: monocular depth, one image at a time, learnt from the LiDAR points that fall on it."""

    kind: Literal["depth"] = "depth"
    weight: float = Field(1.0, gt=0)
    """Factor on this task's loss in the sum over objectives."""
    head_width: int = Field(64, ge=8)
    """Channels of the head's feature maps; DPT has 256."""
    points: int = Field(1024, ge=1)
    """LiDAR points of an image that are learnt from and scored; a random choice where more fall on it."""
    near_m: float = Field(1.0, gt=0)
    """Nearest depth that is predicted and scored."""
    far_m: float = Field(80.0, gt=0)
    """Farthest depth that is predicted and scored; 80 m is the usual cap on KITTI."""

    @model_validator(mode="after")
    def range_is_ordered(self) -> "DepthConfig":
        if self.near_m >= self.far_m:
            raise ValueError(f"near_m {self.near_m} is not below far_m {self.far_m}; 1 and 80 are the defaults")
        return self


class PairTaskConfig(Section):
    """What the downstream tasks share in which two images meet in CroCo's decoder."""

    kind: str
    weight: float = Field(1.0, gt=0)
    """Factor on this task's loss in the sum over objectives."""
    decoder: Literal["tiny", "small", "base"] = "tiny"
    """Size of the decoder, by CroCo's names; that of the run whose decoder is taken along."""


class PoseConfig(PairTaskConfig):
    """Downstream: the relative pose of the cameras of a pair."""

    kind: Literal["pose"] = "pose"
    rotation_weight: float = Field(3.0, ge=0)
    """What an error of the rotation (Frobenius norm, about 1.4 times its angle in radians) costs against one of a metre."""


class FlowConfig(PairTaskConfig):
    """Downstream: dense optical flow from an image to the camera's next one; its truth exists for synthetic scenes alone."""

    kind: Literal["flow"] = "flow"
    head_width: int = Field(64, ge=8)
    """Channels of the head's feature maps; DPT has 256."""


def _check_cells(cell_m: float, range_m: float) -> None:
    cells = 2 * range_m / cell_m
    if abs(cells - round(cells)) > 1e-6:
        raise ValueError(
            f"cell_m {cell_m} does not divide the {2 * range_m} m from side to side; 50 m, and 0.5 or 1 m a cell, are usual"
        )


class LiftConfig(Section):
    """How the images of all cameras become features seen from above, for the tasks around the car."""

    range_m: float = Field(50.0, gt=0, le=60)
    """Reach ahead, behind, left and right of the car; 50 m is the published grid of 100 m x 100 m."""
    cell_m: float = Field(1.0, gt=0)
    """Side of a lifted cell; halving it makes four times the cells."""
    far_m: float = Field(61.0, gt=1)
    """Farthest depth that patches are lifted to."""
    depth_bins: int = Field(60, ge=2)
    """Equal intervals of depth that a patch chooses from."""
    channels: int = Field(32, ge=4)
    """Of a lifted cell."""
    width: int = Field(64, ge=8)
    """Channels of the features seen from above."""

    @model_validator(mode="after")
    def cells_tile_the_range(self) -> "LiftConfig":
        _check_cells(self.cell_m, self.range_m)
        return self


class BevConfig(Section):
    """Downstream: vehicles and drivable area seen from above."""

    kind: Literal["bev"] = "bev"
    weight: float = Field(1.0, gt=0)
    """Factor on this task's loss in the sum over objectives."""
    lift: LiftConfig = LiftConfig()
    """How images become features seen from above."""
    cell_m: float = Field(0.5, gt=0)
    """Side of a cell that is predicted and scored; Lift-Splat has 0.5 m."""
    vehicle_weight: float = Field(2.13, gt=0)
    """What a cell of a vehicle counts against one without, since few are; Lift-Splat has 2.13."""

    @model_validator(mode="after")
    def cells_tile_the_range(self) -> "BevConfig":
        _check_cells(self.cell_m, self.lift.range_m)
        return self


DETECTION_CLASSES = 10
"""Of nuScenes' detection task; `trainer.data.boxes` has their names."""


class DetectionConfig(Section):
    """Downstream: 3D boxes around the car from all cameras of one instant."""

    kind: Literal["detection"] = "detection"
    weight: float = Field(1.0, gt=0)
    """Factor on this task's loss in the sum over objectives."""
    lift: LiftConfig = LiftConfig()
    """How images become features seen from above, and the cells in which boxes are found."""
    head_width: int = Field(64, ge=8)
    """Channels of the head's feature maps, as many as CenterPoint's has."""
    boxes: int = Field(300, ge=1, le=500)
    """Boxes that are predicted for an instant, however sure; nuScenes takes 500 at most."""

    @model_validator(mode="after")
    def map_has_room_for_the_boxes(self) -> "DetectionConfig":
        places = DETECTION_CLASSES * round(2 * self.lift.range_m / self.lift.cell_m) ** 2
        if places < self.boxes:
            raise ValueError(f"boxes is {self.boxes} and the map has places for {places}; lower boxes or lift.cell_m")
        return self


LINE_PATCH_M = (30.0, 15.0)
"""Half the patch in which lines of the map are known, HDMapNet's: ahead and behind, left and right of the car."""


class PatchLiftConfig(LiftConfig):
    """The lift of lines, which are those of a patch of 60 m x 30 m."""

    range_m: float = Field(30.0, ge=30, le=60)
    """Reach ahead, behind, left and right of the car; beyond the patch nothing is read."""
    far_m: float = Field(45.0, gt=1)
    """Farthest depth that patches are lifted to."""
    depth_bins: int = Field(44, ge=2)
    """Equal intervals of depth that a patch chooses from."""


class MapConfig(Section):
    """Downstream: dividers, crossings and boundaries of the map as lines."""

    kind: Literal["map"] = "map"
    weight: float = Field(1.0, gt=0)
    """Factor on this task's loss in the sum over objectives."""
    lift: PatchLiftConfig = PatchLiftConfig()
    """How images become features seen from above."""
    decoder: Literal["tiny", "small", "base"] = "tiny"
    """Size of the decoder whose queries look at the map, as in CroCo."""
    queries: int = Field(50, ge=1)
    """Lines that can be found; MapTR has 50."""
    points: int = Field(20, ge=3)
    """Of a line; MapTR has 20."""
    point_weight: float = Field(10.0, gt=0)
    """What an error of the points, by half the patch, costs against one of the class."""

    @model_validator(mode="after")
    def patch_lies_in_the_lift(self) -> "MapConfig":
        cells = round(2 * self.lift.range_m / self.lift.cell_m)
        if not all(0 < side <= cells for side in self.patch_cells):
            ahead, aside = LINE_PATCH_M
            raise ValueError(
                f"lift.cell_m {self.lift.cell_m} cuts the patch of {2 * ahead:g} m x {2 * aside:g} m into "
                f"{' x '.join(map(str, self.patch_cells[::-1]))} cells of {cells} x {cells}; 1 or 2 m a cell are usual"
            )
        return self

    @property
    def patch_cells(self) -> tuple[int, int]:
        """Rows and columns of the lifted cells in the patch; even, so that the car stands between cells."""
        columns, rows = (2 * round(half / self.lift.cell_m) for half in LINE_PATCH_M)
        return rows, columns


TaskConfig = DepthConfig | PoseConfig | FlowConfig | BevConfig | MapConfig | DetectionConfig
"""Downstream tasks: what an encoder is evaluated by, each with ground truth."""

ObjectiveConfig = Annotated[CrocoConfig | MaeConfig | SimipuConfig | Mim4dConfig | TaskConfig, Field(discriminator="kind")]


def _fill_preset(given: Any, presets: Mapping[str, Mapping[str, Any]]) -> Any:
    """Keys of the preset that is asked for under the keys that are given."""
    if isinstance(given, dict):
        return {**presets.get(given.get("preset", "modern"), {}), **given}
    return given
