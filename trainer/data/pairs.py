"""Pairs: for each clip of one camera, which second views show enough of the same place and are not the same picture.

    overlap(target, reference) = share of the target's frustum that lies inside the reference's image, in front of it

The frustum is sampled at points spread evenly over its pixels and, in the logarithm, over depths of 2 to 40 m; a ray
that meets the ground (z = 0 of the ego frame) ends there, so no point lies under the road. Calibration and pose are all
it takes: what occludes what is not known. CroCo mined its pairs by co-visible surface, and code for that was never
published; its best pairs overlap by about a half, and near-duplicates taught nothing (specs: 0.1 to 0.95 by default).

Candidates for an anchor (a frame and a camera) are the other cameras at the same instants and the same camera at
others. For clips of T frames the overlap of two clips is the mean over frames of equal place. Of two clips of one
camera no two frames may be near-duplicates, whatever their place: else the answer lies in the reference.

Mined once and kept as columns beside the index, so that drawing a pair reads a few numbers:

    frame_rows        F V  image rows of each frame        anchor            A  frame * V + camera
    frame_scene       F                                    first_candidate   A + 1, into the next two
    clip_frames       F T  frames of the clip it begins    candidate         K  frame * V + camera, cross-camera ones first
    first_in_time     A    the first of an anchor's candidates that is the same camera      overlap  K

Letters beside those of `models`: F frames, K candidates, S samples of a frustum, L greatest lag in frames.
"""

import dataclasses
import functools
import hashlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, Int64
from rich.console import Console
from rich.progress import track

from trainer.config.data import ClipConfig, DrivesData, PairConfig
from trainer.data.columns import write_columns
from trainer.data.frames import NO_ROW, Frames, find_clips, find_frames
from trainer.data.index import Index
from trainer.errors import DataError

log = logging.getLogger(__name__)

PAIR_FORMAT = 1
"""Raised whenever mining or its columns change, so that older pairs are mined again."""

_FRUSTUM_SAMPLES = 512
_NEAREST_M, _FARTHEST_M = 2.0, 40.0
_IN_FRONT_M = 0.1
_PAIRS_AT_ONCE = 512
"""Bounds memory, and keeps one chunk's products in the cache."""


def frustum_points(
    pix_from_cam: Float[np.ndarray, "3 3"], size_px: tuple[int, int], ego_from_cam: Float[np.ndarray, "4 4"]
) -> Float[np.ndarray, "S 3"]:
    """Points in the camera's frame, even in pixels and in log depth, none under the ground."""
    across, down, far = _lattice(_FRUSTUM_SAMPLES).T
    pixels = np.stack([across * size_px[0], down * size_px[1], np.ones_like(across)])
    rays_cam = np.linalg.solve(pix_from_cam, pixels).T
    depth_m = _NEAREST_M * (_FARTHEST_M / _NEAREST_M) ** far
    fall = -(rays_cam @ ego_from_cam[2, :3])
    height_m = ego_from_cam[2, 3]
    ground_m = np.divide(height_m, fall, out=np.full_like(fall, np.inf), where=(fall > 0) & (height_m > 0))
    return rays_cam * np.minimum(depth_m, ground_m)[:, None]


def visible_share(
    points_target: Float[np.ndarray, "S 3"],
    reference_from_target: Float[np.ndarray, "K 4 4"],
    pix_from_reference: Float[np.ndarray, "K 3 3"],
    size_px: Int[np.ndarray, "K 2"],
) -> Float32[np.ndarray, " K"]:
    """Share of the points that each of K reference images shows."""
    pix_from_target = (pix_from_reference @ reference_from_target[:, :3]).astype(np.float32)
    points = np.concatenate([points_target, np.ones_like(points_target[:, :1])], axis=1).T.astype(np.float32)
    shares = np.empty(len(pix_from_target), dtype=np.float32)
    for first in range(0, len(shares), _PAIRS_AT_ONCE):
        chunk = slice(first, first + _PAIRS_AT_ONCE)
        projected = (pix_from_target[chunk].reshape(-1, 4) @ points).reshape(-1, 3, points.shape[1])
        u, v, depth = projected[:, 0], projected[:, 1], projected[:, 2]
        width, height = size_px[chunk, :1].astype(np.float32), size_px[chunk, 1:].astype(np.float32)
        inside = (depth > _IN_FRONT_M) & (u >= 0) & (u < width * depth) & (v >= 0) & (v < height * depth)
        shares[chunk] = inside.mean(-1)
    return shares


