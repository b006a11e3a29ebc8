"""Is a withheld instant rebuilt? Train `mim4d_tiny`, then measure depth on held-out scenes against what costs nothing.

Depths along LiDAR rays of a withheld instant, mean absolute error in metres, by five ways to know them:

    rebuilt          from the volumes of the other instants, by the temporal decoder
    direct           from the instant's own images
    another clip     the same decoder given the instants of another clip: what it knows of streets in general
    nearest frame    the volume of the instant nearest in time, as it is; and moved by the car's own motion
    constant         the one depth that errs least

    python -m benchmarks.mim4d                         # one seed: half an hour on a quiet core
    python -m benchmarks.mim4d --mode spacetime        # the same for the true video encoder
    python -m benchmarks.mim4d --steps 20              # a look
    python -m benchmarks.mim4d --folder runs/mim4d     # keep city and runs there; a second call trains nothing twice

JSON keys: rebuilt_depth_m, direct_depth_m, nearest_frame_m, nearest_frame_moved_m, another_clip_m, constant_m, psnr (of the rebuilt
colours, dB): means over seeds; of_seeds -> the same of each; rebuilt_over_nearest, rebuilt_over_constant; seeds, steps, mode, clips,
cpu_minutes.
`--save` also keeps the curves, a sheet of whole images and a flight through a rebuilt instant (GIF).
"""

import math
import shutil
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from benchmarks.report import RESULTS, Report, build_parser
from benchmarks.training import TrainedRun, load_model, mean_figures, read_held_out_clips, synthesize_city, train_run
from models.geometry import see_through_pixels
from models.images import paint_depth
from models.objectives.base import encode
from models.objectives.mim4d import Mim4dObjective
from trainer.config.load import load_run_config

RUN = Path(__file__).parents[1] / "launch" / "runs" / "mim4d_tiny.yaml"
CLIPS = 48
FIGURES = {
    "rebuilt_depth_m": "mim4d/rebuilt_depth_m",
    "direct_depth_m": "mim4d/direct_depth_m",
    "nearest_frame_m": "mim4d/nearest_frame_depth_m",
    "nearest_frame_moved_m": "mim4d/nearest_frame_moved_depth_m",
    "another_clip_m": "mim4d/another_clip_depth_m",
    "constant_m": "mim4d/constant_depth_m",
    "psnr": "mim4d/rebuilt_psnr",
}
FLIGHT_FRAMES, FLIGHT_M, FLIGHT_TURN_RAD = 24, 4.0, 0.35


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="runs")
    parser.add_argument("--mode", choices=("frame", "surround", "spacetime"), default="frame", help="what attends to what")
    parser.add_argument("--steps", type=int, default=None, help="steps to train; the run config's by default")
    parser.add_argument("--scenes", type=int, default=16, help="synthetic scenes; every fourth is held out")
    parser.add_argument("--city", type=Path, default=None, help="a dataroot to take instead of synthesising one")
    parser.add_argument("--folder", type=Path, default=None, help="where data and runs are kept; a temporary one by default")
    arguments = parser.parse_args()
    report = Report("mim4d" if arguments.mode == "frame" else f"mim4d_{arguments.mode}", arguments)
    if arguments.folder:
        measure(report, arguments, arguments.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(report, arguments, Path(folder))


def measure(report: Report, arguments: Namespace, folder: Path) -> None:
    """Synthesise, train through the public command, measure, report, draw."""
    steps: int = arguments.steps or load_run_config(RUN).steps
    city = synthesize_city(arguments.city or folder / "city", arguments.scenes)
    overrides = (f"objectives[0].mode={arguments.mode}", f"steps={steps}")
    runs = [
        train_run(RUN, folder / f"{arguments.mode}-{seed}", city, f"seed={seed}", *overrides) for seed in range(arguments.seeds)
    ]
    of_seeds = [measure_run(run) for run in runs]
    means = {name: statistics.mean(of_one[name] for of_one in of_seeds) for name in FIGURES}
    for name, value in means.items():
        report.say(f"{name:22} {value:.3f}")
    if report.save:
        plot(runs, RESULTS / f"{report.name}.png")
        shutil.copyfile(max((runs[0].folder / "pictures").glob("*-mim4d.png")), RESULTS / f"{report.name}_sheet.png")
        fly(runs[0], RESULTS / f"{report.name}_flight.gif")
    report.finish(
        {
            **means,
            "rebuilt_over_nearest": means["rebuilt_depth_m"] / means["nearest_frame_m"],
            "rebuilt_over_constant": means["rebuilt_depth_m"] / means["constant_m"],
            "of_seeds": of_seeds,
            "seeds": arguments.seeds,
            "steps": steps,
            "mode": arguments.mode,
            "clips": CLIPS,
            "cpu_minutes": max(run.cpu_minutes for run in runs),
        }
    )


def measure_run(run: TrainedRun) -> dict[str, float]:
    """Errors of one trained model on clips of the held-out scenes."""
    figures = mean_figures(load_model(run), read_held_out_clips(run.config, CLIPS))
    return {name: figures[key] for name, key in FIGURES.items()}


@torch.no_grad()
def fly(run: TrainedRun, path: Path) -> None:
    """A flight ahead and around through a rebuilt instant: colours above, depths below, in a loop."""
    model, batch = load_model(run), read_held_out_clips(run.config, CLIPS).pictures
    objective = model.objectives["mim4d"]
    assert isinstance(objective, Mim4dObjective)
    (clips,) = encode(model.encoder, objective.clips(batch))
    volume = objective.rebuild(objective.build_volumes(clips, batch), batch, slice(0, 1)).volume[:1]
    front_from_ego = batch.shared["pix_from_ego"][0, 0, 0]  # the first camera looks ahead
    size = tuple(batch.shared["images"].shape[-2:])
    pictures = []
    for frame in range(FLIGHT_FRAMES):
        phase = 2 * math.pi * frame / FLIGHT_FRAMES
        ahead_m, yaw = FLIGHT_M * (1 - math.cos(phase)) / 2, FLIGHT_TURN_RAD * math.sin(phase)
        pictures.append(look(objective, volume, front_from_ego @ moved_from_ego(ahead_m, yaw), size))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=120, loop=0)


