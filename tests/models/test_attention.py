"""Every backend of packed attention against a plain softmax in float64, values and gradients."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import models.attention
from models.attention import Segments, attend, block_diagonal_mask, choose_backend, compute_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEADS, HEAD_WIDTH = 2, 8

SEGMENTS = {
    "one length": Segments.within([5, 5, 5]),
    "a masked view and whole ones": Segments.within([2, 2, 7, 7]),
    "all lengths differ": Segments.within([1, 6, 3]),
    "lengths that come back": Segments.within([2, 5, 2, 5]),
    "across": Segments.of([(2, 4, 6)]),
    "across, all lengths differ": Segments.of([(1, 3, 2), (1, 1, 5), (1, 4, 4)]),
}
lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def reference_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The definition, in float64: one softmax over the keys of a token's own segment."""
    scores = torch.einsum("iad,jad->aij", q.double(), k.double()) / q.shape[-1] ** 0.5
    visible = owners(segments.queries)[:, None] == owners(segments.keys)
    weights = scores.masked_fill(~visible.to(q.device), -torch.inf).softmax(dim=-1)
    return torch.einsum("aij,jad->iad", weights, v.double())


def owners(lengths: tuple[int, ...]) -> Tensor:
    """The segment of each token."""
    return torch.cat([torch.full((length,), place) for place, length in enumerate(lengths)])


def random_qkv(segments: Segments, *, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = (sum(segments.queries), sum(segments.keys), sum(segments.keys))
    shapes = [(n, HEADS, HEAD_WIDTH) for n in tokens]
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def values_and_gradients(function: Any, qkv: list[Tensor]) -> list[Tensor]:
    out = function(*qkv)
    direction = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
    return [out, *torch.autograd.grad((out * direction).sum(), qkv)]


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_sdpa_gives_values_and_gradients_of_the_definition(segments: Segments) -> None:
    qkv = random_qkv(segments)
    found = values_and_gradients(lambda *x: attend(*x, segments, "sdpa"), qkv)
    expected = values_and_gradients(lambda *x: reference_attention(*x, segments), qkv)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), atol=1e-5, rtol=1e-5)


@given(lengths)
def test_sdpa_gives_the_definition_for_any_lengths(lengths: list[int]) -> None:
    segments = Segments.within(lengths)
    q, k, v = random_qkv(segments, dtype=torch.float64)
    torch.testing.assert_close(attend(q, k, v, segments, "sdpa"), reference_attention(q, k, v, segments))


def test_short_sequences_in_bf16_on_a_cpu_are_float32s_rounded_once_under_autocast_too() -> None:
    segments = Segments.within([5, 5, 40])
    qkv = [x.detach() for x in random_qkv(segments, dtype=torch.bfloat16)]
    expected = attend(*(x.float() for x in qkv), segments, "sdpa").bfloat16()
    assert torch.equal(attend(*qkv, segments, "sdpa"), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(*qkv, segments, "sdpa"), expected)


def test_neighbouring_runs_of_equal_lengths_are_one() -> None:
    assert Segments.of([(2, 3, 3), (1, 3, 3), (1, 3, 4)]) == Segments(((3, 3, 3), (1, 3, 4)))
    assert Segments.of([(2, 3, 3), (1, 3, 3), (1, 3, 4)]).keys == (3, 3, 3, 4)


def test_a_segment_does_not_see_the_others() -> None:
    segments = Segments.within([3, 4, 3])
    q, k, v = (x.detach() for x in random_qkv(segments))
    before = attend(q, k, v, segments, "sdpa")
    k[3:7], v[3:7] = 100.0, -100.0
    after = attend(q, k, v, segments, "sdpa")
    torch.testing.assert_close(after[:3], before[:3])
    torch.testing.assert_close(after[7:], before[7:])
    assert not torch.allclose(after[3:7], before[3:7])