def image_overlap(
    index: Index, target_rows: Int[np.ndarray, " K"], reference_rows: Int[np.ndarray, " K"]
) -> Float32[np.ndarray, " K"]:
    """Overlap of each target image with its reference image."""
    reference_from_target = index.cam_from_world(reference_rows) @ index.world_from_cam(target_rows)
    pix_from_reference, size_px = index.pix_from_cam(reference_rows), index.size_px(reference_rows)
    overlap = np.empty(len(target_rows), dtype=np.float32)
    mounts = index.mount(target_rows)
    for mount in np.unique(mounts):
        chosen = np.flatnonzero(mounts == mount)
        first = target_rows[chosen[:1]]
        ((width, height),) = index.size_px(first).tolist()
        points = frustum_points(index.pix_from_cam(first)[0], (width, height), index.ego_from_cam(first)[0])
        overlap[chosen] = visible_share(points, reference_from_target[chosen], pix_from_reference[chosen], size_px[chosen])
    return overlap


def pairs_path(index: Index, config: DrivesData, scenes: Sequence[int]) -> Path:
    """Where the pairs of these scenes under these settings are kept."""
    pairs = config.pairs.model_dump(exclude={"cross_camera_share"})
    kinds = (config.pairs.cross_camera_share > 0, config.pairs.cross_camera_share < 1)
    clip = (config.clip.frames, config.clip.spacing_s)
    key = repr((PAIR_FORMAT, config.cameras, clip, sorted(pairs.items()), kinds, list(scenes)))
    return index.columns.folder / f"pairs-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def mine_pairs(index: Index, config: DrivesData, scenes: Sequence[int], *, split: str) -> Path:
    """Find the pairs of these scenes and write them; returns where. DataError when there are none."""
    began = time.monotonic()
    console = Console(stderr=True)
    shown = track(scenes, f"mining pairs of split {split}", console=console, transient=True, disable=not console.is_terminal)
    mined = [mine_scene(index, scene, config.cameras, config.clip, config.pairs) for scene in shown]
    if not any(len(scene.kept.candidate) for scene in mined):
        raise DataError(_explain_nothing(mined, config, split))
    path = pairs_path(index, config, scenes)
    arrays = _join(mined, scenes, len(config.cameras))
    write_columns(path, arrays, {"figures": _figures(mined, arrays)})
    log.info("mined %d pairs of split %s in %.1f s: %s", len(arrays["candidate"]), split, time.monotonic() - began, path)
    return path


@dataclass(frozen=True)
class Candidates:
    """Second views in one scene; frames and codes count from the scene's first frame."""

    anchor: Int32[np.ndarray, " K"]
    """frame * V + camera of the target."""
    candidate: Int32[np.ndarray, " K"]
    """frame * V + camera of the reference."""
    overlap: Float32[np.ndarray, " K"]
    baseline_m: Float32[np.ndarray, " K"]
    """Between the cameras at the first frame."""
    gap_s: Float32[np.ndarray, " K"]
    is_in_time: Bool[np.ndarray, " K"]
    """Whether it is the same camera at another time."""


@dataclass(frozen=True)
class MinedScene:
    """What one scene gives, and what it did not."""

    frames: Frames
    clips: Int[np.ndarray, "F T"]
    whole_anchors: int
    """Frames and cameras with all images of their clip."""
    kept: Candidates
    excluded: Counter[str]
    """How many candidates each bound turned away; one may fail several."""


