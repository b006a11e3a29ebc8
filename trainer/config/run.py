"""The whole of a run: one frozen object, whose cross-field rules are validators named as the rule."""

from typing import Any, Literal

from pydantic import Field, model_validator

from models.config import (
    CompletionConfig,
    CrocoConfig,
    EncoderConfig,
    Grid,
    Mim4dConfig,
    ObjectiveConfig,
    PairTaskConfig,
    Section,
    TaskConfig,
)
from trainer.config.data import DataConfig, DrivesData
from trainer.config.store import StoreConfig
from trainer.config.training import (
    CheckpointConfig,
    ObserveConfig,
    OptimConfig,
    ParallelConfig,
    ProfileConfig,
    RunSection,
    WarmStartConfig,
)


class RunConfig(Section):
    """One pre-training run."""

    schema_version: Literal[1]
    """Version of this schema; a file for another version is refused rather than misread."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Every random choice of the run is a function of this, the step and the place in the batch."""
    steps: int = Field(ge=1)
    """Optimiser steps in the run."""
    global_batch: int = Field(ge=1)
    """Samples in one step over all ranks; the same whatever the world size."""
    run: RunSection
    data: DataConfig
    encoder: EncoderConfig = EncoderConfig()
    objectives: tuple[ObjectiveConfig, ...] = Field(min_length=1)
    """What is learnt, each with its weight, all on one encoder."""
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    store: StoreConfig = StoreConfig()
    observe: ObserveConfig = ObserveConfig()
    profile: ProfileConfig | None = None
    """Trace a few steps; none traces none."""
    warm_start: WarmStartConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def data_is_reached_like_the_run(cls, content: Any) -> Any:
        """Packed data that says nothing of its store takes the run's."""
        if not isinstance(content, dict) or not isinstance(content.get("data"), dict):
            return content
        data, store = content["data"], content.get("store")
        if data.get("kind") != "shards" or store is None or "store" in data:
            return content
        return {**content, "data": {**data, "store": store}}

    @property
    def token_grid(self) -> Grid:
        """Tokens of a clip of one camera."""
        clip, encoder = self.data.clip, self.encoder
        return Grid(
            t=max(1, clip.frames // encoder.tubelet_frames),
            v=1,
            h=clip.height_px // encoder.patch_px,
            w=clip.width_px // encoder.patch_px,
        )

    @property
    def cameras(self) -> int:
        """Cameras of a surround clip; image pairs know none."""
        return len(self.data.cameras) if isinstance(self.data, DrivesData) else 0

    @model_validator(mode="after")
    def patches_tile_the_crop(self) -> "RunConfig":
        patch = self.encoder.patch_px
        for name in ("height_px", "width_px"):
            size = getattr(self.data.clip, name)
            if size % patch:
                below, above = size // patch * patch, (size // patch + 1) * patch
                choices = f"{below} or {above}" if below else str(above)
                raise ValueError(
                    f"data.clip.{name} is {size}, which encoder.patch_px {patch} does not divide; set it to {choices}"
                )
        return self

    @model_validator(mode="after")
    def tubelets_tile_the_clip(self) -> "RunConfig":
        """A single image of a downstream task is embedded as if it stood still."""
        frames, tubelet = self.data.clip.frames, self.encoder.tubelet_frames
        are_images = frames == 1 and all(isinstance(objective, TaskConfig) for objective in self.objectives)
        if frames % tubelet and not are_images:
            raise ValueError(
                f"data.clip.frames is {frames}, which encoder.tubelet_frames {tubelet} does not divide; "
                f"set frames to a multiple of {tubelet}"
            )
        return self

    @model_validator(mode="after")
    def downstream_tasks_see_single_images(self) -> "RunConfig":
        for place, objective in enumerate(self.objectives):
            if isinstance(objective, TaskConfig) and self.data.clip.frames != 1:
                raise ValueError(
                    f"data.clip.frames is {self.data.clip.frames}, and objectives[{place}], {objective.kind}, is asked of single images; "
                    "set it to 1"
                )
        return self

    @model_validator(mode="after")
    def a_decoder_is_taken_for_a_decoder(self) -> "RunConfig":
        takes = self.warm_start is not None and self.warm_start.parts == "encoder_and_decoder"
        if takes and not any(isinstance(objective, CrocoConfig | PairTaskConfig) for objective in self.objectives):
            raise ValueError(
                f"warm_start.parts is encoder_and_decoder, and no objective of {', '.join(each.kind for each in self.objectives)} has "
                "CroCo's decoder, as croco, pose and flow have; set it to encoder"
            )
        return self

    @model_validator(mode="after")
    def masks_hide_some_and_show_some(self) -> "RunConfig":
        t, _, h, w = self.token_grid
        for place, objective in enumerate(self.objectives):
            if not isinstance(objective, CompletionConfig):
                continue
            mask = objective.mask
            tokens = h * w if mask.kind == "tube" else t * h * w
            if not 0 < int(mask.ratio * tokens) < tokens:
                raise ValueError(
                    f"objectives[{place}].mask.ratio {mask.ratio} of {tokens} tokens hides {int(mask.ratio * tokens)}; "
                    "at least one must be hidden and one visible: change the ratio or make the clip larger"
                )
        return self

    @model_validator(mode="after")
    def mask_cells_tile_the_crop(self) -> "RunConfig":
        for place, objective in enumerate(self.objectives):
            if not isinstance(objective, Mim4dConfig):
                continue
            cell, patch = objective.mask_cell_px, self.encoder.patch_px
            if cell % patch:
                raise ValueError(
                    f"objectives[{place}].mask_cell_px is {cell}, which encoder.patch_px {patch} does not divide; "
                    f"set it to a multiple of {patch}"
                )
            for name in ("height_px", "width_px"):
                size = getattr(self.data.clip, name)
                if size % cell:
                    raise ValueError(
                        f"data.clip.{name} is {size}, which objectives[{place}].mask_cell_px {cell} does not divide; "
                        f"set it to {max(1, round(size / cell)) * cell}, or the cells to {patch}"
                    )
        return self

    @model_validator(mode="after")
    def spacetime_has_an_instant_to_withhold(self) -> "RunConfig":
        for place, objective in enumerate(self.objectives):
            if isinstance(objective, Mim4dConfig) and objective.mode == "spacetime" and self.token_grid.t < 2:
                raise ValueError(
                    f"objectives[{place}].mode spacetime withholds one tubelet of a clip, and a clip of {self.data.clip.frames} "
                    f"frames has {self.token_grid.t} of {self.encoder.tubelet_frames}; lengthen data.clip.frames or set mode to frame"
                )
        return self

    @model_validator(mode="after")
    def objectives_have_different_kinds(self) -> "RunConfig":
        kinds = [objective.kind for objective in self.objectives]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"objectives are {kinds}; list each kind once and give it its weight")
        return self

    @model_validator(mode="after")
    def micro_batch_divides_the_global_batch(self) -> "RunConfig":
        micro = self.parallel.micro_batch
        if micro and self.global_batch % micro:
            raise ValueError(
                f"global_batch is {self.global_batch}, which parallel.micro_batch {micro} does not divide; "
                "set one to a divisor or a multiple of the other"
            )
        return self

    @model_validator(mode="after")
    def data_is_given_up_before_collectives_are(self) -> "RunConfig":
        """Else a store that is slow on one rank would show as a lost peer on all others."""
        if self.data.timeout_s >= self.parallel.timeout_s:
            raise ValueError(
                f"data.timeout_s is {self.data.timeout_s:g}, not below the parallel.timeout_s of {self.parallel.timeout_s:g} after which "
                "other ranks take one that waits for its data for lost; lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def profiled_steps_are_taken(self) -> "RunConfig":
        if self.profile and self.profile.steps[1] > self.steps:
            raise ValueError(
                f"profile.steps are {list(self.profile.steps)} and the run has {self.steps}; name earlier ones, or raise steps"
            )
        return self

    @model_validator(mode="after")
    def data_is_given_up_before_a_step_counts_as_hung(self) -> "RunConfig":
        if self.data.timeout_s >= self.observe.hang_least_s:
            raise ValueError(
                f"data.timeout_s is {self.data.timeout_s:g}, not below the observe.hang_least_s of {self.observe.hang_least_s:g} "
                "after which a step counts as hung, so a slow store would look like a hang; lower the first or raise the second"
            )
        return self

    @model_validator(mode="after")
    def a_summary_is_of_metrics(self) -> "RunConfig":
        if self.observe.pushgateway and self.observe.metrics_port is None:
            raise ValueError(
                f"observe.pushgateway is {self.observe.pushgateway} and observe.metrics_port is none, so there is no summary for it; "
                "drop the first or set the second to 0 or more"
            )
        return self

    @model_validator(mode="after")
    def files_for_later_lie_in_a_folder(self) -> "RunConfig":
        wandb = self.observe.wandb
        if wandb and wandb.mode == "offline" and self.run.uri.startswith("s3://"):
            raise ValueError(
                f"observe.wandb.mode offline keeps files in the run's folder for a later sync, and run.uri is {self.run.uri}; set the mode "
                "to online, or take observe.tensorboard, whose files go to S3"
            )
        return self

    @model_validator(mode="after")
    def warm_up_ends_before_the_run(self) -> "RunConfig":
        if self.optim.warmup_steps > self.steps:
            raise ValueError(
                f"optim.warmup_steps is {self.optim.warmup_steps}, longer than the {self.steps} steps of the run; lower it or raise steps"
            )
        return self
