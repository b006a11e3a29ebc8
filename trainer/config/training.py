"""How the model learns, on what processes it is spread, and what a run keeps and shows."""

from typing import Literal

from pydantic import Field, model_validator

from models.config import Section
from trainer.errors import ConfigError


class OptimConfig(Section):
    """AdamW with a warm-up and a cosine, counted in steps."""

    lr: float = Field(1.5e-4, gt=0)
    """Peak learning rate at the global batch that is configured; nothing is scaled behind your back."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear rise from zero to the peak."""
    cosine_steps: int | None = Field(None, ge=1)
    """Step at which the cosine reaches min_lr; none is the last step. CroCo stops half-way down."""
    weight_decay: float = Field(0.05, ge=0)
    """Decay on matrices; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each encoder block below the last learns slower by this factor; 1 is off."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Largest norm of the gradient; none clips nothing."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Keep an exponential moving average of the encoder with this decay; none keeps none."""
    train_encoder: bool = True
    """Let the encoder learn; without, it stays as it was warm-started, in evaluation mode, and only the objectives' parts learn."""
    max_skipped_steps: int = Field(10, ge=1)
    """Stop after this many steps in a row whose loss or gradient was not finite."""

    @model_validator(mode="after")
    def an_average_is_of_an_encoder_that_learns(self) -> "OptimConfig":
        if self.ema_decay is not None and not self.train_encoder:
            raise ValueError(
                f"ema_decay is {self.ema_decay} and train_encoder is false, so that every average is the weight itself; "
                "set ema_decay to null or train_encoder to true"
            )
        return self


Recompute = Literal["none", "selective", "full"]


class ParallelConfig(Section):
    """What a step costs in time and memory; none of it changes what is learnt, but for how it is rounded."""

    world_size: int | None = Field(None, ge=1)
    """Processes that must have started; none takes as many as there are. A wrong number ends the run at once."""
    micro_batch: int | None = Field(None, ge=1)
    """Samples in one forward on one rank; none is global_batch / world_size. Smaller accumulates gradients."""
    precision: Literal["fp32", "bf16"] | None = None
    """Precision of the matrix products; none takes accelerate's mixed_precision, or fp32 without accelerate."""
    fp8_linears: bool = False
    """Multiply in float8 in the linear layers of blocks; wants precision bf16, Hopper or Ada, odonata[fp8], and compile to be faster."""
    activation_checkpointing: Recompute = "none"
    """What each block makes again in the backward: selective keeps products and attention, full nothing, for a third more compute."""
    compile: bool = False
    """Compile each block with torch.compile, which fuses what lies between the matrix products; costs a minute at the start."""
    prefetch_blocks: int = Field(1, ge=0)
    """FSDP2: blocks whose weights are gathered ahead of their use, forward and backward."""
    timeout_s: float = Field(600.0, gt=0)
    """Seconds after which a collective that does not answer counts as a lost peer."""