def mine_scene(index: Index, scene: int, cameras: Sequence[str], clip: ClipConfig, config: PairConfig) -> MinedScene:
    """All pairs of one scene within the bounds."""
    frames = find_frames(index, scene, cameras)
    clips = find_clips(frames.timestamp_us, clip.frames, clip.spacing_s)
    is_whole = (clips[:, :1] != NO_ROW) & (frames.rows[clips] != NO_ROW).all(1)  # (F, V)
    tally: Counter[str] = Counter()
    parts: list[Candidates] = []
    if config.cross_camera_share > 0:
        for target, reference in itertools.permutations(range(len(cameras)), 2):
            parts.append(_mine_across(index, frames, clips, is_whole, (target, reference), config, tally))
    if config.cross_camera_share < 1:
        reach_s = config.max_gap_s + (clip.frames * clip.spacing_s if clip.frames > 1 else 0)
        for camera in range(len(cameras)):
            history = _follow(index, frames, camera, reach_s, config.min_motion_m)
            parts.append(_mine_in_time(history, clips, is_whole, config, tally))
    return MinedScene(frames, clips, int(is_whole.sum()), _concatenate(parts), tally)


def _mine_across(
    index: Index,
    frames: Frames,
    clips: Int[np.ndarray, "F T"],
    is_whole: Bool[np.ndarray, "F V"],
    cameras: tuple[int, int],
    config: PairConfig,
    tally: Counter[str],
) -> Candidates:
    """The clips of a target camera completed by those of a reference camera at the same instants."""
    V = is_whole.shape[1]
    rows = frames.rows[:, cameras]
    is_there = (rows != NO_ROW).all(-1)
    overlap = np.zeros(len(rows), dtype=np.float32)
    overlap[is_there] = image_overlap(index, rows[is_there, 0], rows[is_there, 1])
    starts = np.flatnonzero(is_whole[:, cameras].all(-1))
    per_frame = overlap[clips[starts]]  # (K, T)
    share = per_frame.mean(-1)
    is_kept = _tell(
        "across cameras",
        tally,
        below_min_overlap=share < config.min_overlap,
        above_max_overlap=per_frame.max(-1) > config.max_overlap,
    )
    kept = starts[is_kept]
    centres = index.world_from_cam(rows[kept])[..., :3, 3]
    return Candidates(
        anchor=(kept * V + cameras[0]).astype(np.int32),
        candidate=(kept * V + cameras[1]).astype(np.int32),
        overlap=share[is_kept],
        baseline_m=np.linalg.norm(centres[:, 0] - centres[:, 1], axis=-1).astype(np.float32),
        gap_s=np.zeros(len(kept), dtype=np.float32),
        is_in_time=np.zeros(len(kept), dtype=bool),
    )


@dataclass(frozen=True)
class _History:
    """One camera through a scene: every frame against those up to L frames before and after it, at column lag + L."""

    camera: int
    timestamp_us: Int64[np.ndarray, " F"]
    overlap: Float32[np.ndarray, "F lags"]
    motion_m: Float32[np.ndarray, "F lags"]

    @property
    def greatest_lag(self) -> int:
        return self.overlap.shape[1] // 2


def _follow(index: Index, frames: Frames, camera: int, reach_s: float, min_motion_m: float) -> _History:
    """Overlap is left at 1 where the camera moved less than `min_motion_m`: such pairs are never kept."""
    timestamp_us, rows = frames.timestamp_us, frames.rows[:, camera]
    here = np.arange(len(rows))
    ahead = np.searchsorted(timestamp_us, timestamp_us + round(reach_s * 1e6), "right") - 1 - here
    greatest_lag = int(ahead.max(initial=0))
    there = here[:, None] + np.arange(-greatest_lag, greatest_lag + 1)
    is_asked = (there >= 0) & (there < len(rows))
    there = np.clip(there, 0, max(len(rows) - 1, 0))
    is_asked &= (rows[:, None] != NO_ROW) & (rows[there] != NO_ROW)
    centres = index.world_from_cam(rows)[:, :3, 3]
    motion_m = np.linalg.norm(centres[there] - centres[:, None], axis=-1).astype(np.float32)
    is_asked &= (motion_m >= min_motion_m) & (there != here[:, None])
    overlap = np.ones(motion_m.shape, dtype=np.float32)
    frame, lag = np.nonzero(is_asked)
    overlap[frame, lag] = image_overlap(index, rows[frame], rows[there[frame, lag]])
    return _History(camera, timestamp_us, overlap, motion_m)