@pytest.mark.parametrize(
    ("segments", "calls"),
    [(Segments.within([4] * 50), 1), (Segments.within([2] * 50 + [4] * 50), 2)],
    ids=["equal", "two groups"],
)
def test_segments_of_one_length_go_as_one_call_without_a_mask(
    segments: Segments, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def count(*args: Tensor, **kwargs: Any) -> Tensor:
        assert not kwargs, "a mask keeps SDPA from its fastest kernels"
        seen.append(len(args[0]))
        return real(*args)

    real = F.scaled_dot_product_attention
    monkeypatch.setattr(models.attention.F, "scaled_dot_product_attention", count)
    attend(*random_qkv(segments), segments, "sdpa")
    assert seen == [50] * calls


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_xformers_is_told_the_same_segments(segments: Segments) -> None:
    pytest.importorskip("xformers.ops")
    mask = block_diagonal_mask(segments, CPU)
    found = mask.materialize((sum(segments.queries), sum(segments.keys))) == 0
    torch.testing.assert_close(found, owners(segments.queries)[:, None] == owners(segments.keys))


def test_xformers_bounds_are_built_once_for_equal_packs() -> None:
    pytest.importorskip("xformers.ops")
    assert block_diagonal_mask(Segments.within([2, 3]), CPU) is block_diagonal_mask(Segments.within((2, 3)), CPU)


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_xformers_is_called_with_one_packed_sequence(segments: Segments, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = pytest.importorskip("xformers.ops")

    def attention_of_the_mask(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any) -> Tensor:
        assert q.shape[0] == k.shape[0] == v.shape[0] == 1
        bias = attn_bias.materialize((q.shape[1], k.shape[1]))
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias).transpose(1, 2)

    monkeypatch.setattr(ops, "memory_efficient_attention", attention_of_the_mask)
    qkv = random_qkv(segments)
    expected = reference_attention(*qkv, segments)
    torch.testing.assert_close(attend(*qkv, segments, "xformers"), expected.float(), atol=1e-5, rtol=1e-5)


def test_auto_takes_xformers_on_cuda_and_sdpa_elsewhere() -> None:
    pytest.importorskip("xformers.ops")
    assert choose_backend("auto", CPU) == "sdpa"
    assert choose_backend("auto", CUDA) == "xformers"
    assert choose_backend("sdpa", CUDA) == "sdpa"
    assert choose_backend("xformers", CUDA, dtype=torch.bfloat16, head_width=88) == "xformers"


@pytest.mark.parametrize(
    ("device", "options", "problem"),
    [
        (CPU, {}, "CUDA only, and this is cpu"),
        (CUDA, {"dtype": torch.float64}, "this is torch.float64"),
        (CUDA, {"dtype": torch.bfloat16, "head_width": 12}, "a multiple of 8 channels in torch.bfloat16, and these have 12"),
    ],
    ids=["cpu", "float64", "head width"],
)
def test_xformers_where_it_cannot_run_is_refused_with_the_reason(
    device: torch.device, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=rf"asks for xformers.*{problem}; set it to auto or sdpa"):
        choose_backend("xformers", device, **options)
    assert choose_backend("auto", device, **options) == "sdpa"


def test_a_missing_xformers_is_refused_or_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.attention, "_why_no_import", lambda: "which cannot be imported: no module")
    assert choose_backend("auto", CUDA) == "sdpa"
    with pytest.raises(ValueError, match="cannot be imported"):
        choose_backend("xformers", CUDA)


def test_the_type_of_products_is_that_of_autocast() -> None:
    x = torch.zeros(1)
    assert compute_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x) == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", ["xformers", "sdpa"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_cuda_backends_give_values_and_gradients_of_the_definition(
    segments: Segments, backend: Any, dtype: torch.dtype, tolerance: float
) -> None:
    if backend == "xformers":
        pytest.importorskip("xformers.ops")
    qkv = random_qkv(segments, device=CUDA, dtype=dtype)
    found = values_and_gradients(lambda *x: attend(*x, segments, backend), qkv)
    expected = values_and_gradients(lambda *x: reference_attention(*x, segments), qkv)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), atol=tolerance, rtol=tolerance)