def look(objective: Mim4dObjective, volume: Tensor, pix_from_ego: Float[Tensor, "3 4"], size: Sequence[int]) -> Image.Image:
    """What a camera would see of a volume."""
    H, W = size
    v, u = (torch.arange(side) + 0.5 for side in (H, W))
    pixels = torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1).flatten(0, 1)
    rays = see_through_pixels(pix_from_ego[None], pixels[None])
    seen = objective.renderer(volume, rays.origin.expand_as(rays.reach), rays.direction)
    both = torch.cat([seen.rgb[0], paint_depth(seen.depth_m[0], objective.bins.far_m)]).view(2 * H, W, 3)
    picture = Image.fromarray((both.clamp(0, 1) * 255).round().byte().numpy())
    return picture.resize((4 * W, 8 * H), Image.Resampling.NEAREST)


def moved_from_ego(ahead_m: float, yaw_rad: float) -> Float[Tensor, "4 4"]:
    """To the frame of a car that has driven ahead and then turned."""
    ego_from_moved = np.eye(4)
    ego_from_moved[:2, :2] = [[math.cos(yaw_rad), -math.sin(yaw_rad)], [math.sin(yaw_rad), math.cos(yaw_rad)]]
    ego_from_moved[0, 3] = ahead_m
    return torch.from_numpy(np.linalg.inv(ego_from_moved)).float()


def plot(runs: Sequence[TrainedRun], path: Path) -> None:
    """Held-out depth errors as training goes on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for place, (name, key) in enumerate(FIGURES.items()):
        if name == "psnr":
            continue
        for number, run in enumerate(runs):
            steps = [evaluation["step"] for evaluation in run.evaluations]
            style = "-" if name in ("rebuilt_depth_m", "direct_depth_m") else "--"
            values = [evaluation[key] for evaluation in run.evaluations]
            axes.plot(steps, values, style, color=f"C{place}", marker="o", markersize=3, label=None if number else name)
    axes.set(xlabel="step", ylabel="depth error in metres", title="held-out scenes")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
