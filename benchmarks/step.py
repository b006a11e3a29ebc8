"""What a training step costs beside what a user would write first, and what goes on around it, on a CPU.

    over_naive_fp32     CroCo ViT-B with a small decoder at 224 x 224, ours over its naive twin (benchmarks/naive_croco.py)
    over_naive_bf16     the same, ours in bf16 over the twin in float32
    packed_over_padded  ViT-B blocks over clips of which 10 to 50 % is visible: one pack over padding to the longest, with a mask
    loader_over_resident    ViT-B video, JPEGs of 1600 x 900: a step with the real loader over one on a clip in memory, in CPU seconds
    checkpoint_over_off     the same step with a checkpoint every 50 steps over one without: (50 steps + a save) / 50 steps, in CPU seconds
    exporter_cpu_share  of the newest `python -m benchmarks.monitoring --save`

Pairs take turns in one process, so that a neighbour's load hits both; a ratio is the median over the pairs. CPU seconds are those of
this process and its workers. Where the processor has no bf16 products (has_bf16), a step in bf16 takes minutes: there one pair is measured.

    python -m benchmarks.step --save

Predicted: 0.9 for fp32, as about 81 % of the twin's time is matrix products that nobody can spare; half for bf16 where the processor
multiplies bf16 by itself, and several times more where it does not (see has_bf16); 0.6 for packing, the share of tokens that are not
padding; 1.02 for the loader, 16 images of 4 ms a pair beside seconds of arithmetic; 1.00 for checkpoints.

JSON keys: those above, has_bf16, and seconds -> {fp32, bf16, naive, packed, padded, video_step, loader_step, save}, pairs, batch, threads.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.croco_step import GRID, make_batch
from benchmarks.data import render
from benchmarks.naive_croco import NaiveCroco, build_naive_optimizer, normalise_tokens, widen
from benchmarks.report import RESULTS, Report, build_parser
from models.attention import Segments
from models.batch import Batch
from models.config import ENCODER_SHAPES, CrocoConfig, EncoderConfig
from models.layers import Block, Pack
from models.pretraining import build_model, build_preparations
from trainer.assembly import assemble_model
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.load import load_run_config
from trainer.config.run import RunConfig
from trainer.config.training import CheckpointConfig, OptimConfig
from trainer.data.order import Share
from trainer.optim import build_optimizer
from trainer.parallel.engine import Engine, build_engine
from trainer.parallel.launch import Launch, Mesh
from trainer.start import build_batches, open_sources
from trainer.store.open import open_store

_ALONE = Launch(0, 0, 1, 1, "single", "fp32", Mesh(1, 1), True)
_VISIBLE_SHARES = (0.1, 0.5, 0.2, 0.4, 0.3, 0.15, 0.45, 0.25)
_CHECKPOINT_EVERY = 50


def main() -> None:
    """See the module."""
    parser = build_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of steps of each comparison")
    parser.add_argument("--batch", type=int, default=4, help="pairs of images in a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--city", type=Path, default=Path("/tmp/odonata-step/city"))
    parser.add_argument("--run", default="launch/runs/croco_video_base.yaml", help="the run of video clips")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report("step", arguments)
    ratios, seconds = {"exporter_cpu_share": json.loads((RESULTS / "monitoring.json").read_text())["overhead"]}, {}
    for compare_one in (
        lambda: compare_with_quiet(arguments.run, arguments.city, arguments.pairs),
        lambda: compare_with_padding(arguments.pairs),
        lambda: compare_with_naive(arguments.batch, arguments.pairs),
    ):
        found, spent = compare_one()
        for name, ratio in found.items():
            report.say(f"{name:22} {ratio:.4g}")
        ratios |= found
        seconds |= spent
    report.say("seconds: " + ", ".join(f"{name} {value:.3g}" for name, value in seconds.items()))
    settings = {"pairs": arguments.pairs, "batch": arguments.batch, "has_bf16": has_bf16_products()}
    report.finish({**ratios, "seconds": seconds, **settings})


def compare_with_naive(batch_size: int, pairs: int) -> tuple[dict[str, float], dict[str, float]]:
    """Whole steps, in seconds by the clock."""
    encoder, croco = EncoderConfig(size="base", positions="sincos"), CrocoConfig(decoder="small")
    torch.manual_seed(0)
    model = build_model(encoder, [croco], GRID).train()
    naive = NaiveCroco(model, GRID)
    batch = make_batch(encoder, (croco,), batch_size)
    torch.testing.assert_close(naive(batch), model(batch, "train").total, rtol=1e-4, atol=1e-5)
    ours, plain = build_optimizer(model, OptimConfig(lr=1e-4), depth=encoder.shape.depth), build_naive_optimizer(naive)

    def step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, *, bf16: bool = False) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            total = loss()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    def step_naive() -> None:
        step(lambda: naive(batch), plain)

    def compare_in(precision: str, turns: int) -> tuple[float, dict[str, float]]:
        def step_ours() -> None:
            step(lambda: model(batch, "train").total, ours, bf16=precision == "bf16")

        timed = take_turns({"naive": step_naive, precision: step_ours}, turns=turns, clock=time.perf_counter)
        return compare(timed[precision], timed["naive"]), medians(timed)

    in_bf16, bf16_seconds = compare_in("bf16", pairs if has_bf16_products() else 1)
    in_fp32, fp32_seconds = compare_in("fp32", pairs)
    return {"over_naive_fp32": in_fp32, "over_naive_bf16": in_bf16}, bf16_seconds | fp32_seconds


def compare_with_padding(pairs: int) -> tuple[dict[str, float], dict[str, float]]:
    """Two ViT-B blocks forward and backward over clips of unequal visible parts."""
    shape = ENCODER_SHAPES["base"]
    blocks = nn.ModuleList(Block(shape) for _ in range(2))
    lengths = [round(share * 2 * GRID.tokens) for share in _VISIBLE_SHARES]  # clips of two frames
    tokens = torch.randn(sum(lengths), shape.width)
    padded = nn.utils.rnn.pad_sequence(list(tokens.split(lengths)), batch_first=True)
    is_token = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    pack = Pack(Segments.within(lengths), "sdpa")

    def run_packed() -> None:
        x = tokens
        for block in blocks:
            x = block(x, pack)
        x.square().mean().backward()

    def run_padded() -> None:
        x = padded
        for block in blocks:
            x = x + attend_padded(block, normalise_tokens(block.norm1, x), is_token)  # type: ignore[arg-type]
            x = x + widen(block.mlp, normalise_tokens(block.norm2, x))  # type: ignore[arg-type]
        x[is_token].square().mean().backward()

    timed = take_turns({"packed": run_packed, "padded": run_padded}, turns=pairs, clock=time.perf_counter)
    return {"packed_over_padded": compare(timed["packed"], timed["padded"])}, medians(timed)


def attend_padded(block: Block, x: Tensor, is_token: Tensor) -> Tensor:
    """Self-attention of padded sequences, whose padding nobody looks at."""
    q, k, v = block.attn.qkv(x).unflatten(-1, (3, block.attn.heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=is_token[:, None, None])
    return block.attn.proj(mixed.transpose(1, 2).flatten(2))


def compare_with_quiet(run: str, city: Path, pairs: int) -> tuple[dict[str, float], dict[str, float]]:
    """Steps of a real run with its loader, on clips in memory, and a save, in CPU seconds of this process and its workers."""
    if not city.is_dir():
        render(city)
    with tempfile.TemporaryDirectory() as folder:
        sizes = ["global_batch=1", f"steps={2 * pairs + 4}", "optim.warmup_steps=0", "data.workers=1", "data.kind=synthetic"]
        config = load_run_config(Path(run), [f"data.root={city}", f"run.uri={folder}/run", *sizes])
        torch.manual_seed(0)
        model = assemble_model(config)
        engine = build_engine(model, _ALONE, config.parallel, config.optim)
        with reading(config) as batches:
            resident = next(batches)
            timed = take_turns(
                {"video_step": lambda: take_step(engine, resident), "loader_step": lambda: take_step(engine, next(batches))},
                turns=pairs,
                clock=cpu_seconds,
            )
        seconds = medians(timed) | {"save": measure_save(config, engine)}
    spaced = _CHECKPOINT_EVERY * seconds["video_step"]
    ratios = {
        "loader_over_resident": compare(timed["loader_step"], timed["video_step"]),
        "checkpoint_over_off": (spaced + seconds["save"]) / spaced,
    }
    return ratios, seconds


@contextmanager
def reading(config: RunConfig) -> Iterator[Iterator[Batch]]:
    """The batches of a run, from its loader with its workers."""
    preparations = build_preparations(config.objectives, config.token_grid, config.encoder, cameras=config.cameras)
    training, _ = open_sources(config, preparations)
    batches = build_batches(config, _ALONE, training, preparations, Share(0, 1, config.global_batch, 1), first_step=0)
    yield batches


def take_step(engine: Engine, batch: Batch) -> None:
    """Forward, backward and update."""
    losses = engine.train_micro_step(batch, share=1.0, last=True)
    engine.update(1e-5, loss=losses.total.detach())


def measure_save(config: RunConfig, engine: Engine) -> float:
    """CPU seconds of the second checkpoint, up to its commit; the first one allocates what later ones use again."""
    manager = CheckpointManager(open_store(config.run.uri), CheckpointConfig(), timeout_s=config.parallel.timeout_s)
    manager.claim(job=None)
    manager.prepare(engine.state())
    spent = []
    for step in (1, 2):
        before = cpu_seconds()
        manager.save(step, engine.state(), engine="single", progress={})
        manager.finish()
        spent.append(cpu_seconds() - before)
    manager.close()
    return spent[-1]


def take_turns(what: dict[str, Callable[[], None]], *, turns: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each, one after the other in every turn, after one turn that does not count; every second turn goes backwards."""
    timed: dict[str, list[float]] = {name: [] for name in what}
    for turn in range(turns + 1):
        for name in reversed(what) if turn % 2 else what:
            started = clock()
            what[name]()
            if turn:
                timed[name].append(clock() - started)
    return timed


def cpu_seconds() -> float:
    """Of this process and those that it has started."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def compare(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of pairs."""
    return statistics.median(own / other for own, other in zip(ours, theirs, strict=True))


def medians(timed: dict[str, list[float]]) -> dict[str, float]:
    """Seconds of each."""
    return {name: statistics.median(values) for name, values in timed.items()}


def has_bf16_products() -> bool:
    """Whether this processor multiplies bf16 matrices by itself."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return any(name in flags for name in ("avx512_bf16", "amx_bf16", "bf16 "))


if __name__ == "__main__":
    main()
