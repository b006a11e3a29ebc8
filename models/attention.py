"""One attention over packed sequences, and the kernels that can run it.

Tokens of many sequences lie one after the other, and `Segments` says where each begins: token i of segment s attends to the
keys of segment s and to nothing else. No padding, no masks, so views of unequal length cost what they hold.

    xformers    memory_efficient_attention with BlockDiagonalMask: one kernel over the whole pack, CUDA only
    sdpa        torch's scaled_dot_product_attention, everywhere: neighbouring segments of equal lengths go as one batch

Lengths are Python integers, known without asking the device; a pack of equal shapes is built once and reused.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Backend = Literal["xformers", "sdpa"]

_XFORMERS_ALIGNMENT_BYTES = 16
_SHORT = 200
"""Keys up to which torch's float32 kernel for CPUs is faster than its bf16 one, on processors that multiply bf16 too (docs/log.md)."""


@dataclass(frozen=True)
class Segments:
    """Packed sequences by their lengths: of the queries, and of the keys that each of them sees."""

    runs: tuple[tuple[int, int, int], ...]
    """Neighbouring sequences of equal lengths together: (how many, query length, key length)."""

    @classmethod
    def of(cls, runs: Iterable[tuple[int, int, int]]) -> "Segments":
        """Sequences as `runs` has them; neighbouring runs of equal lengths become one."""
        alike = groupby(runs, key=itemgetter(1, 2))
        return cls(tuple((sum(count for count, _, _ in run), *lengths) for lengths, run in alike))

    @classmethod
    def within(cls, lengths: Iterable[int]) -> "Segments":
        """Self-attention: each sequence sees itself."""
        return cls.of((1, length, length) for length in lengths)

    @property
    def queries(self) -> tuple[int, ...]:
        """Length of every sequence of queries."""
        return tuple(length for count, length, _ in self.runs for _ in range(count))

    @property
    def keys(self) -> tuple[int, ...]:
        """Length of every sequence of keys."""
        return tuple(length for count, _, length in self.runs for _ in range(count))


def attend(
    q: Float[Tensor, "Nq A D"],
    k: Float[Tensor, "Nk A D"],
    v: Float[Tensor, "Nk A D"],
    segments: Segments,
    backend: Backend,
) -> Float[Tensor, "Nq A D"]:
    """softmax(q k^T / sqrt(D)) v inside each segment (Vaswani et al. 2017)."""
    return _BACKENDS[backend](q, k, v, segments)


def choose_backend(
    asked: Literal["auto", "xformers", "sdpa"],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    head_width: int = 64,
) -> Backend:
    """The backend for `asked` on `device`, for heads as wide as `head_width`; ValueError where xFormers is asked for and cannot run.

    Every head width of models/config.py fits; `dtype` and `head_width` matter to shapes of one's own.
    """
    if asked == "sdpa" or (asked == "auto" and device.type != "cuda"):
        return "sdpa"
    problem = _why_no_xformers(device, dtype, head_width)
    if problem is None:
        return "xformers"
    if asked == "auto":
        return "sdpa"
    raise ValueError(f"encoder.attention asks for xformers, {problem}; set it to auto or sdpa")


@lru_cache(maxsize=64)
def block_diagonal_mask(segments: Segments, device: torch.device) -> Any:
    """xFormers' description of `segments`, its bounds on `device`."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(segments.queries, segments.keys, device=device)


def _attend_xformers(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    from xformers.ops import memory_efficient_attention

    bias = block_diagonal_mask(segments, q.device)
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]


def _attend_sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    outputs, query_start, key_start = [], 0, 0
    for count, queries, keys in segments.runs:
        query_end, key_end = query_start + count * queries, key_start + count * keys
        outputs.append(_attend_equal(q[query_start:query_end], k[key_start:key_end], v[key_start:key_end], count=count))
        query_start, key_start = query_end, key_end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend_equal(q: Tensor, k: Tensor, v: Tensor, *, count: int) -> Tensor:
    """`count` sequences of equal lengths as one batch."""
    batched = tuple(x.unflatten(0, (count, -1)).transpose(1, 2) for x in (q, k, v))  # (count, A, n, D)
    is_real = not isinstance(q, FakeTensor)  # a plan's tensors lie on a CPU and stand for a GPU's
    if is_real and q.device.type == "cpu" and q.dtype == torch.bfloat16 and len(k) <= count * _SHORT:
        with torch.autocast("cpu", enabled=False):
            attended = F.scaled_dot_product_attention(*(x.float() for x in batched)).to(q.dtype)
    else:
        attended = F.scaled_dot_product_attention(*batched)
    return attended.transpose(1, 2).flatten(0, 1)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What linear layers make of `x`: autocast's type where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _why_no_xformers(device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """What keeps xFormers from running; none when it can."""
    if device.type != "cuda":
        return f"which runs on CUDA only, and this is {device.type}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"which computes in float32, float16 and bfloat16, and this is {dtype}"
    if head_width * dtype.itemsize % _XFORMERS_ALIGNMENT_BYTES:
        multiple = _XFORMERS_ALIGNMENT_BYTES // dtype.itemsize
        return f"which needs heads of a multiple of {multiple} channels in {dtype}, and these have {head_width}"
    return _why_no_import()


@cache
def _why_no_import() -> str | None:
    # Asked for in every forward, and Python does not remember an import that failed.
    try:
        from xformers.ops import memory_efficient_attention  # noqa: F401
    except ImportError as error:
        return f"which cannot be imported: {error}"
    return None


_BACKENDS: dict[Backend, Callable[[Tensor, Tensor, Tensor, Segments], Tensor]] = {
    "xformers": _attend_xformers,
    "sdpa": _attend_sdpa,
}
