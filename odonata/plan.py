"""`odonata plan`: what a run will need before anything is asked for."""

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from odonata.app import AsJson, Overrides, RunFile, app
from odonata.printing import counting_bar, print_table
from trainer.errors import ConfigError, DataError, OdonataError
from trainer.store.base import StoreError

if TYPE_CHECKING:
    from trainer.config.run import RunConfig
    from trainer.hardware import Gpu
    from trainer.plan.data import DataPlan, MeasuredData
    from trainer.plan.run import Row

EngineName = Literal["fsdp2", "hsdp", "ddp", "zero1", "zero2", "zero3"]


@app.command(
    epilog="Example: `odonata plan launch/runs/croco_video_giant.yaml --gpus 8,64,512,1024 --gpu h200 -o plan.png`; of the data alone: "
    "`odonata plan RUN.yaml --data --gpus 8,64,512 --step-s 0.5 --clips-per-gpu 4`"
)
def plan(
    run: RunFile,
    overrides: Overrides = None,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, with commas between them.")] = "8,64,512,1024",
    gpu: Annotated[str, typer.Option(help="Kind of GPU: a100, h100, h200, b200.")] = "h200",
    engine: Annotated[EngineName | None, typer.Option(help="Plan this engine; by default the fastest that fits.")] = None,
    shards: Annotated[int | None, typer.Option(help="HSDP: GPUs of a group; by default the best of whole nodes.", min=1)] = None,
    dollars_per_hour: Annotated[float | None, typer.Option(help="Rent of a GPU; by default a list price.", min=0)] = None,
    picture: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="PICTURE", help="Also draw it: .png, .svg, .pdf.")
    ] = None,
    data: Annotated[bool, typer.Option("--data", help="Plan the data alone, for --step-s and --clips-per-gpu.")] = False,
    step_s: Annotated[float, typer.Option(help="With --data: seconds of a step.", min=1e-3)] = 1.0,
    clips_per_gpu: Annotated[int, typer.Option(help="With --data: samples of a GPU in a step.", min=1)] = 8,
    read_clips: Annotated[int, typer.Option(help="Clips of packed data to read here, to measure CPU seconds.", min=1)] = 16,
    as_json: AsJson = False,
) -> None:
    """Say what a run will take on so many GPUs: memory, wire, time, energy and cost, and which engine, mesh and micro-batch to use.

    Nothing is trained and no GPU is needed: the real model runs on tensors without memory. What its data asks for is said where it is
    packed and can be read from here.
    """
    from trainer.config.load import load_run_config
    from trainer.observe.logs import configure_logging

    counts = _parse_gpus(gpus)
    _check_picture(picture)
    config = load_run_config(run, overrides or ())
    configure_logging(rank=0)
    if data:
        _plan_data(config, counts, step_s=step_s, clips_per_gpu=clips_per_gpu, read_clips=read_clips, as_json=as_json)
        return
    from trainer.hardware import find_gpu
    from trainer.plan.run import plan_run
    from trainer.plan.search import Question, check_gpus

    hardware = find_gpu(gpu)
    if dollars_per_hour is not None:
        hardware = hardware.model_copy(update={"dollars_per_hour": dollars_per_hour})
    question = Question(hardware, config.parallel.precision or "bf16", engine, shards)
    check_gpus(config, counts, question)
    measured = _measure_data(config, read_clips)
    with counting_bar("tracing the model") as show:
        rows = plan_run(config, counts, question, data=measured, advance=show)
    if picture:
        from trainer.plan.picture import draw_plan

        draw_plan(rows, picture)
    if as_json:
        print(
            json.dumps({"assumed": _list_assumptions(config, question.gpu), "plans": [row.as_json() for row in rows]}, indent=2)
        )
        return
    for line in _list_assumptions(config, question.gpu):
        print(line)
    _print_rows(rows)


