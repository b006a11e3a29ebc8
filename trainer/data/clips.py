"""Reading clips: from rows of the index to pixels with their intrinsics and poses."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int, UInt8

from trainer.data.decode import decode_window, split_colours
from trainer.data.index import Index
from trainer.data.source import Clip
from trainer.data.transforms import Window, move_intrinsics, place_window


def _new_room(shape: tuple[int, ...]) -> UInt8[np.ndarray, "..."]:
    return np.empty(shape, dtype=np.uint8)


def read_clip(
    index: Index,
    rows: Int[np.ndarray, "T V"],
    out_size_px: tuple[int, int],
    *,
    windows: Sequence[Window] | None = None,
    room: Callable[[tuple[int, ...]], UInt8[np.ndarray, "..."]] = _new_room,
) -> Clip:
    """The images at `rows`, each view through its window; without windows the largest centred ones of that size. `room` gives memory
    for pixels.

    ClipError where an image cannot be read.
    """
    T, V = rows.shape
    name = name_clip(index, rows)
    sizes = index.size_px(rows)
    if windows is None:
        windows = [place_window(tuple(sizes[0, view].tolist()), out_size_px) for view in range(V)]
    files = iter(index.files.read_images(rows.reshape(-1), clip=name))
    images = room((T, V, 3, out_size_px[1], out_size_px[0]))
    for frame, view in np.ndindex(T, V):
        pixels = decode_window(
            next(files),
            windows[view],
            size_px=tuple(sizes[frame, view].tolist()),
            clip=name,
            file=index.files.name_image(int(rows[frame, view])),
        )
        split_colours(pixels, images[frame, view])
    pix_from_cam = index.pix_from_cam(rows)
    moved = [move_intrinsics(pix_from_cam[:, view], window) for view, window in enumerate(windows)]
    return Clip(
        name=name,
        images=images,
        pix_from_cam=np.stack(moved, axis=1),
        ego_from_cam=index.ego_from_cam(rows),
        world_from_ego=index.world_from_ego(rows),
        timestamp_us=index.timestamp_us(rows),
    )


def name_clip(index: Index, rows: Int[np.ndarray, "T V"]) -> str:
    """Scene, time of the first image and cameras, as `scene-0061 1532402927612460 CAM_FRONT`."""
    first = rows[0]
    scene = index.scenes[index.columns["image_scene"][first[0]]]
    cameras = "+".join(index.cameras[camera] for camera in index.columns["image_camera"][first])
    return f"{scene} {index.timestamp_us(first)[0]} {cameras}"
