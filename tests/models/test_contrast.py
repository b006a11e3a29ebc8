"""InfoNCE: its definition, its memory, and that ranks together compute what one process would."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models import contrast
from models.contrast import retrieve
from models.peers import ALONE

TEMPERATURE = 0.07


def unit_vectors(count: int, width: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def mean_loss(queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    retrieval = retrieve(queries, keys, valid, temperature=TEMPERATURE, peers=ALONE)
    return retrieval.mean(retrieval.loss)


def test_the_loss_is_the_cross_entropy_of_each_valid_pair_among_the_valid_keys() -> None:
    queries, keys = unit_vectors(12, 8, 0), unit_vectors(12, 8, 1)
    valid = torch.arange(12) % 3 != 0
    logits = queries[valid] @ keys[valid].T / TEMPERATURE
    expected = F.cross_entropy(logits, torch.arange(int(valid.sum())))
    torch.testing.assert_close(mean_loss(queries, keys, valid), expected)
    retrieval = retrieve(queries, keys, valid, temperature=TEMPERATURE, peers=ALONE)
    places = [int((row > row[own]).sum()) for own, row in enumerate(logits)]
    assert retrieval.better[valid].tolist() == places
    assert retrieval.top(1) == pytest.approx(sum(place < 1 for place in places) / len(places))
    assert retrieval.top(5) == pytest.approx(sum(place < 5 for place in places) / len(places))
    assert retrieval.candidates == valid.sum()


@pytest.mark.parametrize("width", [64, 128])
def test_random_vectors_start_at_the_loss_that_theory_says(width: int) -> None:
    n = 4096
    loss = mean_loss(unit_vectors(n, width, 0), unit_vectors(n, width, 1), torch.ones(n, dtype=torch.bool))
    # logits of random unit vectors are near normal with variance 1 / (d T^2), and E exp(x) = exp(variance / 2)
    expected = math.log(n) + 1 / (2 * width * TEMPERATURE**2)
    assert loss.item() == pytest.approx(expected, abs=0.08)


def test_pairs_that_are_not_valid_get_no_gradient_and_give_none() -> None:
    queries, keys = unit_vectors(6, 8, 0).requires_grad_(), unit_vectors(6, 8, 1).requires_grad_()
    valid = torch.tensor([True, False, True, True, False, True])
    mean_loss(queries, keys, valid).backward()
    for vectors in (queries, keys):
        assert vectors.grad is not None
        assert not vectors.grad[~valid].any() and vectors.grad[valid].abs().sum(dim=1).min() > 0


def test_without_any_valid_pair_loss_and_gradients_are_zero() -> None:
    queries, keys = unit_vectors(6, 8, 0).requires_grad_(), unit_vectors(6, 8, 1).requires_grad_()
    loss = mean_loss(queries, keys, torch.zeros(6, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and queries.grad is not None and keys.grad is not None
    assert not queries.grad.any() and not keys.grad.any()


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return made


def test_logits_in_chunks_give_the_same_loss_and_gradients_within_the_memory_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    n, valid = 100, torch.arange(100) % 7 != 0
    results = []
    for bound in (contrast.LOGITS_BYTES, 4 * n * 9):
        monkeypatch.setattr(contrast, "LOGITS_BYTES", bound)
        queries, keys = unit_vectors(n, 8, 0).requires_grad_(), unit_vectors(n, 8, 1).requires_grad_()
        with Largest() as largest:
            loss = mean_loss(queries, keys, valid)
            loss.backward()
        results.append((loss.detach(), queries.grad, keys.grad))
        assert largest.bytes <= min(bound, 4 * n * n)
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked)


def test_the_loss_is_float32_under_autocast() -> None:
    queries, keys, valid = unit_vectors(32, 8, 0), unit_vectors(32, 8, 1), torch.ones(32, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        under = mean_loss(queries, keys, valid)
    assert torch.equal(under, mean_loss(queries, keys, valid))
