"""The video ViT: sizes, embedding, packing, positions."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.config import DECODER_SHAPES, ENCODER_SHAPES, CrocoConfig, EncoderConfig, Grid, TransformerShape
from models.encoder import ClipGroup, TubeletEmbed, VideoEncoder, build_encoder
from models.positions import LearnedTable
from models.pretraining import build_model
from tests.models.samples import PATCH_PX, SMALL, random_images

VISIBLE = torch.tensor([[0, 3, 7], [1, 2, 11]])
GRID = Grid(2, 1, 2, 3)


def small_encoder(
    *, tubelet_frames: int = 2, positions: str = "rope", has_time: bool = True, drop_path: float = 0.0, registers: int = 0
) -> VideoEncoder:
    torch.manual_seed(0)
    return VideoEncoder(
        SMALL,
        patch_px=PATCH_PX,
        tubelet_frames=tubelet_frames,
        positions=LearnedTable(GRID, SMALL.width) if positions == "learned" else positions,
        has_time=has_time,
        registers=registers,
        drop_path=drop_path,
    )


def block_parameters(shape: TransformerShape) -> int:
    """Two norms, qkv and projection, two layers of the MLP, all with biases."""
    C, M = shape.width, shape.hidden
    return 2 * 2 * C + (C * 3 * C + 3 * C) + (C * C + C) + (C * M + M) + (M * C + C)


def decoder_block_parameters(shape: TransformerShape) -> int:
    """Two norms and four projections more than a block."""
    C = shape.width
    return block_parameters(shape) + 2 * 2 * C + 4 * (C * C + C)


def encoder_parameters(shape: TransformerShape, patch_values: int) -> int:
    return shape.depth * block_parameters(shape) + patch_values * shape.width + shape.width + 2 * shape.width


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("size", ENCODER_SHAPES)
@pytest.mark.parametrize("tubelet_frames", [1, 2])
def test_an_encoder_has_the_parameters_of_its_size(size: str, tubelet_frames: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(size=size, tubelet_frames=tubelet_frames), Grid(1, 1, 14, 14))
    assert count(encoder) == encoder_parameters(ENCODER_SHAPES[size], 3 * tubelet_frames * 16 * 16)


@pytest.mark.parametrize(
    ("size", "millions"),
    # DeiT tiny and small, ViT huge: whole classifiers. Giant and gigantic: Zhai et al. 2022, table 2.
    [("tiny", 5.5), ("small", 21.7), ("base", 85.65), ("large", 303.1), ("huge", 631), ("giant", 1011), ("gigantic", 1843)],
)
def test_sizes_are_those_of_the_literature(size: str, millions: float) -> None:
    assert encoder_parameters(ENCODER_SHAPES[size], 3 * 16 * 16) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    ("encoder", "decoder", "millions"),
    [("base", "small", (85.65, 34.04, 0.39)), ("base", "base", (85.65, 114.03, 0.59)), ("large", "base", (303.10, 114.23, 0.59))],
)
def test_croco_has_the_published_parameters(encoder: str, decoder: str, millions: tuple[float, ...]) -> None:
    with torch.device("meta"):
        model = build_model(EncoderConfig(size=encoder), [CrocoConfig(decoder=decoder)], Grid(1, 1, 14, 14))
    completion = model.objectives["croco"].decoder
    head = count(completion.head)
    found = (count(model.encoder), count(completion) - head, head)
    assert [round(n / 1e6, 2) for n in found] == list(millions)
    shape, width = DECODER_SHAPES[decoder], ENCODER_SHAPES[encoder].width
    bridge_and_mask_token, norm = width * shape.width + 2 * shape.width, 2 * shape.width
    assert found[1] == shape.depth * decoder_block_parameters(shape) + bridge_and_mask_token + norm


def test_blocks_are_all_alike() -> None:
    first, *others = small_encoder().blocks
    assert all(str(block) == str(first) for block in others)


def test_no_parameter_is_a_lone_number_and_nothing_is_a_buffer() -> None:
    encoder = small_encoder(positions="sincos")
    encoder([ClipGroup(random_images(GRID, batch=1, tubelet_frames=2))])
    assert all(parameter.ndim for parameter in encoder.parameters())
    assert encoder.state_dict().keys() == dict(encoder.named_parameters()).keys()


def test_the_embedding_is_a_convolution_with_steps_of_a_tubelet() -> None:
    images, embed = random_images(GRID, batch=2, tubelet_frames=2), TubeletEmbed(32, PATCH_PX, 2)
    tokens = F.conv3d(images[:, :, 0].transpose(1, 2), embed.weight, embed.bias, stride=(2, PATCH_PX, PATCH_PX))
    torch.testing.assert_close(embed(images, None), tokens.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_visible_tokens_are_embedded_as_they_are_among_all() -> None:
    images, embed = random_images(GRID, batch=2, tubelet_frames=2), TubeletEmbed(32, PATCH_PX, 2)
    everything = embed(images, None)
    expected = torch.stack([everything[clip, VISIBLE[clip]] for clip in range(2)])
    torch.testing.assert_close(embed(images, VISIBLE), expected)


def test_the_embedding_starts_as_a_convolution_with_xavier_weights() -> None:
    torch.manual_seed(0)
    embed = TubeletEmbed(64, 8, 2)
    fan_in = 3 * 2 * 8 * 8
    bound = (6 / (fan_in + 64)) ** 0.5
    assert 0.98 * bound < embed.weight.abs().max() <= bound
    assert 0.8 * fan_in**-0.5 < embed.bias.abs().max() <= fan_in**-0.5


@pytest.mark.parametrize("positions", ["rope", "sincos"])
def test_a_still_frame_is_the_clip_that_repeats_it(positions: str) -> None:
    encoder = small_encoder(positions=positions)
    frame = random_images(Grid(1, 2, 2, 3), batch=2, tubelet_frames=1)
    still, repeated = encoder([ClipGroup(frame), ClipGroup(frame.repeat(1, 2, 1, 1, 1, 1))])
    torch.testing.assert_close(still, repeated, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("positions", ["rope", "sincos", "learned"])
def test_hidden_pixels_change_nothing(positions: str, registers: int) -> None:
    encoder, images = small_encoder(positions=positions, registers=registers), random_images(GRID, batch=2, tubelet_frames=2)
    (before,) = encoder([ClipGroup(images, VISIBLE)])
    noisy = images.clone()
    noisy[:, 2:, 0, :, :PATCH_PX, :PATCH_PX] += 1.0  # token 6, (t, y, x) = (1, 0, 0)
    (after,) = encoder([ClipGroup(noisy, VISIBLE)])
    assert torch.equal(before, after)
    noisy[:, :2, 0, :, :PATCH_PX, :PATCH_PX] += 1.0  # token 0, which the first clip shows
    (after,) = encoder([ClipGroup(noisy, VISIBLE)])
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("positions", ["rope", "sincos", "learned"])
def test_showing_every_token_is_showing_the_clip(positions: str, registers: int) -> None:
    encoder, images = small_encoder(positions=positions, registers=registers), random_images(GRID, batch=2, tubelet_frames=2)
    listed, whole = encoder([ClipGroup(images, torch.arange(12).repeat(2, 1)), ClipGroup(images)])
    torch.testing.assert_close(listed, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("positions", ["rope", "sincos", "learned"])
def test_groups_in_one_pack_are_as_each_on_its_own(positions: str, registers: int) -> None:
    encoder = small_encoder(positions=positions, registers=registers)
    groups = [
        ClipGroup(random_images(GRID, batch=2, tubelet_frames=2), VISIBLE),
        ClipGroup(random_images(Grid(2, 3, 1, 2), batch=1, tubelet_frames=2, seed=1)),
        ClipGroup(random_images(Grid(1, 1, 4, 4), batch=3, tubelet_frames=1, seed=2)),
    ]
    together = encoder(groups)
    assert [tuple(tokens.shape) for tokens in together] == [(2, 3, 32), (1, 12, 32), (3, 16, 32)]
    for group, tokens in zip(groups, together, strict=True):
        torch.testing.assert_close(tokens, encoder([group])[0], atol=1e-5, rtol=1e-5)


def test_all_groups_go_through_a_block_in_one_call() -> None:
    encoder, lengths = small_encoder(), []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: lengths.append(len(output)))
    images = random_images(GRID, batch=2, tubelet_frames=2)
    encoder([ClipGroup(images, VISIBLE), ClipGroup(images)])
    assert lengths == [2 * 3 + 2 * 12] * SMALL.depth


@pytest.mark.parametrize("positions", ["rope", "sincos", "learned"])
def test_all_tokens_see_the_registers_which_nobody_gets(positions: str) -> None:
    encoder, images = small_encoder(positions=positions, registers=2), random_images(GRID, batch=2, tubelet_frames=2)
    lengths: list[int] = []
    hook = encoder.blocks[0].register_forward_hook(lambda module, inputs, output: lengths.append(len(output)))
    (before,) = encoder([ClipGroup(images)])
    hook.remove()
    assert lengths == [2 * (2 + 12)] and before.shape == (2, 12, SMALL.width)
    with torch.no_grad():
        encoder.registers.mul_(10)
    (after,) = encoder([ClipGroup(images)])
    assert ((before - after).abs().amax(dim=-1) > 1e-5).all()


def test_registers_do_not_turn() -> None:
    """So their order changes nothing."""
    images = random_images(GRID, batch=1, tubelet_frames=2)
    one, two = small_encoder(registers=2), small_encoder(registers=2)
    with torch.no_grad():
        two.registers.copy_(one.registers.flip(0))
    torch.testing.assert_close(one([ClipGroup(images)])[0], two([ClipGroup(images)])[0], atol=1e-6, rtol=1e-6)


def test_a_learned_table_is_of_the_clips_of_the_run_or_of_those_that_the_config_says() -> None:
    video, image = Grid(2, 3, 4, 5), Grid(1, 1, 2, 2)
    config = EncoderConfig(size="tiny", positions="learned")
    with torch.device("meta"):
        assert build_encoder(config, video).table.weight.shape == (2, 4, 5, 192)
        pinned = config.as_trained_on(video)
        assert build_encoder(pinned, image).table.weight.shape == (2, 4, 5, 192)
        assert build_encoder(pinned, image).has_time
    assert config.model_copy(update={"positions": "rope"}).as_trained_on(video).learned_grid is None


def test_decoders_of_an_encoder_with_learned_positions_have_fixed_ones() -> None:
    with torch.device("meta"):
        model = build_model(EncoderConfig(size="tiny", positions="learned"), [CrocoConfig(decoder="tiny")], Grid(1, 1, 4, 4))
    assert model.encoder.positions == "learned"
    assert model.objectives["croco"].decoder.positions == "sincos"


def test_frames_of_a_clip_see_each_other() -> None:
    encoder, images = small_encoder(), random_images(GRID, batch=1, tubelet_frames=2)
    (before,) = encoder([ClipGroup(images)])
    images[:, 2:] += torch.randn(images[:, 2:].shape, generator=torch.Generator().manual_seed(1))
    (after,) = encoder([ClipGroup(images)])
    assert not torch.allclose(before[:, :6], after[:, :6])


def test_positions_know_time_as_soon_as_there_is_some() -> None:
    image, video = Grid(1, 1, 2, 2), Grid(2, 1, 2, 2)
    with torch.device("meta"):
        assert not build_encoder(EncoderConfig(size="tiny"), image).has_time
        assert build_encoder(EncoderConfig(size="tiny"), video).has_time
        assert build_encoder(EncoderConfig(size="tiny", tubelet_frames=2), image).has_time


@pytest.mark.parametrize(
    ("shape", "problem"),
    [((1, 2, 1, 3, 8, 10), "do not tile 8 x 10"), ((1, 3, 1, 3, 8, 8), "tubelets of 2 do not tile 3 frames")],
)
def test_clips_that_tokens_do_not_tile_are_refused(shape: tuple[int, ...], problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        small_encoder()([ClipGroup(torch.zeros(shape))])


def test_drop_path_needs_numbers_in_training_alone() -> None:
    encoder, images = small_encoder(drop_path=0.5), random_images(GRID, batch=2, tubelet_frames=2)
    with pytest.raises(AssertionError, match="drop-path needs numbers"):
        encoder([ClipGroup(images)])
    keep = torch.full((2, SMALL.depth, 2), 0.9)
    (trained,) = encoder([ClipGroup(images, drop_path=keep)])
    (evaluated,) = encoder.eval()([ClipGroup(images)])
    assert not torch.allclose(trained, evaluated)  # what is kept is scaled up
    assert torch.equal(evaluated, small_encoder()([ClipGroup(images)])[0])


def test_drop_path_grows_linearly_and_drops_single_clips() -> None:
    encoder, images = small_encoder(drop_path=0.5), random_images(GRID, batch=2, tubelet_frames=2)
    assert encoder.drop_rates == [0.0, 0.5]
    numbers = torch.full((2, SMALL.depth, 2), 0.9)
    numbers[0, 1] = 0.4  # the last block is skipped for the first clip
    (tokens,) = encoder([ClipGroup(images, drop_path=numbers)])
    without_last = small_encoder()
    without_last.blocks = without_last.blocks[:1]
    torch.testing.assert_close(tokens[0], without_last([ClipGroup(images)])[0][0], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(tokens[1], without_last([ClipGroup(images)])[0][1])


def test_bf16_autocast_keeps_the_tokens_near_and_float32() -> None:
    encoder, images = small_encoder(), random_images(GRID, batch=2, tubelet_frames=2)
    (exact,) = encoder([ClipGroup(images, VISIBLE)])
    with torch.autocast("cpu", torch.bfloat16):
        (tokens,) = encoder([ClipGroup(images, VISIBLE)])
    assert tokens.dtype == torch.float32
    # bf16 keeps 8 bits: a relative error of 2^-8 an operation, some ten in a row, on tokens of size one
    assert (tokens - exact).abs().mean() < 10 * 2**-8
