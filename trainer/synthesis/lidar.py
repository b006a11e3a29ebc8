"""A LiDAR sweep by ray casting: all beams all around, all fired at the time stamp of the sweep.

A real scanner turns while the car drives, and nuScenes stores sweeps with that motion taken out; firing all beams at once gives
what it stores, but for things that move during the turn.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float, Int

from trainer.synthesis.boxes import Boxes
from trainer.synthesis.camera import distance_to_ground
from trainer.synthesis.pose import multiply
from trainer.synthesis.rig import Lidar

_LOWEST_M = 0.9


@dataclass(frozen=True)
class Sweep:
    """Points in the frame of the LiDAR."""

    points: Float[np.ndarray, "P 5"]
    """x, y, z in metres, intensity, ring: nuScenes' .pcd.bin."""
    thing: Int[np.ndarray, " P"]
    """What each point lies on; -1 for nothing that is annotated."""


def scan(lidar: Lidar, world_from_ego: Float[np.ndarray, "4 4"], boxes: Boxes, rng: np.random.Generator) -> Sweep:
    """One sweep of the world as it is at this instant."""
    world_from_lidar = world_from_ego @ lidar.ego_from_sensor
    directions = multiply(_directions(lidar), world_from_lidar[:3, :3].T)
    origin = world_from_lidar[:3, 3]
    distance = distance_to_ground(origin, directions)
    box = np.full(len(directions), -1)
    for row, rays in _rays_near(lidar, world_from_lidar, boxes):
        entered = boxes.cast(row, origin, directions[rays])
        nearer = entered < distance[rays]
        distance[rays[nearer]] = entered[nearer]
        box[rays[nearer]] = row
    returned = np.flatnonzero((distance > _LOWEST_M) & (distance < lidar.range_m))
    returned = returned[rng.random(len(returned)) > 0.03]  # some beams do not come back
    measured = distance[returned]
    local = _directions(lidar)[returned] * measured[:, None]
    ring = returned // lidar.columns
    bright = np.where(box[returned] >= 0, boxes.colour[np.clip(box[returned], 0, None)].mean(axis=1), 0.25)
    intensity = np.clip(255 * bright * np.exp(-measured / 60), 1, 255)
    points = np.column_stack([local, np.round(intensity), ring])
    thing = np.where(box[returned] >= 0, boxes.thing[np.clip(box[returned], 0, None)], -1)
    return Sweep(points, thing)


@cache
def _directions(lidar: Lidar) -> Float[np.ndarray, "n 3"]:
    """Unit vectors in the LiDAR frame, ring by ring."""
    azimuth = np.linspace(-np.pi, np.pi, lidar.columns, endpoint=False)
    elevation = np.deg2rad(np.linspace(*lidar.elevation_deg, lidar.beams))
    elevation, azimuth = np.meshgrid(elevation, azimuth, indexing="ij")
    flat = np.cos(elevation)
    return np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)], axis=-1).reshape(-1, 3)


def _rays_near(lidar: Lidar, world_from_lidar: Float[np.ndarray, "4 4"], boxes: Boxes) -> list[tuple[int, Int[np.ndarray, " m"]]]:
    """For each box in range, the rays whose azimuth its corners span."""
    corners = multiply(boxes.corners_m() - world_from_lidar[:3, 3], world_from_lidar[:3, :3])  # (K, 8, 3)
    is_near = np.linalg.norm(corners[..., :2], axis=-1).min(axis=1) < lidar.range_m
    flat = np.arange(lidar.beams * lidar.columns).reshape(lidar.beams, lidar.columns)
    found = []
    for row in np.flatnonzero(is_near):
        azimuth = np.arctan2(corners[row, :, 1], corners[row, :, 0])
        middle = np.arctan2(np.sin(azimuth).mean(), np.cos(azimuth).mean())
        spread = (azimuth - middle + np.pi) % (2 * np.pi) - np.pi
        first, last = (np.array([spread.min(), spread.max()]) + middle + np.pi) / (2 * np.pi) * lidar.columns
        if last - first > lidar.columns * 0.45:  # around the car or very close: no interval is safe
            first, last = 0, lidar.columns - 1
        columns = np.arange(int(np.floor(first)) - 1, int(np.ceil(last)) + 2) % lidar.columns
        found.append((int(row), flat[:, np.unique(columns)].reshape(-1)))
    return found
