"""Contrast: InfoNCE over the pairs of all ranks, exact and in bounded memory.

    loss = mean over valid pairs i of all ranks of  -log( exp(q_i·k_i / T) / sum over valid pairs j of all ranks exp(q_i·k_j / T) )

(van den Oord et al. 2018.) Every rank has the same number of pairs, some of them not valid, so shapes and collectives never
depend on data. A rank computes the rows of its own queries against all keys, a few rows at a time: the logits of one chunk
are made again in the backward instead of being kept.

What other ranks are is told by `Peers`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models.peers import Peers, share_of_mean

LOGITS_BYTES = 256 * 2**20
"""Of one chunk of logits."""

_EXCLUDED = -1e4
"""Added to the logit of a pair that is not valid: its exponential is 0 in float32, and unlike -inf it leaves gradients finite."""


class Retrieval(NamedTuple):
    """Each of this rank's pairs among the keys of all ranks."""

    loss: Float[Tensor, " n"]
    better: Int[Tensor, " n"]
    """Valid keys that are nearer to the query than its own: 0 is a hit at once, below 5 one of the first five."""
    valid: Bool[Tensor, " n"]
    candidates: Float[Tensor, ""]
    """Valid keys over all ranks."""
    share: Float[Tensor, ""]
    """What a sum over this rank's valid pairs is multiplied by so that its mean over ranks is the mean over all valid pairs."""

    def mean(self, values: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        """This rank's part of the mean over all valid pairs; 0 where there is none. Ranks are averaged by whoever trains."""
        return (values * self.valid).sum() * self.share

    def top(self, first: int) -> Float[Tensor, ""]:
        """Share of pairs whose key is among the `first` nearest."""
        return self.mean((self.better < first).float())


def retrieve(
    queries: Float[Tensor, "n d"], keys: Float[Tensor, "n d"], valid: Bool[Tensor, " n"], *, temperature: float, peers: Peers
) -> Retrieval:
    """InfoNCE of each pair; `queries` and `keys` are unit vectors, float32 whatever the autocast."""
    n = len(queries)
    with torch.autocast(queries.device.type, enabled=False):
        queries, all_keys = queries.float(), peers.gather(keys.float())  # (n, d), (W n, d)
        bias = torch.where(peers.gather(valid), 0.0, _EXCLUDED)  # (W n)
        own = torch.arange(peers.rank * n, (peers.rank + 1) * n, device=queries.device)
        at_once = max(1, LOGITS_BYTES // (4 * len(all_keys)))
        parts = [
            _retrieve_rows(rows, all_keys, bias, own_of_rows, temperature, keep=at_once >= n)
            for rows, own_of_rows in zip(queries.split(at_once), own.split(at_once), strict=True)
        ]
        loss, better = (torch.cat(part) for part in zip(*parts, strict=True))
        candidates = peers.sum(valid.sum().float())
        return Retrieval(loss, better, valid, candidates, share_of_mean(candidates, peers))


def _retrieve_rows(
    queries: Tensor, keys: Tensor, bias: Tensor, own: Tensor, temperature: float, *, keep: bool
) -> tuple[Tensor, Tensor]:
    """Loss and number of better keys of a few rows; logits are recomputed in the backward unless all rows fit at once."""
    if keep or not torch.is_grad_enabled():
        return _score(queries, keys, bias, own, temperature)
    return checkpoint(_score, queries, keys, bias, own, temperature, use_reentrant=False, preserve_rng_state=False)


def _score(queries: Tensor, keys: Tensor, bias: Tensor, own: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = queries @ keys.T / temperature + bias  # (rows, W n)
    at_own = logits.gather(1, own[:, None])  # (rows, 1)
    return logits.logsumexp(dim=1) - at_own[:, 0], (logits > at_own).sum(dim=1)