def split_batch(world_size: int, parallel: ParallelConfig, global_batch: int) -> tuple[int, int]:
    """Micro-batch on one of `world_size` ranks and how many of them make the global batch; ConfigError where none do."""
    micro_batch = parallel.micro_batch or max(1, global_batch // world_size)
    samples = micro_batch * world_size
    if global_batch % samples:
        ranks = f"{world_size} processes"
        if parallel.micro_batch:
            ranks += f" x parallel.micro_batch {micro_batch} = {samples}"
        least = samples if parallel.micro_batch else world_size
        raise ConfigError(
            f"global_batch is {global_batch}, which {ranks} do not divide; set global_batch to a multiple of {least}, or change "
            f"the processes{' or micro_batch' if parallel.micro_batch else ''}"
        )
    return micro_batch, global_batch // samples


class CheckpointConfig(Section):
    """When the state is saved and how much of it is kept."""

    every_steps: int = Field(1000, ge=1)
    """Steps between two checkpoints: what a kill can cost, with the steps taken while the newest one was on its way."""
    keep_last: int = Field(3, ge=1)
    """Newest checkpoints to keep."""
    keep_every_steps: int | None = Field(None, ge=1)
    """Checkpoints at multiples of this are kept for ever; none keeps only the newest."""
    max_failed_saves: int = Field(3, ge=1)
    """Stop after this many saves in a row that the store did not take; until then training goes on."""
    grace_s: float = Field(25.0, ge=0)
    """Seconds between SIGTERM and the kill: a save that would not end in what is left of them is not begun."""
    claim_expiry_s: float = Field(120.0, gt=0)
    """A writer that was not heard of for so long has lost the run to the next one that asks; of the same job, at once."""


class WandbConfig(Section):
    """Where in Weights & Biases a run is shown. Its key is WANDB_API_KEY in the environment."""

    project: str = Field(min_length=1)
    """Project that the run is listed in."""
    entity: str | None = None
    """User or team that the project belongs to; none is that of the key."""
    mode: Literal["online", "offline"] = "online"
    """Offline leaves files in wandb/ of the run's folder, for `wandb sync`."""


class ObserveConfig(Section):
    """What a run shows while it trains."""

    log_every_steps: int = Field(10, ge=1)
    """Steps between two lines in the log where there is no terminal for a progress bar."""
    evaluate_every_steps: int | None = Field(None, ge=1)
    """Steps between two evaluations on held-out clips; none evaluates at the end only."""
    evaluate_clips: int = Field(64, ge=1)
    """Held-out clips in an evaluation; always the same ones."""
    pictures_every_steps: int | None = Field(None, ge=1)
    """Steps between two contact sheets; none draws at the end only."""
    metrics_port: int | None = Field(9400, ge=0, le=65535)
    """Prometheus /metrics of local rank r listens on this port + r, or the next free one; none serves none."""
    metrics_host: str = "0.0.0.0"
    """Address that /metrics listens on."""
    pushgateway: str | None = Field(None, pattern="^https?://")
    """Pushgateway that rank 0 leaves the run's summary with before it ends; none leaves none."""
    tensorboard: bool = False
    """Also write curves and contact sheets for TensorBoard to tensorboard/ in the run's folder; needs the extra `tensorboard`."""
    wandb: WandbConfig | None = None
    """Also send them to Weights & Biases; needs the extra `wandb`."""
    hang_factor: float = Field(20.0, gt=1)
    """A step that lasts so many times the typical one is a hang: /healthz fails, stacks go to incidents/, and the process ends with 75."""
    hang_least_s: float = Field(400.0, gt=0)
    """... but only after so many seconds; above data.timeout_s, or a store that is slow for a while would look like a hang."""
    hang_grace_s: float = Field(1800.0, gt=0)
    """Seconds that what is no step may last: the first steps, an evaluation, waiting for a checkpoint."""


class ProfileConfig(Section):
    """A trace of a few steps, for whoever wants to see where time and memory go."""

    steps: tuple[int, int]
    """First and last step to watch, counted from 1; leave a run some steps to get warm."""
    ranks: tuple[int, ...] = (0,)
    """Ranks that write a trace; some MB each."""

    @model_validator(mode="after")
    def steps_are_in_order(self) -> "ProfileConfig":
        first, last = self.steps
        if not 1 <= first <= last:
            raise ValueError(f"steps are {first} to {last}, counted from 1; give the first and the last one, as [10, 12]")
        return self


WarmParts = Literal["encoder", "encoder_and_decoder", "model"]
Weights = Literal["model", "ema"]
"""Of an encoder: those of the last step, or their moving average."""


class WarmStartConfig(Section):
    """Weights to start from, taken from another run's checkpoint."""

    uri: str
    """A run folder or one of its checkpoints."""
    parts: WarmParts = "encoder"
    """Only the encoder; for a task in which two images meet, the decoder of a CroCo run as well; or all, the objectives too."""
    weights: Weights = "model"
    """Of the encoder: those of the last step, or their moving average (optim.ema_decay)."""


class RunSection(Section):
    """Where a run lives."""

    uri: str = Field(min_length=1)
    """Folder of the run, or s3://bucket/prefix: config, checkpoints, steps, pictures."""
