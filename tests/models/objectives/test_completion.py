"""Tokens of pixels, there and back."""

import torch

from models.objectives.completion import patchify, unpatchify
from tests.models.samples import PATCH_PX, VIDEO_ENCODER, VIDEO_GRID, random_images

FRAMES = VIDEO_GRID.t * VIDEO_ENCODER.tubelet_frames


def test_a_token_lists_frame_row_column_channel() -> None:
    images = random_images(VIDEO_GRID, batch=1, tubelet_frames=2)
    tokens = patchify(images, VIDEO_GRID)
    t, y, x = 1, 1, 2
    frame, row, column, channel = 1, 2, 3, 1
    value = ((frame * PATCH_PX + row) * PATCH_PX + column) * 3 + channel
    token = (t * VIDEO_GRID.h + y) * VIDEO_GRID.w + x
    pixel = images[0, 2 * t + frame, 0, channel, PATCH_PX * y + row, PATCH_PX * x + column]
    assert tokens[0, token, value] == pixel
    assert torch.equal(unpatchify(tokens, VIDEO_GRID, FRAMES), images)
