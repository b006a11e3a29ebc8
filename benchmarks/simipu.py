"""Do images find their points? Train `simipu_tiny` under both presets over a few seeds, then search in held-out scenes.

A held-out pair is a LiDAR centre and the place where an image shows it. Pairs of many clips of all held-out scenes are dealt into
pools of 256; within a pool, is the point most like an image's place its own? Every model answers for the same pairs, those that
`modern` would train on, in batches as large as in training, because the batch norm of `reference` looks at its batch.

    python -m benchmarks.simipu                        # two presets, three seeds: half an hour or so on two quiet cores
    python -m benchmarks.simipu --seeds 1 --steps 50   # a look
    python -m benchmarks.simipu --folder runs/simipu   # keep city and runs there; a second call trains nothing twice

JSON keys: top1, chance, top1_over_chance (modern, mean over seeds), modern and reference -> {top1, top5, top1_over_chance, gain_nats:
means over seeds; of_seeds -> the same of each, top1_deviation over pools, cpu_minutes and minutes of training}, seeds, steps,
pool, pools, clips, scenes, pairs_per_image, matched (share of centres), match_distance_m -> {median, p75, p99}.
"""

import math
import shutil
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from benchmarks.report import RESULTS, Report, build_parser
from benchmarks.training import TrainedRun, load_model, read_held_out_clips, synthesize_city, train_run
from models.batch import Batch
from models.contrast import retrieve
from models.objectives.base import encode
from models.objectives.simipu import SimipuObjective
from models.peers import ALONE
from trainer.config.load import load_run_config

