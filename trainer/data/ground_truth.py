"""What nuScenes tables have no place for: dense depth, flow and thing numbers of every image, beside the dataroot.

`ground_truth/CHANNEL/NAME.npz` belongs to the image of the same name:
    depth_cm          uint16  H W    distance along the optical axis in centimetres; 0 where there is none (sky, beyond 655 m)
    flow_px           float16 H W 2  to where what is seen stands when the camera's next image is due; NaN behind the camera
    backward_flow_px  float16 H W 2  the same when its image before was due
    thing             uint16  H W    1 + number of the annotated thing, 0 for everything else
`ground_truth/SCENE.json` lists the instance tokens by number.
"""

from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float16, Float32, Int

GROUND_TRUTH = "ground_truth"
"""The folder beside the tables."""
_DEPTH_LIMIT_M = 655.0


class GroundTruth(NamedTuple):
    """Dense truth of one image."""

    depth_m: Float[np.ndarray, "H W"]
    """Infinite where nothing is near enough to measure."""
    flow_px: Float[np.ndarray, "H W 2"]
    """To the next image."""
    backward_flow_px: Float[np.ndarray, "H W 2"]
    """To the image before."""
    thing: Int[np.ndarray, "H W"]
    """-1 where there is no annotated thing."""


def ground_truth_path(dataroot: Path, image: str) -> Path:
    """Where the truth of the image `image`, a filename of sample_data, lies."""
    name = PurePosixPath(image)
    return dataroot / GROUND_TRUTH / name.parent.name / f"{name.stem}.npz"


def save_ground_truth(dataroot: Path, image: str, truth: GroundTruth) -> None:
    """Write it, rounded to what the formats above hold."""
    path = ground_truth_path(dataroot, image)
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = truth.depth_m < _DEPTH_LIMIT_M
    np.savez_compressed(
        path,
        depth_cm=np.round(np.where(measured, truth.depth_m, 0) * 100).astype(np.uint16),
        flow_px=_round_flow(truth.flow_px),
        backward_flow_px=_round_flow(truth.backward_flow_px),
        thing=(truth.thing + 1).astype(np.uint16),
    )


def _round_flow(flow_px: Float[np.ndarray, "H W 2"]) -> Float16[np.ndarray, "H W 2"]:
    return np.clip(flow_px, -60000, 60000).astype(np.float16)


def load_flow(dataroot: Path, image: str, way: Literal["flow_px", "backward_flow_px"]) -> Float32[np.ndarray, "H W 2"]:
    """One flow of `image`, without the rest of its truth being unpacked."""
    with ground_truth_path(dataroot, image).open("rb") as file, np.load(file) as stored:
        return stored[way].astype(np.float32)


def load_ground_truth(dataroot: Path, image: str) -> GroundTruth:
    """The truth of `image`, a filename of sample_data."""
    with ground_truth_path(dataroot, image).open("rb") as file, np.load(file) as stored:
        depth_m = stored["depth_cm"].astype(np.float32) / 100
        return GroundTruth(
            depth_m=np.where(depth_m > 0, depth_m, np.inf).astype(np.float32),
            flow_px=stored["flow_px"].astype(np.float32),
            backward_flow_px=stored["backward_flow_px"].astype(np.float32),
            thing=stored["thing"].astype(np.int64) - 1,
        )
