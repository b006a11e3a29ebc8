"""How the study is run, as docs/study.md has it: its world, its pre-trainings, its tasks, and what is claimed of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

RUN = Path(__file__).parents[1] / "launch" / "runs" / "transfer.yaml"
SCRATCH = "scratch"
TRIVIAL = "trivial"
"""The answer that looks at no image; each task has its own (docs/evaluation.md)."""
LIKE = "croco"
"""The pre-training whose encoder a fresh one has the shape of."""
CITY = ("--scenes=96", "--duration-s=3", "--scale=0.125")
SHARED = "shared"
"""What all cells have in common, beside the names of tasks and pre-trainings in a report's protocol."""
CLIPS = 100
"""Held-out clips that are scored."""


@dataclass(frozen=True)
class Pretraining:
    """One way to pre-train; all take about as many minutes of a core, but for `mim4d_long`."""

    steps: int
    samples: int
    """In a step."""
    overrides: tuple[str, ...]

    @property
    def settings(self) -> tuple[str, ...]:
        """All that differs from the run config, but for seed and places."""
        return (f"steps={self.steps}", f"global_batch={self.samples}", *self.overrides)


_CROCO = "{kind: croco, decoder: tiny, mask: {ratio: 0.8}}"
_SIMIPU = "{kind: simipu, points: tiny}"
_MIM4D = "{kind: mim4d, volume: tiny, mask_ratio: 0.3, mask_cell_px: 16, rays: 16}"
_INSTANTS = ("data.clip.frames=3", "data.clip.spacing_s=0.5", "data.augment.crop_share=[0.95,1.0]")
PRETRAININGS: Mapping[str, Pretraining] = {
    "mae": Pretraining(1500, 36, ("objectives=[{kind: mae, decoder: tiny, mask: {ratio: 0.75}}]",)),
    "croco": Pretraining(1500, 18, (f"objectives=[{_CROCO}]",)),
    "simipu": Pretraining(900, 6, (f"objectives=[{_SIMIPU}]",)),
    "mim4d": Pretraining(1000, 1, (f"objectives=[{_MIM4D}]", *_INSTANTS)),
    "mim4d_long": Pretraining(3000, 1, (f"objectives=[{_MIM4D}]", *_INSTANTS)),
    "mix": Pretraining(400, 1, (f"objectives=[{_CROCO}, {_SIMIPU}, {_MIM4D}]", *_INSTANTS)),
}


@dataclass(frozen=True)
class Task:
    """A downstream task in the study."""

    metric: str
    """That claims are judged by."""
    lower_is_better: bool
    steps: int
    lr: float
    """Of the head; fine-tuned blocks learn at layer_decay of it."""
    modes: tuple[str, ...]
    overrides: tuple[str, ...]

    @property
    def settings(self) -> tuple[str, ...]:
        """All that differs from the task's protocol, but for the steps."""
        return (f"optim.lr={self.lr}", *self.overrides)


BOTH_MODES, _FROZEN = ("frozen", "finetuned"), ("frozen",)
_FOUR = "global_batch=4"
_LIFT = "objectives.0.lift={cell_m: 2.0, far_m: 33.0, depth_bins: 32, channels: 32, width: 32}"
TASKS: Mapping[str, Task] = {
    "depth": Task("abs_rel", True, 100, 1e-3, BOTH_MODES, (_FOUR, "objectives.0.head_width=32")),
    "pose": Task("median_cm", True, 300, 1e-3, BOTH_MODES, ("data.pairs.max_gap_s=0.5",)),
    "flow": Task("epe_px", True, 150, 1e-3, _FROZEN, ()),
    "bev": Task("drivable_best_iou", False, 300, 2e-3, BOTH_MODES, (_FOUR, _LIFT, "objectives.0.cell_m=1.0")),
    "detection": Task("NDS", False, 100, 1e-3, _FROZEN, (_FOUR, _LIFT)),
    "map": Task("mAP", False, 100, 1e-3, _FROZEN, (_FOUR, _LIFT)),
}


@dataclass(frozen=True)
class Claim:
    """What must come out for one paper to be believed here; one of the comparisons is enough."""

    text: str
    better: str
    worse: str
    tasks: tuple[str, ...]


CLAIMS = (
    *(
        Claim(f"CroCo beats {called} on {task}", "croco", other, (task,))
        for task in ("pose", "flow")
        for called, other in (("MAE", "mae"), (SCRATCH, SCRATCH))
    ),
    Claim("MIM4D beats scratch on depth", "mim4d", SCRATCH, ("depth",)),
    Claim("MIM4D beats scratch on BEV", "mim4d", SCRATCH, ("bev",)),
    Claim("MIM4D beats scratch on BEV, having seen as many images as MAE", "mim4d_long", SCRATCH, ("bev",)),
    Claim("SimIPU beats scratch on depth or detection", "simipu", SCRATCH, ("depth", "detection")),
)


def write_protocol() -> dict[str, list[str]]:
    """What makes cells comparable: the world and the run config that all share, and how each task and pre-training is run here."""
    config = [line for line in RUN.read_text().splitlines() if not line.startswith("#")]
    tasks = {name: [f"metric={task.metric}", f"steps={task.steps}", *task.settings] for name, task in TASKS.items()}
    pretrainings = {name: list(how.settings) for name, how in PRETRAININGS.items()}
    return {SHARED: [*CITY, f"--clips={CLIPS}", *config], **tasks, **pretrainings}
