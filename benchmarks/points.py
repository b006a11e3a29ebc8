"""What the point branch of SimIPU costs: geometry in a loader's worker, matching, a step of the encoder, and memory.

Sweeps are ray-cast by trainer.synthesis, 32 beams around a car in a synthetic street. The encoder is timed turn by turn against
the plain way with the same weights (gather, join features and offsets, then the whole first layer, amax last); both are also
counted by hand, so a prediction stands beside each figure: multiply-adds of the linear maps, and the bytes that the layers keep for
the backward, which are measured through saved_tensors_hooks. `two views` is SimIPU's pair of a sweep and its transformed copy:
with both graphs kept, as the release does, and with the second view encoded without one, which gives the same gradients.

    python -m benchmarks.points                                      # all sizes of geometry; steps of tiny and lean
    python -m benchmarks.points --sizes reference --steps-of reference --batch 1 --device cuda

JSON keys: geometry -> size -> {order_ms, neighbours_ms, match_ms, match_gated_ms, sample_ms}, steps -> size -> {step_seconds,
plain_seconds, predicted_speedup, speedup, difference, saved, predicted_saved, both_graphs_saved, plain_saved, bf16_saved} in bytes.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.report import Report, build_parser
from models.clouds import Cloud, Similarity, describe_cloud, match_centres, order_farthest_first, transform_points
from models.config import POINT_SHAPES, PointShape
from models.points import PointEncoder, Ring
from trainer.synthesis.config import SynthesisConfig
from trainer.synthesis.lidar import scan
from trainer.synthesis.rig import NUSCENES_LIDAR
from trainer.synthesis.scene import build_scene

MATCH_GATE_M = 1.0
FLOAT_BYTES, INDEX_BYTES = 4, 8

Neighbours = list[list[Tensor]]
Encode = Callable[[PointEncoder, Tensor, Tensor, Neighbours], Tensor]


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(POINT_SHAPES), choices=list(POINT_SHAPES), help="sizes of geometry")
    parser.add_argument("--steps-of", nargs="+", default=["tiny", "lean"], choices=list(POINT_SHAPES))
    parser.add_argument("--batch", type=int, default=1, help="clouds in a step")
    parser.add_argument("--turns", type=int, default=5, help="timed turns after one that warms up; medians are reported")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report("points", arguments)
    sweep = scan_street()
    report.say(f"a sweep of {len(sweep)} points; figures are medians of {arguments.turns} turns")
    geometry, steps = {}, {}
    for size in arguments.sizes:
        figures = geometry[size] = measure_geometry(sweep, POINT_SHAPES[size], arguments.turns)
        report.say(
            f"{size:9}  order {figures['order_ms']:5.1f} ms, neighbours {figures['neighbours_ms']:5.1f} ms, "
            f"matching {figures['match_ms']:5.1f} ms ({figures['match_gated_ms']:.1f} with a gate of {MATCH_GATE_M:g} m); "
            f"two views and their matching {figures['sample_ms']:.0f} ms a sample in one worker"
        )
    for size in arguments.steps_of:
        steps[size] = measure_steps(sweep, POINT_SHAPES[size], arguments.batch, arguments.turns, torch.device(arguments.device))
        report.say(describe_steps(size, steps[size]))
    report.finish({"geometry": geometry, "steps": steps, "batch": arguments.batch, "device": arguments.device})


def describe_steps(size: str, figures: dict[str, float]) -> str:
    """Two lines."""
    saved = {name: f"{figures[name] / 2**20:.0f} MiB" for name in figures if name.endswith("saved")}
    return (
        f"{size:9}  step {figures['step_seconds']:.3f} s, plain {figures['plain_seconds']:.3f} s: {figures['speedup']:.2f} times as "
        f"fast ({figures['predicted_speedup']:.2f} predicted from multiply-adds); features differ by {figures['difference']:.1e}\n"
        f"{size:9}  two views keep {saved['saved']} ({saved['predicted_saved']} predicted), with both graphs "
        f"{saved['both_graphs_saved']}, the plain way {saved['plain_saved']}, under bf16 {saved['bf16_saved']}"
    )


def scan_street() -> np.ndarray:
    """x, y, z and an intensity in [0, 1] of a whole sweep."""
    scene, time_s = build_scene(SynthesisConfig(), 0), 1.0
    points = scan(NUSCENES_LIDAR, scene.world_from_ego(time_s), scene.boxes_at(time_s), np.random.default_rng(0)).points
    return (points[:, :4] / [1, 1, 1, 255]).astype(np.float32)


def draw_points(sweep: np.ndarray, shape: PointShape, seed: int) -> np.ndarray:
    """As many points of the sweep as the encoder takes."""
    return sweep[np.random.default_rng(seed).permutation(len(sweep))[: shape.points]]


def measure_geometry(sweep: np.ndarray, shape: PointShape, turns: int) -> dict[str, float]:
    """Milliseconds of each part, one thread, as in a worker."""
    points, similarity = draw_points(sweep, shape, 0), Similarity(0.6, 1.1, True)
    moved = points[np.random.default_rng(1).permutation(len(points))]
    moved[:, :3] = transform_points(similarity.matrix, moved[:, :3])
    clouds = [describe_cloud(view, shape) for view in (points, moved)]
    a, b = (cloud.points[: shape.centres, :3] for cloud in clouds)
    b = transform_points(np.linalg.inv(similarity.matrix), b)
    parts = {
        "order": lambda: order_farthest_first(points[:, :3], shape.levels[0].centres),
        "cloud": lambda: describe_cloud(points, shape),
        "match": lambda: match_centres(a, b, gate_m=None),
        "match_gated": lambda: match_centres(a, b, gate_m=MATCH_GATE_M),
    }
    ms = {name: 1e3 * seconds for name, seconds in take_turns(parts, turns, torch.device("cpu")).items()}
    return {
        "order_ms": ms["order"],
        "neighbours_ms": ms["cloud"] - ms["order"],
        "match_ms": ms["match"],
        "match_gated_ms": ms["match_gated"],
        "sample_ms": 2 * ms["cloud"] + ms["match_gated"],
    }


def measure_steps(sweep: np.ndarray, shape: PointShape, batch: int, turns: int, device: torch.device) -> dict[str, float]:
    """Seconds of a forward and backward of both ways, and the bytes each keeps."""
    torch.manual_seed(0)
    encoder = PointEncoder(shape, features=1, use_xyz=True, norm="layer").to(device)
    inputs = stack([describe_cloud(draw_points(sweep, shape, seed), shape) for seed in range(batch)], device)
    with torch.no_grad():
        difference = (encode(encoder, *inputs) - encode_plainly(encoder, *inputs)).abs().max().item()
    ways = {"step": lambda: step(encoder, encode, inputs), "plain": lambda: step(encoder, encode_plainly, inputs)}
    seconds = take_turns(ways, turns, device)
    plain_macs, macs = count_multiply_adds(shape)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        bf16_saved = count_saved_bytes(encoder, encode, inputs, has_second_graph=False)
    return {
        "step_seconds": seconds["step"],
        "plain_seconds": seconds["plain"],
        "speedup": seconds["plain"] / seconds["step"],
        "predicted_speedup": plain_macs / macs,
        "difference": difference,
        "saved": count_saved_bytes(encoder, encode, inputs, has_second_graph=False),
        "predicted_saved": batch * predict_saved_bytes(shape),
        "both_graphs_saved": count_saved_bytes(encoder, encode, inputs, has_second_graph=True),
        "plain_saved": count_saved_bytes(encoder, encode_plainly, inputs, has_second_graph=True),
        "bf16_saved": bf16_saved,
    }


def stack(clouds: Sequence[Cloud], device: torch.device) -> tuple[Tensor, Tensor, Neighbours]:
    """Clouds as one batch: coordinates, intensities, neighbours."""
    points = torch.from_numpy(np.stack([cloud.points for cloud in clouds])).to(device)
    levels = zip(*(cloud.neighbours for cloud in clouds), strict=True)
    neighbours = [[torch.from_numpy(np.stack(ring)).to(device) for ring in zip(*rings, strict=True)] for rings in levels]
    return points[..., :3], points[..., 3:], neighbours


def encode(encoder: PointEncoder, xyz: Tensor, features: Tensor, neighbours: Neighbours) -> Tensor:
    """As we do it."""
    return encoder(xyz, features, neighbours)


def encode_plainly(encoder: PointEncoder, xyz: Tensor, features: Tensor, neighbours: Neighbours) -> Tensor:
    """The formula as it stands, with the same layers."""
    for level, rings in zip(encoder.levels, neighbours, strict=True):
        found = [find_plainly(ring, xyz, features, around) for ring, around in zip(level.rings, rings, strict=True)]
        features = apply_layer(level.join, torch.cat(found, dim=-1))
        xyz = xyz[:, : features.shape[1]]
    return features


def find_plainly(ring: Ring, xyz: Tensor, features: Tensor, neighbours: Tensor) -> Tensor:
    """One ring: everything is gathered first."""
    cloud, rows = torch.arange(len(xyz), device=xyz.device)[:, None, None], neighbours.long()
    offset = (xyz[cloud, rows] - xyz[:, : rows.shape[1], None]) / ring.embed.radius_m
    x = torch.cat([features[cloud, rows], offset], dim=-1)  # (B, M, k, F + 3)
    x = nn.functional.linear(x, ring.embed.weight, ring.embed.bias)
    x = torch.relu(ring.norm(x.flatten(0, 2))).unflatten(0, rows.shape)
    for layer in ring.layers:
        x = apply_layer(layer, x)
    return x.amax(dim=2)


def apply_layer(layer: nn.Module, x: Tensor) -> Tensor:
    """Linear map, norm, ReLU."""
    return torch.relu(layer(x.flatten(0, -2))).unflatten(0, x.shape[:-1])


def step(encoder: PointEncoder, way: Encode, inputs: tuple[Tensor, Tensor, Neighbours]) -> None:
    """Forward and backward of one view."""
    way(encoder, *inputs).square().mean().backward()
    encoder.zero_grad()


def take_turns(ways: dict[str, Callable[[], object]], turns: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each; they take turns, because shared machines drift."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def count_multiply_adds(shape: PointShape) -> tuple[int, int]:
    """Of the linear maps of one forward: the plain way, and with the first layers split."""
    plain = split = 0
    inputs, features = shape.points, 1
    for level in shape.levels:
        for k, widths in zip(level.neighbours, level.widths, strict=True):
            pairs, first = level.centres * k, widths[0]
            rest = pairs * sum(math.prod(both) for both in itertools.pairwise(widths))
            plain += pairs * (features + 3) * first + rest
            split += inputs * features * first + pairs * 3 * first + rest
        join = level.centres * sum(widths[-1] for widths in level.widths) * level.out
        plain, split = plain + join, split + join
        inputs, features = level.centres, level.out
    return plain, split


def count_saved_bytes(
    encoder: PointEncoder, way: Encode, inputs: tuple[Tensor, Tensor, Neighbours], *, has_second_graph: bool
) -> int:
    """What two views keep for the backward, weights and inputs apart; each storage once."""
    xyz, features, neighbours = inputs
    views = [inputs, (xyz.clone(), features.clone(), [[around.clone() for around in rings] for rings in neighbours])]
    ours = {weight.untyped_storage().data_ptr() for weight in encoder.parameters()}
    ours |= {tensor.untyped_storage().data_ptr() for xyz, features, _ in views for tensor in (xyz, features)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [way(encoder, *views[0])]
        with torch.set_grad_enabled(has_second_graph):
            outputs.append(way(encoder, *views[1]))
    return sum(storage.nbytes() for storage in kept.values())


def predict_saved_bytes(shape: PointShape) -> int:
    """Of one cloud in float32: of every layer what its norm took and what its ReLU gave, but of the last in a ring only maxima."""
    total = 0
    for level in shape.levels:
        for k, widths in zip(level.neighbours, level.widths, strict=True):
            statistics_of_norms = 2 * FLOAT_BYTES * len(widths)
            numbers = sum(widths) + sum(widths[:-1]) + 3  # and the offsets
            total += level.centres * k * (FLOAT_BYTES * numbers + statistics_of_norms + INDEX_BYTES)
            total += level.centres * widths[-1] * (FLOAT_BYTES + INDEX_BYTES)
        joined = sum(widths[-1] for widths in level.widths)
        total += level.centres * FLOAT_BYTES * (joined + 2 * level.out + 2)
    return total


if __name__ == "__main__":
    main()