def _mine_in_time(
    history: _History,
    clips: Int[np.ndarray, "F T"],
    is_whole: Bool[np.ndarray, "F V"],
    config: PairConfig,
    tally: Counter[str],
) -> Candidates:
    """The clips of one camera completed by its own earlier and later ones."""
    (F, V), L = is_whole.shape, history.greatest_lag
    target, reference = _all_shifts(np.flatnonzero(is_whole[:, history.camera]), F, L)
    gap_s = np.abs(history.timestamp_us[reference] - history.timestamp_us[target]) / 1e6
    is_candidate = is_whole[reference, history.camera] & (gap_s <= config.max_gap_s)
    target, reference, gap_s = target[is_candidate], reference[is_candidate], gap_s[is_candidate]

    share = history.overlap[clips[target], clips[reference] - clips[target] + L].mean(-1)
    nearest_m = np.full(len(target), np.inf, dtype=np.float32)
    likest = np.zeros(len(target), dtype=np.float32)
    for frame in range(clips.shape[1]):
        lag = clips[reference] - clips[target, frame, None] + L  # (K, T)
        nearest_m = np.minimum(nearest_m, history.motion_m[clips[target, frame, None], lag].min(-1))
        likest = np.maximum(likest, history.overlap[clips[target, frame, None], lag].max(-1))
    moves = nearest_m >= config.min_motion_m
    is_kept = _tell(
        "in time",
        tally,
        below_min_motion_m=~moves,
        below_min_overlap=moves & (share < config.min_overlap),
        above_max_overlap=moves & (likest > config.max_overlap),
    )
    target, reference = target[is_kept], reference[is_kept]
    return Candidates(
        anchor=(target * V + history.camera).astype(np.int32),
        candidate=(reference * V + history.camera).astype(np.int32),
        overlap=share[is_kept],
        baseline_m=history.motion_m[target, reference - target + L],
        gap_s=gap_s[is_kept].astype(np.float32),
        is_in_time=np.ones(len(target), dtype=bool),
    )


def _all_shifts(starts: Int64[np.ndarray, " n"], F: int, L: int) -> tuple[Int64[np.ndarray, " K"], Int64[np.ndarray, " K"]]:
    """Every start with every other frame at most L away."""
    lags = np.array([lag for lag in range(-L, L + 1) if lag != 0], dtype=np.int64)
    target = np.repeat(starts, len(lags))
    reference = target + np.tile(lags, len(starts))
    is_inside = (reference >= 0) & (reference < F)
    return target[is_inside], reference[is_inside]


def _tell(kind: str, tally: Counter[str], **failed: Bool[np.ndarray, " K"]) -> Bool[np.ndarray, " K"]:
    """Which candidates failed in nothing; adds to the tally how many each bound turned away."""
    for bound, is_failed in failed.items():
        tally[f"{kind}: {bound}"] += int(is_failed.sum())
    return ~np.any(list(failed.values()), axis=0)


def _concatenate(parts: Sequence[Candidates]) -> Candidates:
    """One list, ascending by anchor, the cross-camera candidates of each first."""
    joined = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts] or [np.empty(0)])
        for field in dataclasses.fields(Candidates)
    }
    order = np.lexsort((joined["candidate"], joined["is_in_time"], joined["anchor"]))
    return Candidates(**{name: column[order] for name, column in joined.items()})


