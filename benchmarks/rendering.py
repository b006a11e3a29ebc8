"""What the renderer of MIM4D costs on this machine's CPU, beside the same equations written down straightforwardly.

The plain renderer is in this file: it gathers eight corners of every sample, calls autograd for the gradient of the distance
with create_graph, multiplies one block's features after the other, takes cumprod, and keeps everything. Both have the same
weights, rays and random numbers, and must agree before they are timed; they take turns, so that a shared machine drifts for both.

Memory is what a forward keeps for its backward, each storage once, volume and weights not counted. With recomputing that is
the rays and where they are sampled, and in the backward one chunk of rays at a time: the sum of both is what is compared.
Predictions are the matrix products and reads of the equations, and `Renderer.kept_numbers`.

    python -m benchmarks.rendering                            # 6 x 128 rays through the release's grid of 0.8 m
    python -m benchmarks.rendering --rays 1024 --repeats 5

JSON keys: rays_per_s (forward and backward, recomputing), over_plain (of rays per second), memory_over_plain; of_parts -> the
first two of forward and backward alone; kept_bytes_a_ray (measured and predicted), predicted_mflop_a_ray, achieved_gflops.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import Report, build_parser
from models.geometry import VoxelGrid, enter_and_leave, to_cells
from models.rendering import ConditionedMlp, Renderer, Rendering, RenderShape

GRID = VoxelGrid((-51.2, -51.2, -5.0), (51.2, 51.2, 3.0), (128, 128, 5))
CHANNELS = 32


class Scene(NamedTuple):
    """A volume and rays through it, with their jitter."""

    volume: Tensor
    origin_m: Tensor
    direction: Tensor
    jitter: Tensor


class Seconds(NamedTuple):
    """Of one step."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("--rays", type=int, default=768)
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed steps of each after one that warms up; medians are reported"
    )
    parser.add_argument("--chunk-mib", type=int, default=64, help="of what one chunk of rays keeps")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report("rendering", arguments)
    torch.manual_seed(0)
    renderer, scene, chunk_bytes = (
        Renderer(CHANNELS, GRID, RenderShape()),
        make_scene(arguments.rays),
        arguments.chunk_mib * 2**20,
    )
    ways: dict[str, Callable[[Scene], Rendering]] = {
        "plain": lambda scene: render_plainly(renderer, scene),
        "kept": lambda scene: renderer(*scene, chunk_bytes=chunk_bytes),
        "recomputed": lambda scene: renderer(*scene, recompute=True, chunk_bytes=chunk_bytes),
    }
    difference = measure_difference(renderer, scene, ways)
    report.say(f"largest difference to the plain renderer, of gradients and of what is rendered: {difference:.1e} of the largest")
    rounds = [{name: measure_step(way, scene) for name, way in ways.items()} for _ in range(arguments.repeats + 1)][1:]
    seconds = {name: median_of([measured[name] for measured in rounds]) for name in ways}
    figures = describe(renderer, scene, ways, seconds, chunk_bytes)
    for name, taken in seconds.items():
        report.say(
            f"{name:10}  {arguments.rays / taken.both:6.0f} rays/s = forward {arguments.rays / taken.forward:6.0f}, "
            f"backward {arguments.rays / taken.backward:6.0f};  keeps {figures['kept_bytes_a_ray'][name]:9.0f} bytes a ray"
        )
    predicted = figures["kept_bytes_a_ray"]["predicted_kept"]
    report.say(
        f"predicted: {predicted:.0f} bytes a ray kept, {figures['predicted_mflop_a_ray']['kept']:.1f} Mflop a ray "
        f"({figures['predicted_mflop_a_ray']['recomputed']:.1f} recomputing), so {figures['achieved_gflops']:.1f} GFLOP/s; "
        f"reads and writes of at least {figures['predicted_mbyte_a_ray']:.2f} MB a ray"
    )
    report.say(
        f"recomputing: {figures['over_plain']:.1f} x the plain renderer's rays per second, "
        f"{figures['memory_over_plain']:.3f} of its memory"
    )
    report.finish(figures | {"rays": arguments.rays, "chunk_mib": arguments.chunk_mib, "largest_difference": difference})


