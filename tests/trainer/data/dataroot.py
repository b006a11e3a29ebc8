"""A small nuScenes dataroot made by hand: two scenes, three cameras with a known view, a LiDAR, and a car that moves.

Camera images are ramps: red grows with u, green with v, so a pixel says where in the source it came from.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Tables = dict[str, list[dict[str, Any]]]

WIDTH, HEIGHT = 64, 36
FOCAL = 32.0  # 90 degrees across
YAWS = {"CAM_FRONT": 0.0, "CAM_FRONT_LEFT": math.pi / 4, "CAM_BACK": math.pi}
TRIGGER_US = {"CAM_FRONT": 0, "CAM_FRONT_LEFT": 20_000, "CAM_BACK": -20_000, "LIDAR_TOP": 5_000}
PERIOD_US = 250_000
FRAMES = 16
SPEED_M_S = {"scene-0001": 3.0, "scene-0002": 2.0}
VERSION = "v1.0-mini"
SWEEP = ((10.0, 1.0, 0.5, 255.0, 3.0), (5.0, -2.0, 0.25, 51.0, 1.0), (float("nan"), 0.0, 0.0, 0.0, 0.0))
"""The points of every sweep: x, y, z, intensity, ring."""


def make_tables(frames: int = FRAMES) -> Tables:
    """All 13 tables; every second frame is a key frame."""
    names = ("attribute", "category", "instance", "sample_annotation", "visibility")
    tables: Tables = {name: [] for name in names}
    tables["log"] = [{"token": "log", "logfile": "n000", "vehicle": "n0", "date_captured": "2026-01-01", "location": "here"}]
    tables["map"] = [{"token": "map", "log_tokens": ["log"], "category": "semantic_prior", "filename": "maps/mask.png"}]
    tables["sensor"] = [
        {"token": f"sensor {channel}", "channel": channel, "modality": "lidar" if channel == "LIDAR_TOP" else "camera"}
        for channel in TRIGGER_US
    ]
    tables["calibrated_sensor"] = [make_mount(channel) for channel in TRIGGER_US]
    for name in ("scene", "sample", "sample_data", "ego_pose"):
        tables[name] = []
    for number, scene in enumerate(SPEED_M_S):
        add_scene(tables, scene, begin_us=1_500_000_000_000_000 + number * 60_000_000, frames=frames)
    return tables


def make_mount(channel: str) -> dict[str, Any]:
    """Cameras at 1.5 m, x right and z into the picture; their quaternion is yaw about z times the camera's axes."""
    if channel == "LIDAR_TOP":
        rotation, intrinsic = [1.0, 0.0, 0.0, 0.0], []
    else:
        half = YAWS[channel] / 2
        rotation = multiply((math.cos(half), 0, 0, math.sin(half)), (0.5, -0.5, 0.5, -0.5))
        intrinsic = [[FOCAL, 0.0, WIDTH / 2], [0.0, FOCAL, HEIGHT / 2], [0.0, 0.0, 1.0]]
    return {
        "token": f"mount {channel}",
        "sensor_token": f"sensor {channel}",
        "translation": [1.0, 0.25, 1.5],
        "rotation": rotation,
        "camera_intrinsic": intrinsic,
    }


def add_scene(tables: Tables, scene: str, *, begin_us: int, frames: int) -> None:
    """The car drives ahead at constant speed and turns left by 0.1 rad a second."""
    samples = [f"{scene} sample {number}" for number in range((frames + 1) // 2)]
    tables["scene"].append(
        {
            "token": scene,
            "name": scene,
            "log_token": "log",
            "nbr_samples": len(samples),
            "first_sample_token": samples[0],
            "last_sample_token": samples[-1],
            "description": "",
        }
    )
    for number, token in enumerate(samples):
        timestamp_us = begin_us + 2 * number * PERIOD_US
        tables["sample"].append({"token": token, "timestamp": timestamp_us, "scene_token": scene, "prev": "", "next": ""})
    for frame in range(frames):
        for channel, trigger_us in TRIGGER_US.items():
            timestamp_us = begin_us + frame * PERIOD_US + trigger_us
            token, is_camera = f"{scene} {channel} {frame:03d}", channel != "LIDAR_TOP"
            elapsed_s = (timestamp_us - begin_us) / 1e6
            half_yaw = 0.05 * elapsed_s
            tables["ego_pose"].append(
                {
                    "token": token,
                    "timestamp": timestamp_us,
                    "translation": [600.0 + SPEED_M_S[scene] * elapsed_s, 1600.0, 0.0],
                    "rotation": [math.cos(half_yaw), 0.0, 0.0, math.sin(half_yaw)],
                }
            )
            tables["sample_data"].append(
                {
                    "token": token,
                    "sample_token": samples[frame // 2],
                    "ego_pose_token": token,
                    "calibrated_sensor_token": f"mount {channel}",
                    "timestamp": timestamp_us,
                    "fileformat": "jpg" if is_camera else "pcd",
                    "is_key_frame": frame % 2 == 0,
                    "width": WIDTH if is_camera else 0,
                    "height": HEIGHT if is_camera else 0,
                    "filename": f"samples/{channel}/{scene}_{frame:03d}.{'jpg' if is_camera else 'pcd.bin'}",
                    "prev": "",
                    "next": "",
                }
            )


def write_dataroot(root: Path, tables: Tables, splits: dict[str, list[str]] | None = None) -> Path:
    """Write tables, images and what else the devkit opens; returns `root`."""
    folder = root / VERSION
    folder.mkdir(parents=True)
    for name, records in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    if splits is not None:
        (folder / "splits.json").write_text(json.dumps(splits))
    (root / "maps").mkdir()
    Image.new("L", (4, 4)).save(root / "maps" / "mask.png")
    picture = Image.fromarray(ramp(WIDTH, HEIGHT))
    for record in tables["sample_data"]:
        path = root / record.get("filename", "samples/unnamed.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        if record["fileformat"] == "jpg":
            picture.save(path, quality=98, subsampling=0)
        else:
            path.write_bytes(np.array(SWEEP, dtype="<f4").tobytes())
    return root


def ramp(width: int, height: int) -> np.ndarray:
    """Red says u, green says v, from 40 at the left or top edge to 215 at the other; blue stays."""
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    colours = np.stack([40 + 175 * u / width, 40 + 175 * v / height, np.full_like(u, 128)], axis=-1)
    return np.round(colours).astype(np.uint8)


def read_ramp(colours: np.ndarray, width: int, height: int) -> np.ndarray:
    """Source pixels (u, v) from colours of a ramp."""
    return (colours[..., :2].astype(float) - 40) / 175 * (width, height)


def multiply(left: tuple[float, ...], right: tuple[float, ...]) -> list[float]:
    """Hamilton's product of quaternions (w, x, y, z)."""
    w, x, y, z = left
    a, b, c, d = right
    return [
        w * a - x * b - y * c - z * d,
        w * b + x * a + y * d - z * c,
        w * c - x * d + y * a + z * b,
        w * d + x * c - y * b + z * a,
    ]
