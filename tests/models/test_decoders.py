"""The cross-view decoder: what it is given where, and what it makes of it."""

import pytest
import torch

from models.config import Grid
from models.decoders import CrossViewDecoder
from tests.models.samples import SMALL

GRID = Grid(2, 1, 2, 2)
ENCODER_WIDTH, VALUES = 16, 6
VISIBLE = torch.tensor([[1, 6], [0, 3]])


@pytest.fixture(params=["rope", "sincos"])
def decoder(request: pytest.FixtureRequest) -> CrossViewDecoder:
    torch.manual_seed(0)
    return CrossViewDecoder(SMALL, encoder_width=ENCODER_WIDTH, values=VALUES, positions=request.param, has_time=True)


def random_views() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, ENCODER_WIDTH, generator=generator), torch.randn(2, 8, ENCODER_WIDTH, generator=generator)


def test_every_token_gets_its_values(decoder: CrossViewDecoder) -> None:
    assert decoder(*with_places(random_views())).shape == (2, GRID.tokens, VALUES)


def with_places(views: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Grid]:
    return views[0], VISIBLE, views[1], GRID


def test_blocks_see_encoded_tokens_at_their_places_and_the_mask_token_elsewhere(decoder: CrossViewDecoder) -> None:
    target, reference = random_views()
    seen: list[torch.Tensor] = []
    decoder.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].unflatten(0, (2, -1))))
    decoder(*with_places((target, reference)))
    table = decoder.tables.added(GRID, torch.device("cpu"))
    placed = seen[0] if table is None else seen[0] - table
    embedded = decoder.embed(target)
    for clip in range(2):
        for token in range(GRID.tokens):
            shown = VISIBLE[clip].tolist()
            expected = embedded[clip, shown.index(token)] if token in shown else decoder.mask_token[0, 0]
            torch.testing.assert_close(placed[clip, token], expected, atol=1e-6, rtol=1e-6)


def test_no_block_changes_the_reference(decoder: CrossViewDecoder) -> None:
    seen: list[torch.Tensor] = []
    for block in decoder.blocks:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    decoder(*with_places(random_views()))
    assert len(seen) == SMALL.depth
    assert all(torch.equal(memory, seen[0]) for memory in seen)


def test_a_clip_is_completed_from_its_own_reference_alone(decoder: CrossViewDecoder) -> None:
    target, reference = random_views()
    before = decoder(*with_places((target, reference)))
    reference[1] += 1.0
    reference[1, :, ::2] -= 3.0
    after = decoder(*with_places((target, reference)))
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1])