def describe(
    renderer: Renderer,
    scene: Scene,
    ways: dict[str, Callable[[Scene], Rendering]],
    seconds: dict[str, Seconds],
    chunk_bytes: int,
) -> dict[str, Any]:
    """All figures."""
    rays, samples = scene.origin_m.shape[1], renderer.shape.samples
    kept = {name: measure_kept_bytes(renderer, way, scene) for name, way in ways.items()}
    # checkpoint holds its inputs without saying so to the hook: origin, direction, first row and edges
    kept["recomputed"] += 4 * rays * (3 + 3 + 1 + samples + 1)
    chunk = renderer.rays_at_once(chunk_bytes)
    one_chunk = measure_kept_bytes(renderer, ways["kept"], Scene(scene.volume, *(part[:, :chunk] for part in scene[1:])))
    flop = predict_flop(renderer.shape)
    ours, plain = seconds["recomputed"], seconds["plain"]
    return {
        "rays_per_s": rays / ours.both,
        "over_plain": plain.both / ours.both,
        "of_parts": {
            "rays_per_s": {"forward": rays / ours.forward, "backward": rays / ours.backward},
            "over_plain": {"forward": plain.forward / ours.forward, "backward": plain.backward / ours.backward},
        },
        "kept_over_plain": plain.both / seconds["kept"].both,
        "memory_over_plain": (kept["recomputed"] + one_chunk) / kept["plain"],
        "kept_memory_over_plain": kept["kept"] / kept["plain"],
        "kept_bytes_a_ray": {name: size / rays for name, size in kept.items()}
        | {"predicted_kept": renderer.kept_numbers * 4 * samples, "one_chunk_in_all": one_chunk},
        "predicted_mflop_a_ray": {name: value / 1e6 for name, value in flop.items()},
        "predicted_mbyte_a_ray": 2 * renderer.kept_numbers * 4 * samples / 1e6,
        "achieved_gflops": flop["recomputed"] * rays / ours.both / 1e9,
    }


def make_scene(rays: int) -> Scene:
    """Six cameras around a car, each with its share of rays ahead of it."""
    generator = torch.Generator().manual_seed(0)
    volume = torch.randn(1, CHANNELS, *GRID.zyx, generator=generator).requires_grad_()
    yaw = torch.arange(rays) % 6 * (torch.pi / 3) + (torch.rand(rays, generator=generator) - 0.5) * torch.pi / 3
    pitch = (torch.rand(rays, generator=generator) - 0.7) * 0.4
    direction = torch.stack([yaw.cos() * pitch.cos(), yaw.sin() * pitch.cos(), pitch.sin()], dim=-1)
    origin_m = direction * torch.tensor([1.0, 1.0, 0.0])
    return Scene(volume, origin_m[None], direction[None], torch.rand(1, rays, 2, generator=generator))


def loss_of(rendering: Rendering) -> Tensor:
    """As a training step has it: colours and depths, and the gradient of everything."""
    return rendering.rgb.sum() + rendering.depth_m.mean() + rendering.eikonal.mean()


def measure_step(way: Callable[[Scene], Rendering], scene: Scene) -> Seconds:
    """Forward and backward once."""
    started = time.perf_counter()
    loss = loss_of(way(scene))
    between = time.perf_counter()
    loss.backward()
    return Seconds(between - started, time.perf_counter() - between)


def median_of(measured: list[Seconds]) -> Seconds:
    """Of each part."""
    return Seconds(*(statistics.median(parts) for parts in zip(*measured, strict=True)))