def _list_assumptions(config: "RunConfig", gpu: "Gpu") -> list[str]:
    from trainer.plan.duration import PRODUCT_SHARE
    from trainer.plan.memory import USABLE_SHARE
    from trainer.plan.setup import GPUS_PER_NODE
    from trainer.plan.tracing import TRACED_SHARDS

    objectives = " + ".join(objective.kind for objective in config.objectives)
    return [
        f"{objectives} on {config.encoder.size}, {config.global_batch:,} clips a step, {config.steps:,} steps",
        f"nodes of {GPUS_PER_NODE} {gpu.device_name}: {gpu.bf16_flops / 1e12:,.0f} TFLOP/s bf16, HBM {gpu.memory_bytes / 1e9:,.0f} GB at "
        f"{gpu.memory_bytes_per_s / 1e12:.2f} TB/s, NVLink {gpu.nvlink_bytes_per_s / 1e9:,.0f} GB/s, network "
        f"{gpu.network_bytes_per_s / 1e9:,.0f} GB/s, {gpu.watts:,.0f} W, ${gpu.dollars_per_hour:.2f} an hour (trainer/hardware.yaml)",
        f"traced on fake tensors: activations, gathers and reductions of FSDP2 over {TRACED_SHARDS} shards, HBM traffic, operations; "
        "computed: more shards, more blocks, moments, gradients that wait, DDP and ZeRO, collectives, all times",
        f"left out: CUDA's context, NCCL's buffers and fragments ({1 - USABLE_SHARE:.0%} of HBM is kept free), launches of kernels, "
        f"stragglers, failures; products reach {PRODUCT_SHARE:.0%} of the peak; a step is best with the wire hidden, worst with "
        "none of it, and the run is reckoned half-way",
    ]


def _print_rows(rows: Sequence["Row"]) -> None:
    figures = ("memory GB", "step s", "clips/s", "tokens/s", "MFU ceiling")
    steps = ("GPUs", "setup", "micro-batch", "largest", "recompute", *figures, "first bottleneck")
    print_table(steps, map(_format_step, rows), right=("GPUs", "largest", *figures))
    wires = ("GPUs", "gathered GB", "reduced GB", "NVLink GB", "network GB", "products s", "HBM s", "NVLink s", "network s")
    print_table(wires, map(_format_wire, rows), right=wires)
    totals = ("GPUs", "checkpoint GB", "stall s", "in store s", "days", "GPU hours", "MWh", "dollars")
    print_table(totals, map(_format_total, rows), right=totals)
    demands = ("GPUs", "GET/s", "GB/s", "cores a GPU", "hours an epoch")
    read = [row for row in rows if row.data]
    if read:
        print_table(demands, map(_format_data, read), right=demands)
    for row in rows:
        print(row.advice)


def _format_step(row: "Row") -> tuple[str, ...]:
    setup, duration = row.option.setup, row.option.duration
    return (
        f"{row.gpus:,}",
        setup.name,
        f"{setup.micro_batch} x {setup.micro_steps}",
        str(row.largest_micro_batch),
        setup.recompute,
        f"{row.option.memory.total / 1e9:.1f} of {row.gpu.memory_bytes / 1e9:.0f}",
        f"{duration.best_s:.3f} to {duration.worst_s:.3f}",
        f"{row.clips_per_s:,.0f}",
        f"{row.tokens_per_s:,.0f}",
        f"{row.mfu_ceiling:.0%}",
        row.bottleneck,
    )


def _format_wire(row: "Row") -> tuple[str, ...]:
    wire, duration = row.option.wire, row.option.duration
    payload = wire.payload_bytes()
    reduced = payload["reduce_scatter"] + payload["all_reduce"]
    sent = (payload["all_gather"], reduced, wire.nvlink_bytes, wire.network_bytes)
    parts = (duration.compute_s, duration.memory_s, duration.nvlink_s, duration.network_s)
    return (f"{row.gpus:,}", *(f"{size / 1e9:.2f}" for size in sent), *(f"{part:.3f}" for part in parts))