def _join(mined: Sequence[MinedScene], scenes: Sequence[int], V: int) -> dict[str, np.ndarray]:
    """The columns of all scenes, frames counted through."""
    lengths = [len(scene.clips) for scene in mined]
    first_frame = np.cumsum([0, *lengths])
    shifted = list(zip(mined, first_frame, strict=False))  # the last offset is the end
    anchors = np.concatenate([scene.kept.anchor + first * V for scene, first in shifted])
    candidates = np.concatenate([scene.kept.candidate + first * V for scene, first in shifted])
    clips = [np.where(scene.clips == NO_ROW, NO_ROW, scene.clips + first) for scene, first in shifted]
    is_in_time = np.concatenate([scene.kept.is_in_time for scene in mined])
    anchor, first_candidate = np.unique(anchors, return_index=True)
    across = np.add.reduceat(~is_in_time, first_candidate, dtype=np.int64)
    return {
        "frame_rows": np.concatenate([scene.frames.rows for scene in mined]),
        "frame_scene": np.repeat(np.array(scenes, dtype=np.int32), lengths),
        "clip_frames": np.concatenate(clips).astype(np.int32),
        "anchor": anchor.astype(np.int32),
        "first_candidate": np.append(first_candidate, len(candidates)).astype(np.int64),
        "first_in_time": first_candidate + across,
        "candidate": candidates.astype(np.int32),
        "overlap": np.concatenate([scene.kept.overlap for scene in mined]).astype(np.float16),
    }


def _figures(mined: Sequence[MinedScene], arrays: dict[str, np.ndarray]) -> dict[str, float | int]:
    is_in_time = np.concatenate([scene.kept.is_in_time for scene in mined])
    baseline_m = np.concatenate([scene.kept.baseline_m for scene in mined])
    gap_s = np.concatenate([scene.kept.gap_s[scene.kept.is_in_time] for scene in mined])
    whole = sum(scene.whole_anchors for scene in mined)
    quantiles = np.quantile(arrays["overlap"].astype(np.float32), (0.05, 0.5, 0.95))
    return {
        "scenes": len(mined),
        "clips": whole,
        "clips_without_pair": whole - len(arrays["anchor"]),
        "pairs_across_cameras": int((~is_in_time).sum()),
        "pairs_in_time": int(is_in_time.sum()),
        **{f"overlap_p{percent}": round(float(value), 4) for percent, value in zip((5, 50, 95), quantiles, strict=True)},
        "mean_baseline_m": round(float(baseline_m.mean()), 4),
        "mean_gap_s": round(float(gap_s.mean()), 4) if len(gap_s) else 0.0,
    }


def _explain_nothing(mined: Sequence[MinedScene], config: DrivesData, split: str) -> str:
    """Why a split has no pairs, and what to change."""
    asked = f"pairs of clips of {config.clip.frames} frames {config.clip.spacing_s:g} s apart were asked of split {split}"
    if not any((scene.clips != NO_ROW).any() for scene in mined):
        longest_s = max((np.ptp(scene.frames.timestamp_us) / 1e6 for scene in mined if len(scene.clips)), default=0.0)
        return (
            f"{asked} and its longest scene lasts {longest_s:.2f} s or its images of {config.cameras[0]} stand further apart; "
            "lower data.clip.frames or data.clip.spacing_s, or take longer scenes"
        )
    whole = sum(scene.whole_anchors for scene in mined)
    if not whole:
        return (
            f"{asked} and no clip has images of one camera at all its frames, which are those of {config.cameras[0]}; "
            "check that data.cameras belong to one rig, or lower data.clip.frames"
        )
    tally = sum((scene.excluded for scene in mined), Counter())
    turned_away = ", ".join(f"{count} {bound}" for bound, count in tally.items()) or "none: there is no second view at all"
    return (
        f"{asked} and none of its {whole} clips has a second view within data.pairs (turned away: {turned_away}); "
        "widen the bound that turns most away, or take more data.cameras or longer scenes"
    )


@functools.cache
def _lattice(samples: int) -> Float[np.ndarray, "S 3"]:
    """Points spread evenly over the unit cube: multiples of powers of 1 / g, g^4 = g + 1 (Roberts 2018)."""
    g = 1.2207440846057596
    return (0.5 + np.arange(1, samples + 1)[:, None] / g ** np.arange(1, 4)) % 1