def measure_difference(renderer: Renderer, scene: Scene, ways: dict[str, Callable[[Scene], Rendering]]) -> float:
    """Largest difference of ours from the plain renderer's, as a share of the largest number of its kind."""
    leaves = [scene.volume, *renderer.parameters()]
    results = {}
    for name, way in ways.items():
        rendering = way(scene)
        results[name] = [rendering.rgb, rendering.depth_m, *torch.autograd.grad(loss_of(rendering), leaves)]
    return max(
        ((ours - plain).abs().max() / plain.abs().max()).item()
        for name in ("kept", "recomputed")
        for ours, plain in zip(results[name], results["plain"], strict=True)
    )


def measure_kept_bytes(renderer: Renderer, way: Callable[[Scene], Rendering], scene: Scene) -> int:
    """What a forward keeps for its backward, volume (once, as it lies) and weights aside."""
    known = {parameter.untyped_storage().data_ptr() for parameter in (scene.volume, *renderer.parameters())}
    kept: dict[int, int] = {}
    volume_bytes = scene.volume.untyped_storage().nbytes()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and storage.nbytes() != volume_bytes:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        rendering = way(scene)
    del rendering
    return sum(kept.values())


def predict_flop(shape: RenderShape) -> dict[str, float]:
    """Of one ray forward and backward: products of the networks, eight corners read, summed and spread; a multiply-add is two."""
    hidden, corners = shape.hidden, 8
    sdf = 3 * hidden + shape.sdf_blocks * hidden * (CHANNELS + hidden) + hidden * 17
    slope = 3 * hidden + shape.sdf_blocks * hidden * (CHANNELS + hidden)
    rgb = 3 * hidden + shape.rgb_blocks * hidden * (3 + CHANNELS + 3 + 16 + hidden) + 3 * hidden
    read = corners * CHANNELS
    coarse = shape.coarse * (sdf + read)
    forward = shape.samples * (sdf + slope + rgb + 2 * read)
    backward = shape.samples * (2 * (sdf + slope + rgb) + 3 * read)
    return {"kept": 2.0 * (coarse + forward + backward), "recomputed": 2.0 * (coarse + 2 * forward + backward)}


# The plain renderer ---------------------------------------------------------------------------------------------------------


def render_plainly(renderer: Renderer, scene: Scene) -> Rendering:
    """The equations of `models.rendering`, one after the other."""
    origin_m, direction, jitter = scene.origin_m[0], scene.direction[0], scene.jitter[0]
    volume = scene.volume[0].permute(1, 2, 3, 0)  # (Z, Y, X, C)
    near_m, far_m, hit = enter_and_leave(origin_m, direction, GRID, renderer.shape.near_m)
    with torch.no_grad():
        edges = choose_edges(renderer, volume, origin_m, direction, jitter, near_m, far_m)
    length, starts = edges.diff(dim=-1), edges[:, :-1]
    points = (origin_m[:, None] * GRID.scale + direction[:, None] * starts[..., None]).requires_grad_()  # (R, S, 3)
    features = read_corners(volume, points)
    out = run_blocks(renderer.sdf, points, features, lambda x: F.softplus(x, beta=100))
    sdf, geometry = out[..., 0], out[..., 1:]
    (gradient,) = torch.autograd.grad(sdf.sum(), points, create_graph=True)
    directions = direction[:, None].expand_as(points)
    colour = torch.sigmoid(run_blocks(renderer.rgb, points, torch.cat([directions, features, gradient, geometry], -1), F.relu))
    cos = -F.relu(-(directions * gradient).sum(-1))
    weight = weigh_plainly(sdf, cos * length, torch.exp(10 * renderer.log_sharpness).clamp(1e-6, 1e6))
    opacity = weight.sum(-1)
    depth_m = (weight * starts).sum(-1) / (opacity + 1e-10) / GRID.scale
    eikonal = ((gradient.square().sum(-1) + 1e-10).sqrt() - 1).square().mean(-1)
    rgb = (weight[..., None] * colour).sum(1)
    parts = (torch.where(hit.view(-1, *[1] * (part.ndim - 1)), part, 0.0) for part in (rgb, depth_m, opacity, eikonal))
    rgb, depth_m, opacity, eikonal = (part[None] for part in parts)
    return Rendering(rgb, depth_m, opacity, hit[None], eikonal)