def _format_total(row: "Row") -> tuple[str, ...]:
    return (
        f"{row.gpus:,}",
        f"{row.checkpoint_bytes / 1e9:.1f}",
        f"{row.checkpoint_stall_s:.3f}",
        f"{row.checkpoint_s:.1f}",
        f"{row.hours / 24:.1f}",
        f"{row.gpu_hours:,.0f}",
        f"{row.kwh / 1000:,.1f}",
        f"{row.dollars:,.0f}",
    )


def _format_data(row: "Row") -> tuple[str, ...]:
    assert row.data is not None
    figures = (f"{row.data.gets_per_s:,.0f}", f"{row.data.gb_per_s:,.2f}", f"{row.data.cores_per_gpu:.2f}")
    return (f"{row.gpus:,}", *figures, f"{row.data.epoch_hours:,.3g}")


def _measure_data(config: "RunConfig", read_clips: int) -> "MeasuredData | None":
    """What the data is like; nothing, and a word why on stderr, where it is not packed or cannot be read from here."""
    from trainer.plan.data import measure_data

    if config.data.kind != "shards":
        return None
    try:
        with counting_bar("reading clips") as show:
            done = itertools.count(1)
            return measure_data(config, read_clips=read_clips, advance=lambda: show(next(done), read_clips + 1))
    except (DataError, StoreError) as error:
        _say_left_out(error)
        return None


def _say_left_out(error: OdonataError) -> None:
    print(f"the data is left out of the plan: {error}", file=sys.stderr)


def _plan_data(
    config: "RunConfig", counts: list[int], *, step_s: float, clips_per_gpu: int, read_clips: int, as_json: bool
) -> None:
    from dataclasses import asdict

    from trainer.plan.data import plan_data

    with counting_bar("reading clips") as show:
        done = itertools.count(1)
        needs, plans = plan_data(
            config,
            counts,
            step_s=step_s,
            clips_per_gpu=clips_per_gpu,
            read_clips=read_clips,
            advance=lambda: show(next(done), read_clips + 1),
        )
    if as_json:
        print(json.dumps({"sample": asdict(needs), "plans": [asdict(one) for one in plans]}, indent=2))
        return
    print(f"a sample: {needs.images:.0f} images in {needs.gets:.1f} GET, {needs.bytes / 1e6:.2f} MB fetched, ", end="")
    print(f"{needs.bytes / needs.useful_bytes:.3f} times what it uses, {1e3 * needs.cpu_s:.1f} CPU ms on this machine")
    print(f"{clips_per_gpu} samples a GPU in a step of {step_s} s, data set of {plans[0].dataset_gb:,.1f} GB:")
    rates = (
        "GPUs",
        "batch",
        "clips/s",
        "GET/s",
        "GB/s",
        "GB/s a node",
        "S3 partitions",
        "cores a GPU",
        "cached",
        "hours an epoch",
    )
    print_table(rates, (_format_data_plan(one, clips_per_gpu) for one in plans), right=rates)


def _format_data_plan(plan: "DataPlan", clips_per_gpu: int) -> tuple[str, ...]:
    return (
        f"{plan.gpus:,}",
        f"{plan.gpus * clips_per_gpu:,}",
        f"{plan.clips_per_s:,.0f}",
        f"{plan.gets_per_s:,.0f}",
        f"{plan.gb_per_s:,.2f}",
        f"{plan.gb_per_s_per_node:,.2f}",
        str(plan.prefixes),
        f"{plan.cores_per_gpu:.2f}",
        f"{plan.cached_share:.0%}",
        f"{plan.epoch_hours:,.3g}",
    )


def _parse_gpus(text: str) -> list[int]:
    counts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in counts):
        raise ConfigError(f"--gpus {text} is no list of numbers from 1 on; write them as 8,64,512")
    return [int(part) for part in counts]


def _check_picture(picture: Path | None) -> None:
    if picture and picture.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--out {picture} names no picture that can be drawn; let it end in .png, .svg or .pdf")
