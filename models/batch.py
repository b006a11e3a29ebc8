"""The nouns that cross the border between trainer and models: Batch goes in, Losses come out.

A Batch holds what the source gave (`shared`, read by any objective) and what each objective prepared for itself in the
loader's workers (`prepared`). Losses is a named tuple because FSDP2 and DDP look for tensors inside what a forward
returns, and they look into tuples and dicts, not into classes of ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B samples of one micro-batch.

    `shared` is what objectives keep of what the source offers. A sample has, of pairs:
        target_images, reference_images             uint8    T 1 3 H W, as read: colours change on the device, by
        target_colours, reference_colours            float32  3, factors of brightness, contrast and saturation; 1 leaves them
        target_pix_from_cam, reference_pix_from_cam  float32  T 1 3 3
        reference_from_target                        float32  4 4, of the first frames
        scene                                        int64    equal numbers are the same scene
    and of surround clips:
        images                                       uint8    T V 3 H W, as read
        images_colours                               float32  3, of the whole clip, as above
        pix_from_ego                                 float32  T V 3 4, of the car as it stood when the frame's first camera fired
        first_from_ego                               float32  T 4 4, of that car to that of the first frame
        elapsed_s                                    float32  T, since the first frame
        points_lidar                                 float32  P 4, the sweeps of all frames: x, y, z in metres and intensity to 1
        first_point                                  int64    T + 1, where each frame's points begin; a frame may have none
        ego_from_lidar                               float32  T 4 4, through the motion between sweep and frame; 0 without a sweep
        pix_from_lidar                               float32  T V 3 4, through ego motion, intrinsics and window
      where frames are annotated, of all of them, in the ego frame of each (that of pix_from_ego):
        boxes_ego                                    float32  n 9: x y z of the centre, length width height, yaw, vx vy in m/s or NaN
        first_box                                    int64    T + 1, where each frame's boxes begin
        box_class                                    int64    n, row of nuScenes' ten detection classes (trainer.data.boxes), or -1
        box_is_vehicle                               bool     n, of a category vehicle.*, which some of no class are
        box_points                                   int64    n, LiDAR and radar points inside
      and as nuScenes scores detection, in the level frame (trainer.data.level_boxes):
        level_boxes                                  float32  n 12: the nine numbers of boxes_ego, class (10 is a bicycle rack), attribute,
                                                              points; -1 where a box is of no class or has no attribute
        first_level_box                              int64    T + 1, where each frame's boxes begin
        level_from_ego                               float32  T 4 4, of the car as it stood when the frame's first camera fired
        world_from_level                             float64  T 4 4
        sample_token                                 uint8    T 32, the letters of its token in nuScenes
      and where there is a map:
        drivable_edges                               float32  n 2 2, (x, y) to (x, y) around the drivable area, holes the other way
        first_edge                                   int64    T + 1, where each frame's edges begin
        line_points                                  float32  n 2, (x, y) along lines within 60 m x 30 m around the car
        first_line_point                             int64    lines + 1, where each line begins
        line_class                                   int64    lines, divider, crossing or boundary
        first_line                                   int64    T + 1, where each frame's lines begin
    and of consecutive images of one camera:
        consecutive_images                           uint8    2 1 3 H W, an image and the camera's next one, through one window
        consecutive_colours                          float32  3, of both, as above
        flow_px                                      float32  H W 2, right and down, to where what is seen stands in the next; or NaN
    `prepared[name]` is what objective `name` made of it, as its Preparation says.
    `clips` names each sample for logs and pictures, `replaced` says which clips could not be read, and why; `reading` counts what
    bringing them took, by name.
    """

    shared: Mapping[str, Tensor]
    prepared: Mapping[str, Mapping[str, Tensor]]
    clips: tuple[str, ...]
    replaced: tuple[str, ...] = ()
    reading: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.clips)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; copies overlap with compute where the memory is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch where a GPU copies from while others work."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        shared = {name: change(tensor) for name, tensor in self.shared.items()}
        prepared = {
            objective: {name: change(tensor) for name, tensor in tensors.items()} for objective, tensors in self.prepared.items()
        }
        return replace(self, shared=shared, prepared=prepared)


class Losses(NamedTuple):
    """What a forward returns: the scalar to descend, and what else is worth a curve."""

    total: Tensor
    """Scalar: the weighted sum over objectives, mean over the samples of the batch."""
    parts: dict[str, Tensor]
    """Scalars by name `objective/part`, detached, each a mean over the samples of the batch."""
