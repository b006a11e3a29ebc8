"""Which way of spreading a run over so many GPUs is the fastest of those that fit: all are tried, none takes more than arithmetic.

Tried are every engine (or the one that is asked for), HSDP with every mesh of whole nodes, every micro-batch that divides a GPU's share
of the global batch (or the run's own), with each kind of activation checkpointing. Of setups that are equally fast, within a
hundredth, the one that leaves most memory is taken; ZeRO only where it is asked for or nothing else fits, since it is not traced.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainer.config.run import RunConfig
from trainer.errors import ConfigError
from trainer.hardware import Gpu
from trainer.plan.duration import Duration, plan_duration
from trainer.plan.memory import USABLE_SHARE, Memory, plan_memory
from trainer.plan.setup import ENGINES, GPUS_PER_NODE, EngineChoice, Setup
from trainer.plan.trace import Precision
from trainer.plan.tracing import RECOMPUTE, Model
from trainer.plan.wire import Wire, list_collectives

_AS_FAST = 1.01


@dataclass(frozen=True)
class Question:
    """What is asked of the search beside the run itself."""

    gpu: Gpu
    precision: Precision = "bf16"
    engine: EngineChoice | None = None
    """None tries all."""
    shards: int | None = None
    """GPUs of an HSDP group; none tries every number of whole nodes."""


@dataclass(frozen=True)
class Option:
    """A setup with what it takes."""

    setup: Setup
    memory: Memory
    wire: Wire
    duration: Duration


def check_gpus(config: RunConfig, gpus: Sequence[int], question: Question) -> None:
    """ConfigError unless the run can be spread evenly over each number of GPUs; to be called before anything takes long."""
    for count in gpus:
        if config.global_batch % count:
            divisors = [n for n in range(1, config.global_batch + 1) if config.global_batch % n == 0]
            near = sorted(sorted(divisors, key=lambda n: abs(math.log(n / count)))[:3])
            raise ConfigError(
                f"a plan for {count} GPUs was asked for and global_batch is {config.global_batch}, which {count} does not divide; "
                f"take {', '.join(map(str, near))} GPUs or change global_batch"
            )
        if count > GPUS_PER_NODE and count % GPUS_PER_NODE:
            raise ConfigError(
                f"a plan for {count} GPUs was asked for and a node has {GPUS_PER_NODE}; take fewer than that or a multiple of it"
            )
        if question.shards and question.engine not in (None, "hsdp"):
            raise ConfigError(
                f"--shards {question.shards} was given and --engine {question.engine}, which has no groups; "
                "leave one of them out, or take hsdp"
            )
        if question.shards and count % question.shards:
            raise ConfigError(
                f"HSDP over groups of {question.shards} was asked for and {count} GPUs are no multiple of that; "
                f"give --shards a divisor of {math.gcd(*gpus)}"
            )
        micro_batch = config.parallel.micro_batch
        if micro_batch and (config.global_batch // count) % micro_batch:
            raise ConfigError(
                f"parallel.micro_batch is {micro_batch}, which does not divide the {config.global_batch // count} samples that each of "
                f"{count} GPUs has of global_batch {config.global_batch}; leave it out to have one chosen"
            )


def find_options(config: RunConfig, model: Model, gpus: int, question: Question) -> list[Option]:
    """All setups of `gpus` GPUs that fit, the best first; ConfigError where none does, which says what would."""
    options = [weigh(config, model, setup, question.gpu) for setup in _list_setups(config, gpus, question)]
    fitting = [option for option in options if option.memory.fits(question.gpu)]
    if not fitting:
        raise ConfigError(_say_what_would_fit(options, question.gpu))
    if question.engine is None:
        fitting = [each for each in fitting if not each.setup.is_zero] or fitting
    fitting.sort(key=lambda option: option.duration.typical_s)
    equal = _AS_FAST * fitting[0].duration.typical_s
    best = min((each for each in fitting if each.duration.typical_s <= equal), key=lambda option: option.memory.total)
    return [best, *(option for option in fitting if option is not best)]


def weigh(config: RunConfig, model: Model, setup: Setup, gpu: Gpu) -> Option:
    """What `setup` takes."""
    traced = model.traced[setup.recompute]
    wire = list_collectives(model.weights, setup, peer_bytes=traced.peer_bytes, peer_gradient_bytes=traced.peer_gradient_bytes)
    memory = plan_memory(model, setup, averaged=config.optim.ema_decay is not None)
    return Option(setup, memory, wire, plan_duration(model, setup, wire, gpu))


def _list_setups(config: RunConfig, gpus: int, question: Question) -> Iterator[Setup]:
    share = config.global_batch // gpus
    fixed = config.parallel.micro_batch
    micro_batches = [fixed] if fixed else [n for n in range(1, share + 1) if share % n == 0]
    for engine, shards in _list_engines(gpus, question):
        for micro_batch in micro_batches:
            for recompute in RECOMPUTE:
                yield Setup(engine, gpus, shards, micro_batch, share // micro_batch, recompute, question.precision)


def _list_engines(gpus: int, question: Question) -> Iterator[tuple[EngineChoice, int]]:
    asked: list[EngineChoice] = [engine for engine in ENGINES if engine != "single" and question.engine in (None, engine)]
    if question.shards:
        asked = ["hsdp"]
    for engine in asked:
        if gpus == 1 and not engine.startswith("zero"):
            yield "single", 1
        elif engine == "hsdp":
            yield from (("hsdp", shards) for shards in _list_meshes(gpus, question))
        else:
            yield engine, 1 if engine == "ddp" else gpus


def _list_meshes(gpus: int, question: Question) -> list[int]:
    if question.shards:
        return [question.shards]
    return [shards for shards in range(GPUS_PER_NODE, gpus, GPUS_PER_NODE) if gpus % shards == 0]


def _say_what_would_fit(options: Sequence[Option], gpu: Gpu) -> str:
    if not options:
        return "HSDP was asked for on GPUs that make no two groups of whole nodes; take more GPUs or another engine"
    least = min(options, key=lambda option: option.memory.total)
    setup, room = least.setup, USABLE_SHARE * gpu.memory_bytes
    return (
        f"the run was planned on {setup.gpus} {gpu.device_name} and nothing fits into the {room / 1e9:.0f} GB of each that can be "
        f"used: the least is {least.memory.total / 1e9:.1f} GB, with {setup.name}, micro-batch {setup.micro_batch} and activation "
        f"checkpointing {setup.recompute}; take more GPUs, GPUs with more memory, shorter clips or "
        "a smaller encoder"
    )
