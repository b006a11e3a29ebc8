"""Ranks that compare their pairs with each other's compute what one process with all pairs would."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from models.contrast import retrieve
from models.peers import ALONE, Peers
from tests.gloo import run_ranks
from trainer.parallel.peers import AllRanks, find_peers

WORLD_SIZE, PAIRS, WIDTH = 3, 10, 8
VALID = torch.cat([torch.arange(PAIRS) % 4 != 0, torch.zeros(PAIRS, dtype=torch.bool), torch.arange(PAIRS) < 3])
"""Of three ranks with 7, 0 and 3 valid pairs."""


def contrast(rows: slice, peers: Peers, *, stops_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Loss, gradients of queries and keys, and top-5 of these rows of one joint set of vectors."""
    joint = torch.randn(2, WORLD_SIZE * PAIRS, WIDTH, generator=torch.Generator().manual_seed(0))
    queries, keys = (F.normalize(vectors[rows], dim=-1).requires_grad_() for vectors in joint)
    keys.requires_grad_(not stops_gradient)
    retrieval = retrieve(queries, keys, VALID[rows], temperature=0.07, peers=peers)
    loss = retrieval.mean(retrieval.loss)
    loss.backward()
    return loss.detach(), queries.grad, keys.grad, retrieval.top(5)


def _contrast_both_ways() -> list[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    peers = find_peers()
    assert isinstance(peers, AllRanks)
    rows = slice(dist.get_rank() * PAIRS, (dist.get_rank() + 1) * PAIRS)
    return [contrast(rows, peers, stops_gradient=stops) for stops in (True, False)]


def test_ranks_with_unequal_valid_pairs_compute_what_one_process_would() -> None:
    outcomes = run_ranks(_contrast_both_ways, WORLD_SIZE)
    for stops_gradient, of_ranks in zip((True, False), zip(*outcomes, strict=True), strict=True):
        losses, of_queries, of_keys, top5 = zip(*of_ranks, strict=True)
        loss, for_queries, for_keys, top5_alone = contrast(slice(None), ALONE, stops_gradient=stops_gradient)
        # whoever trains takes the mean over ranks, of losses and of gradients
        assert torch.stack(losses).mean().item() == pytest.approx(loss.item(), rel=1e-6)
        assert torch.stack(top5).mean().item() == pytest.approx(top5_alone.item(), abs=1e-6)
        torch.testing.assert_close(torch.cat(of_queries) / WORLD_SIZE, for_queries, atol=1e-7, rtol=1e-5)
        if not stops_gradient:
            torch.testing.assert_close(torch.cat(of_keys) / WORLD_SIZE, for_keys, atol=1e-7, rtol=1e-5)


def test_without_a_process_group_a_process_is_alone() -> None:
    assert find_peers() == ALONE
