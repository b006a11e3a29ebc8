"""The temporal decoder: which frames it reads, where it looks in them, and that time is seconds and not a place in a list."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.geometry import VoxelGrid
from models.temporal import DeformableAttention, Frames, Rebuilt, TemporalDecoder, TemporalShape, embed_offsets, nearest_frames

GRID = VoxelGrid((-8.0, -6.0, -1.0), (8.0, 6.0, 3.0), (8, 6, 2))
SHAPE = TemporalShape(short_width=16, short_heads=4, long_width=8, long_heads=2, layers=2, places=4)
CHANNELS = 4
OFFSETS_S = torch.tensor([[-1.0, -0.5, 0.5], [-0.5, 0.5, 1.0]])
ALL = torch.ones(2, 3, dtype=torch.bool)


@pytest.fixture
def decoder() -> TemporalDecoder:
    """Whose places, too, depend on the query and on time, as they do once trained."""
    torch.manual_seed(0)
    decoder = TemporalDecoder(CHANNELS, GRID, SHAPE)
    for module in decoder.modules():
        if isinstance(module, DeformableAttention):
            nn.init.normal_(module.look.weight, std=0.2)
    return decoder


def random_context(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, CHANNELS, *GRID.zyx, generator=torch.Generator().manual_seed(seed))


def test_a_volume_comes_out_as_one_went_in(decoder: TemporalDecoder) -> None:
    rebuilt: Rebuilt = decoder(random_context(), OFFSETS_S, ALL)
    assert rebuilt.volume.shape == (2, CHANNELS, *GRID.zyx)
    assert rebuilt.flow_m.shape == (2, 3, 6, 8, 2) and not rebuilt.flow_m.requires_grad


def test_attention_is_the_weighted_mean_of_grid_samples() -> None:
    torch.manual_seed(0)
    attention = DeformableAttention(16, 4, 3)
    nn.init.normal_(attention.look.weight, std=0.3)
    B, Q, Y, X, A, K = 2, 3, 5, 6, 4, 3
    queries, maps = torch.randn(B * Y * X, 16), torch.randn(B, Q, Y, X, 16)
    share = torch.tensor([[0.5, 0.0, 0.5], [1 / 3, 1 / 3, 1 / 3]])
    found, _ = attention(queries, Frames(maps, OFFSETS_S, share))
    learned = attention.look(queries).view(B, Y, X, A, K, 2, 3)
    value = attention.value(maps).unflatten(-1, (A, 4))  # (B, Q, Y, X, A, D)
    y, x = torch.meshgrid(torch.arange(Y) + 0.5, torch.arange(X) + 0.5, indexing="ij")
    expected = torch.zeros(B, Y, X, A, 4)
    for clip in range(B):
        for frame in range(Q):
            at = learned[clip, ..., 0, :] + OFFSETS_S[clip, frame] * learned[clip, ..., 1, :]  # (Y, X, A, K, 3)
            weight = at[..., 2].softmax(-1) * share[clip, frame]
            for head in range(A):
                places = torch.stack([x[..., None] + at[:, :, head, :, 1], y[..., None] + at[:, :, head, :, 0]], -1)
                places = 2 * places / torch.tensor([X, Y]) - 1  # (Y, X, K, 2)
                source = value[clip, frame, ..., head, :].permute(2, 0, 1)[None]
                sampled = F.grid_sample(source, places.view(1, Y * X, K, 2), align_corners=False)
                sampled = sampled.view(4, Y, X, K)
                expected[clip, :, :, head] += (sampled * weight[:, :, head]).sum(-1).permute(1, 2, 0)
    torch.testing.assert_close(found, attention.proj(expected.view(-1, 16)), atol=1e-5, rtol=1e-4)


def test_places_start_as_a_ring_that_does_not_move() -> None:
    attention = DeformableAttention(16, 4, 3)
    look = attention.look(torch.randn(1, 16)).view(4, 3, 2, 3)
    steps = torch.tensor([[0.0, 1], [1, 0], [0, -1], [-1, 0]])  # (y, x) of four heads
    expected = steps[:, None] * torch.arange(1, 4)[:, None]
    torch.testing.assert_close(look[:, :, 0, :2], expected, atol=1e-6, rtol=0)
    assert not look[:, :, 1].any() and not look[:, :, 0, 2].any()


def test_a_clip_is_rebuilt_as_if_it_were_alone(decoder: TemporalDecoder) -> None:
    context = random_context()
    together = decoder(context, OFFSETS_S, ALL)
    for clip in range(2):
        alone = decoder(*(part[clip : clip + 1] for part in (context, OFFSETS_S, ALL)))
        torch.testing.assert_close(together.volume[clip], alone.volume[0], atol=1e-5, rtol=1e-4)


def test_an_absent_frame_changes_nothing_whatever_it_holds(decoder: TemporalDecoder) -> None:
    context, offsets_s = random_context(), OFFSETS_S.clone()
    without = decoder(context[:, :2], offsets_s[:, :2], ALL[:, :2]).volume
    present = torch.tensor([[True, True, False]] * 2)
    for seed, offset_s in ((0, 0.1), (1, 0.0), (2, -3.0), (3, torch.nan)):
        offsets_s[:, 2] = offset_s
        context[:, 2] = 100 * random_context(seed)[:, 2]
        torch.testing.assert_close(decoder(context, offsets_s, present).volume, without, atol=1e-5, rtol=1e-5)


def test_the_order_of_frames_does_not_matter_but_their_time_does(decoder: TemporalDecoder) -> None:
    context, order = random_context(), torch.tensor([2, 0, 1])
    volume = decoder(context, OFFSETS_S, ALL).volume
    shuffled = decoder(context[:, order], OFFSETS_S[:, order], ALL).volume
    torch.testing.assert_close(shuffled, volume, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(decoder(context, -OFFSETS_S, ALL).volume, volume, atol=1e-3)


def test_with_no_frame_at_all_volume_and_gradients_are_finite(decoder: TemporalDecoder) -> None:
    rebuilt = decoder(random_context(), OFFSETS_S, ~ALL)
    rebuilt.volume.square().sum().backward()
    assert rebuilt.volume.isfinite().all() and rebuilt.flow_m.isfinite().all()
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    other = decoder(random_context(1), OFFSETS_S, ~ALL)
    torch.testing.assert_close(other.volume, rebuilt.volume)


def test_all_parameters_learn(decoder: TemporalDecoder) -> None:
    weights = torch.randn(2, CHANNELS, *GRID.zyx)
    (decoder(random_context(), OFFSETS_S, ALL).volume * weights).sum().backward()
    assert not [name for name, parameter in decoder.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not [name for name, parameter in decoder.named_parameters() if parameter.ndim == 0]


def test_the_nearest_frames_come_first_and_absent_ones_last() -> None:
    offsets_s = torch.tensor([[1.5, -0.5, 0.5, 0.1]])
    assert nearest_frames(offsets_s, torch.tensor([[True, True, True, False]]), 2).tolist() == [[1, 2]]
    assert nearest_frames(offsets_s, torch.tensor([[True, False, False, False]]), 2).tolist() == [[0, 1]]
    assert nearest_frames(offsets_s[:, :1], torch.tensor([[True]]), 2).tolist() == [[0]]


def test_before_and_after_are_different_times() -> None:
    before, after = embed_offsets(torch.tensor([[-0.5, 0.5]]))[0]
    half = len(before) // 2
    torch.testing.assert_close(before[:half], -after[:half])
    torch.testing.assert_close(before[half:], after[half:])
    assert after[3].item() == pytest.approx(math.sin(2 * math.pi * 0.5 / 0.8), abs=1e-5)


def test_flow_is_velocity_times_seconds_in_metres(decoder: TemporalDecoder) -> None:
    velocity_cells = torch.tensor([0.5, -1.5])  # (y, x) a second
    for layer in decoder.long.layers:
        look = layer.attn.look
        nn.init.zeros_(look.weight)
        with torch.no_grad():
            look.bias.zero_().view(2, 4, 2, 3)[:, :, 1, :2] = velocity_cells
    flow_m = decoder(random_context(), OFFSETS_S, ALL).flow_m  # cells are 2 x 2 m
    expected = OFFSETS_S[..., None] * torch.tensor([-3.0, 1.0])
    torch.testing.assert_close(flow_m, expected[:, :, None, None].expand_as(flow_m))


def test_under_autocast_it_stays_near_float32(decoder: TemporalDecoder) -> None:
    expected = decoder(random_context(), OFFSETS_S, ALL).volume
    with torch.autocast("cpu", torch.bfloat16):
        volume = decoder(random_context(), OFFSETS_S, ALL).volume
    assert volume.dtype == torch.float32
    assert (volume - expected).abs().mean() < 0.05
