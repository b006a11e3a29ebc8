"""Blocks against their equations, their initial weights, and drop-path."""

import math

import pytest
import torch
from torch import Tensor, nn

from models.attention import Segments
from models.config import Grid
from models.layers import Block, DecoderBlock, Norm, Pack, branch_scales
from models.positions import rotary_table, rotate
from tests.models.samples import SMALL
from tests.models.test_attention import reference_attention

GRID = Grid(1, 1, 2, 3)
SEGMENTS = Segments.within([6, 6])
TOKENS = sum(SEGMENTS.queries)


@pytest.fixture
def pack() -> Pack:
    table = rotary_table(GRID, SMALL.width // SMALL.heads, torch.device("cpu"), has_time=False)
    return Pack(SEGMENTS, "sdpa", table.of(None, 2), table.of(None, 2))


def random_tokens(seed: int = 0) -> Tensor:
    return torch.randn(TOKENS, SMALL.width, generator=torch.Generator().manual_seed(seed))


def randomise(module: nn.Module) -> None:
    """Weights and biases that are all of some size, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def by_hand(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
    q, k, v = (x.unflatten(-1, (SMALL.heads, -1)) for x in (q, k, v))
    assert pack.rotation is not None
    q, k = rotate(q, pack.rotation), rotate(k, pack.rotation)
    return reference_attention(q, k, v, pack.segments).flatten(1).float()


def self_attention_by_hand(attention: nn.Module, x: Tensor, pack: Pack) -> Tensor:
    return attention.proj(by_hand(*attention.qkv(x).split(SMALL.width, dim=-1), pack))


def mlp_by_hand(mlp: nn.Module, x: Tensor) -> Tensor:
    hidden = mlp.fc1(x)
    return mlp.fc2(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


def norm_by_hand(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


def test_a_block_is_attention_and_mlp_each_after_a_norm(pack: Pack) -> None:
    block, x = Block(SMALL), random_tokens()
    randomise(block)
    y = x + self_attention_by_hand(block.attn, norm_by_hand(block.norm1, x), pack)
    expected = y + mlp_by_hand(block.mlp, norm_by_hand(block.norm2, y))
    torch.testing.assert_close(block(x, pack), expected, atol=1e-4, rtol=1e-4)


def test_a_decoder_block_looks_at_itself_then_at_the_memory(pack: Pack) -> None:
    block, x, memory = DecoderBlock(SMALL), random_tokens(), random_tokens(seed=1)
    randomise(block)
    y = x + self_attention_by_hand(block.attn, norm_by_hand(block.norm1, x), pack)
    cross, seen = block.cross_attn, norm_by_hand(block.norm_y, memory)
    y = y + cross.proj(by_hand(cross.projq(norm_by_hand(block.norm2, y)), cross.projk(seen), cross.projv(seen), pack))
    expected = y + mlp_by_hand(block.mlp, norm_by_hand(block.norm3, y))
    torch.testing.assert_close(block(x, memory, pack, pack), expected, atol=1e-4, rtol=1e-4)


def test_the_memory_may_have_another_grid() -> None:
    block, x, memory = DecoderBlock(SMALL), random_tokens(), torch.randn(2 * 4, SMALL.width)
    head_width, cpu = SMALL.width // SMALL.heads, torch.device("cpu")
    own = rotary_table(GRID, head_width, cpu, has_time=False).of(None, 2)
    other = rotary_table(Grid(1, 1, 2, 2), head_width, cpu, has_time=False).of(None, 2)
    across = Pack(Segments.of([(2, 6, 4)]), "sdpa", own, other)
    assert block(x, memory, Pack(SEGMENTS, "sdpa", own), across).shape == x.shape


def test_linear_layers_start_xavier_uniform_without_bias() -> None:
    torch.manual_seed(0)
    for module in DecoderBlock(SMALL).modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            assert not module.bias.any()
            assert module.weight.abs().max() <= bound
            # of a thousand and more uniform numbers the largest comes within 2 % of the bound
            assert module.weight.abs().max() > 0.98 * bound
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_a_norm_is_float32_also_with_bf16_weights() -> None:
    norm, x = Norm(SMALL.width), random_tokens()
    normal = norm(x)
    assert torch.equal(norm.bfloat16()(x), normal)  # 1 and 0 are exact in bf16
    assert norm(x.bfloat16()).dtype == torch.float32


def test_drop_path_keeps_a_branch_where_its_number_reaches_the_rate() -> None:
    scales = branch_scales(torch.tensor([[0.1, 0.25], [0.9, 0.0]]), 0.25, tokens=3)
    kept = 1 / 0.75
    expected = torch.tensor([[0, 0, 0, kept, kept, kept], [kept, kept, kept, 0, 0, 0]])  # (branch, token)
    torch.testing.assert_close(scales[..., 0], expected)


def test_drop_path_leaves_the_mean_as_it_is() -> None:
    uniforms = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0))
    rate = 0.3
    mean = branch_scales(uniforms, rate, tokens=1).mean(dim=1).flatten()
    deviation = math.sqrt(rate / (1 - rate) / len(uniforms))
    assert torch.all((mean - 1).abs() < 5 * deviation)


def test_a_block_whose_branches_are_dropped_changes_nothing(pack: Pack) -> None:
    block, x = Block(SMALL), random_tokens()
    assert torch.equal(block(x, pack, torch.zeros(2, TOKENS, 1)), x)
    assert torch.equal(block(x, pack, torch.ones(2, TOKENS, 1)), block(x, pack))