def choose_edges(
    renderer: Renderer, volume: Tensor, origin_m: Tensor, direction: Tensor, jitter: Tensor, near_m: Tensor, far_m: Tensor
) -> Tensor:
    """Coarse and fine intervals of each ray."""
    coarse, fine = renderer.shape.coarse, renderer.shape.fine
    share = ((torch.arange(coarse + 1) + jitter[:, :1] - 0.5) / coarse).clamp(0, 1)
    edges = (near_m[:, None] + (far_m - near_m)[:, None] * share) * GRID.scale
    points = origin_m[:, None] * GRID.scale + direction[:, None] * edges[:, :-1, None]
    features = read_corners(volume, points)
    sdf = run_blocks(renderer.sdf, points, features, lambda x: F.softplus(x, beta=100))[..., 0]
    length = edges.diff(dim=-1)[:, :-1]
    cos = sdf.diff(dim=-1) / (length + 1e-5)
    cos = torch.minimum(torch.cat([torch.zeros_like(cos[:, :1]), cos[:, :-1]], -1), cos).clamp(-1e3, 0)
    weight = weigh_plainly((sdf[:, 1:] + sdf[:, :-1]) / 2, cos * length, 64.0)
    weight = torch.cat([weight, torch.zeros_like(weight[:, :1])], -1) + 1e-5
    weight = weight / weight.sum(-1, keepdim=True)
    below = torch.cat([torch.zeros_like(weight[:, :1]), weight.cumsum(-1)], -1)
    wanted = (torch.arange(fine) + jitter[:, 1:]) / fine
    place = (torch.searchsorted(below, wanted, right=True) - 1).clamp(0, coarse - 1)
    within = ((wanted - below.gather(1, place)) / weight.gather(1, place)).clamp(0, 1)
    more = edges.gather(1, place) * (1 - within) + edges.gather(1, place + 1) * within
    return torch.cat([edges, more], -1).sort(-1).values


def read_corners(volume: Tensor, points: Tensor) -> Tensor:
    """Trilinear, by gathering all eight corners of every point."""
    places = to_cells(points / GRID.scale, GRID) - 0.5
    below = places.detach().floor()
    share = places - below
    read: Tensor | float = 0.0
    for corner in range(8):
        above = torch.tensor([corner & 1, corner >> 1 & 1, corner >> 2])
        cell = (below + above).long()
        sizes = torch.tensor(GRID.shape)
        exists = ((cell >= 0) & (cell < sizes)).all(-1)
        x, y, z = torch.minimum(cell.clamp(min=0), sizes - 1).unbind(-1)
        weight = torch.where(above.bool(), share, 1 - share).prod(-1) * exists
        read = read + weight[..., None] * volume[z, y, x]
    assert isinstance(read, Tensor)
    return read


def run_blocks(mlp: ConditionedMlp, points: Tensor, features: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """A network, block by block."""
    x = F.linear(points, mlp.point_weight, mlp.point_bias)
    for block in range(mlp.blocks):
        own = slice(block * mlp.hidden, (block + 1) * mlp.hidden)
        x = x + F.linear(features, mlp.feature_weight[own], mlp.feature_bias[own])
        x = activation(F.linear(x, mlp.block_weight[own], mlp.block_bias[own]))
    return F.linear(x, mlp.out_weight, mlp.out_bias)


def weigh_plainly(sdf: Tensor, change: Tensor, sharpness: Tensor | float) -> Tensor:
    """Weights of samples along rays."""
    before, after = torch.sigmoid(sharpness * (sdf - change / 2)), torch.sigmoid(sharpness * (sdf + change / 2))
    alpha = ((before - after + 1e-5) / (before + 1e-5)).clamp(0, 1)
    passed = torch.cumprod(1 - alpha + 1e-7, -1)
    return alpha * torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], -1)


if __name__ == "__main__":
    main()