RUN = Path(__file__).parents[1] / "launch" / "runs" / "simipu_tiny.yaml"
PRESETS = ("modern", "reference")
POOL = 256
CLIPS = 128
TEMPERATURE = 0.07
QUANTILES = {"median": 0.5, "p75": 0.75, "p99": 0.99}


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each preset")
    parser.add_argument("--steps", type=int, default=None, help="steps to train; the run config's by default")
    parser.add_argument("--scenes", type=int, default=16, help="synthetic scenes; every fourth is held out")
    parser.add_argument("--city", type=Path, default=None, help="a dataroot to take instead of synthesising one")
    parser.add_argument("--folder", type=Path, default=None, help="where data and runs are kept; a temporary one by default")
    arguments = parser.parse_args()
    report = Report("simipu", arguments)
    if arguments.folder:
        measure(report, arguments, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(report, arguments, Path(folder))


def measure(report: Report, arguments: Namespace, folder: Path) -> None:
    """Synthesise, train through the public command, search, report, draw."""
    steps: int = arguments.steps or load_run_config(RUN).steps
    city = arguments.city or synthesize_city(folder / "city", arguments.scenes)
    runs: dict[str, list[TrainedRun]] = {preset: [] for preset in PRESETS}
    for seed in range(arguments.seeds):
        for preset in PRESETS:
            chosen = (f"objectives[0].preset={preset}", f"seed={seed}", f"steps={steps}")
            runs[preset].append(train_run(RUN, folder / f"{preset}-{seed}", city, *chosen))
    held_out = read_held_out_clips(runs["modern"][0].config, CLIPS).batches
    figures = {preset: average([search_with(run, held_out) for run in runs[preset]]) for preset in PRESETS}
    for preset, found in figures.items():
        report.say(describe(preset, found, arguments.seeds))
    if report.save:
        plot(runs, figures, RESULTS / "simipu.png")
        shutil.copyfile(max((runs["modern"][0].folder / "pictures").glob("*-simipu.png")), RESULTS / "simipu_sheet.png")
    of_modern = {key: figures["modern"][key] for key in ("top1", "top1_over_chance")}
    report.finish(
        {**of_modern, "chance": 1 / POOL, **figures, "seeds": arguments.seeds, "steps": steps, **describe_held_out(held_out)}
    )


def describe_held_out(held_out: Sequence[Batch]) -> dict[str, Any]:
    """What every model is asked."""
    matched, distance_m, is_pair = (gather(held_out, name) for name in ("match_valid", "match_distance_m", "pair_valid"))
    cameras = held_out[0].shared["images"].shape[2]
    return {
        "pool": POOL,
        "pools": len(deal_pools(int(is_pair.sum()))),
        "clips": len(is_pair),
        "scenes": len({clip.split()[0] for batch in held_out for clip in batch.clips}),
        "pairs_per_image": is_pair.sum(dim=1).double().mean().item() / cameras,
        "matched": matched.double().mean().item(),
        "match_distance_m": describe_distances(distance_m[matched].numpy()),
    }


def gather(held_out: Sequence[Batch], name: str) -> Tensor:
    """A prepared array of all clips."""
    return torch.cat([batch.prepared["simipu"][name] for batch in held_out])


def search_with(run: TrainedRun, held_out: Sequence[Batch]) -> dict[str, float]:
    """Retrieval of one model over all pools."""
    image, point = embed(run, held_out)
    found = [search(image[pool], point[pool]) for pool in deal_pools(len(image))]
    mean = {name: statistics.mean(of_one[name] for of_one in found) for name in found[0]}
    return {
        **mean,
        "top1_over_chance": POOL * mean["top1"],
        "top1_deviation": statistics.pstdev(of_one["top1"] for of_one in found),
        "minutes": run.minutes,
        "cpu_minutes": run.cpu_minutes,
    }


@torch.no_grad()
def embed(run: TrainedRun, held_out: Sequence[Batch]) -> tuple[Float[Tensor, "n E"], Float[Tensor, "n E"]]:
    """Unit vectors of image and point of every held-out pair, by the last checkpoint of a run."""
    model = load_model(run)
    objective = model.objectives["simipu"]
    assert isinstance(objective, SimipuObjective)
    images, points = [], []
    for batch in held_out:
        prepared = batch.prepared["simipu"]
        (clips,) = encode(model.encoder, objective.clips(batch))
        compared = objective.compare(clips.tokens, prepared)
        images.append(compared.image[prepared["pair_valid"]])
        points.append(compared.point[prepared["pair_valid"]])
    return torch.cat(images), torch.cat(points)


def deal_pools(pairs: int) -> Int64[np.ndarray, "pools pool"]:
    """Rows of `POOL` numbers below `pairs`, none twice; what does not fill a pool is left out."""
    assert pairs >= POOL, f"{pairs} held-out pairs do not fill a pool of {POOL}"
    order = np.random.default_rng(0).permutation(pairs)
    return order[: pairs // POOL * POOL].reshape(-1, POOL)


def search(image: Float[Tensor, "n E"], point: Float[Tensor, "n E"]) -> dict[str, float]:
    """Whether each image finds its own point among all, at once and in five; and how much it knows, in nats above guessing."""
    every = torch.ones(len(image), dtype=torch.bool)
    found = retrieve(image, point, every, temperature=TEMPERATURE, peers=ALONE)
    gain = math.log(len(image)) - found.mean(found.loss).item()
    return {"top1": found.top(1).item(), "top5": found.top(5).item(), "gain_nats": gain}


def average(of_seeds: list[dict[str, float]]) -> dict[str, Any]:
    """Means over seeds of what is searched, and every seed by itself."""
    keys = ("top1", "top5", "top1_over_chance", "gain_nats")
    return {key: statistics.mean(of_one[key] for of_one in of_seeds) for key in keys} | {"of_seeds": of_seeds}


def describe_distances(distance_m: np.ndarray) -> dict[str, float]:
    """Between the centres of pairs."""
    return {name: float(np.quantile(distance_m, quantile)) for name, quantile in QUANTILES.items()}


def describe(preset: str, found: Mapping[str, Any], seeds: int) -> str:
    """A line of a preset."""
    each = ", ".join(f"{of_one['top1']:.1%}" for of_one in found["of_seeds"])
    cpu_minutes = max(of_one["cpu_minutes"] for of_one in found["of_seeds"])
    return (
        f"{preset:9}  top-1 {found['top1']:.1%} of {POOL}, {found['top1_over_chance']:.1f} times chance (of {seeds} seeds: {each}); "
        f"top-5 {found['top5']:.1%}; a run takes at most {cpu_minutes:.1f} CPU minutes"
    )


def plot(runs: Mapping[str, Sequence[TrainedRun]], figures: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """How often images find their points at the end, and on the way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (end, way) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for place, preset in enumerate(PRESETS):
        colour = f"C{place}"
        end.bar(place, figures[preset]["top1_over_chance"], color=colour, alpha=0.5, width=0.6)
        of_seeds = [of_one["top1_over_chance"] for of_one in figures[preset]["of_seeds"]]
        end.scatter([place] * len(of_seeds), of_seeds, color=colour, zorder=3)
        for number, run in enumerate(runs[preset]):
            steps = [evaluation["step"] for evaluation in run.evaluations]
            over_chance = [of["simipu/image_to_point_top1"] / of["simipu/image_to_point_chance"] for of in run.evaluations]
            way.plot(steps, over_chance, color=colour, marker="o", markersize=3, label=None if number else preset)
    end.axhline(1, color="grey", linestyle="--", linewidth=1)
    end.set(
        xticks=range(len(PRESETS)),
        xticklabels=PRESETS,
        ylabel="top-1 over chance",
        title=f"among {POOL} held-out pairs, a dot a seed",
    )
    way.axhline(1, color="grey", linestyle="--", linewidth=1, label="chance")
    way.set(xlabel="step", ylabel="top-1 over chance", title="among the pairs of a held-out batch, in training")
    way.legend()
    for axes in (end, way):
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
