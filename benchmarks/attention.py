"""Which attention is the fastest on our own shapes? Forward and backward of packed clips of equal and of unequal lengths.

    sdpa        ours on every device: neighbouring segments of equal lengths as one batch of torch's scaled_dot_product_attention
    xformers    ours on CUDA: memory_efficient_attention with BlockDiagonalMask
    padded      one batch, padded to the longest, with a mask: what is written first
    flex        torch's FlexAttention, compiled, with a block mask of the segments
    varlen      torch.nn.attention.varlen, where this torch has it for this device

What cannot run here says why. Heads of 64 channels; bf16 on CUDA, float32 on a CPU. Kinds take turns, medians over the turns.

    python -m benchmarks.attention --save

Predicted: on a CPU sdpa wins wherever lengths are equal, since no kernel there knows segments; with as many lengths as clips its
small calls lose to nothing that runs there. On CUDA xFormers and varlen are one kernel a pack and should be equal within a tenth.

JSON keys: shapes -> {lengths, seconds of each kind, fastest, chosen (by "auto"), chosen_over_fastest}, left_out (why not, by kind).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import Report, build_parser
from models.attention import Backend, Segments, attend, choose_backend

SHAPES: dict[str, tuple[int, ...]] = {
    "CroCo pair, 224 x 224, 90 % hidden": (20, 20, 196, 196),
    "CroCo video, 8 frames, 90 % hidden": (134, 134, 1344, 1344),
    "SimIPU, six cameras of 224 x 400": (350,) * 6,
    "MIM4D, three instants of six cameras": (240,) * 18,
    "clips of unequal visible parts": (39, 196, 78, 157, 118, 59, 176, 98),
}
HEADS, HEAD_WIDTH = 12, 64
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """See the module."""
    parser = build_parser(__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = Report("attention", arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes, left_out = {}, dict[str, str]()
    for name, lengths in SHAPES.items():
        found, missing = measure(lengths, device, arguments.turns)
        shapes[name], left_out = found, left_out | missing
        times = "  ".join(f"{kind} {1e3 * seconds:.1f} ms" for kind, seconds in found["seconds"].items())
        report.say(f"{name}: {times}; auto takes {found['chosen']}, {found['chosen_over_fastest']:.2f} of the fastest")
    for kind, reason in left_out.items():
        report.say(f"{kind} does not run here: {reason}")
    report.finish({"shapes": shapes, "left_out": left_out, "device": device.type, "turns": arguments.turns})


def measure(lengths: Sequence[int], device: torch.device, turns: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Every kind that runs here on one pack, compared with plain attention first; and why others do not."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(sum(lengths), HEADS, HEAD_WIDTH, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    expected = torch.cat([plain(*one) for one in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)])
    runs: dict[str, Attend] = {}
    left_out: dict[str, str] = {}
    for kind, build in KINDS.items():
        try:
            runs[kind] = build(lengths, device)
            torch.testing.assert_close(runs[kind](q, k, v), expected, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)
        except (ImportError, RuntimeError, NotImplementedError, ValueError) as error:
            runs.pop(kind, None)
            left_out[kind] = str(error).strip().splitlines()[0]
    timed: dict[str, list[float]] = {kind: [] for kind in runs}
    for turn in range(turns + 1):
        for kind in reversed(runs) if turn % 2 else runs:
            spent = time_once(runs[kind], (q, k, v))
            if turn:
                timed[kind].append(spent)
    seconds = {kind: statistics.median(values) for kind, values in timed.items()}
    fastest, chosen = min(seconds, key=seconds.__getitem__), choose_backend("auto", device, dtype=dtype, head_width=HEAD_WIDTH)
    found = {
        "lengths": list(lengths),
        "seconds": seconds,
        "fastest": fastest,
        "chosen": chosen,
        "chosen_over_fastest": seconds[chosen] / seconds[fastest],
    }
    return found, left_out


def time_once(run: Attend, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Seconds of one forward and backward."""
    started = time.perf_counter()
    run(*inputs).sum().backward()
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One segment, N A D, by the formula."""
    weights = torch.einsum("qad,kad->aqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("aqk,kad->qad", weights.softmax(-1), v)


def build_ours(backend: Backend, lengths: Sequence[int], device: torch.device) -> Attend:
    """As models/attention.py has it."""
    choose_backend(backend, device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, head_width=HEAD_WIDTH)
    segments = Segments.within(lengths)
    return lambda q, k, v: attend(q, k, v, segments, backend)


def build_padded(lengths: Sequence[int], device: torch.device) -> Attend:
    """A batch with a mask."""
    is_token = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batched = (
            torch.nn.utils.rnn.pad_sequence(list(x.split(list(lengths))), batch_first=True).transpose(1, 2) for x in (q, k, v)
        )
        return F.scaled_dot_product_attention(*batched, attn_mask=is_token[:, None, None]).transpose(1, 2)[is_token]

    return run


def build_flex(lengths: Sequence[int], device: torch.device) -> Attend:
    """A block mask over the whole pack."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    segment = torch.repeat_interleave(torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))
    N = len(segment)
    mask = create_block_mask(lambda b, h, q, k: segment[q] == segment[k], None, None, N, N, device=device)
    flex = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex(*(x.transpose(0, 1)[None] for x in (q, k, v)), block_mask=mask)[0].transpose(0, 1)

    return run


def build_varlen(lengths: Sequence[int], device: torch.device) -> Attend:
    """torch's own kernel for packs."""
    from torch.nn.attention.varlen import varlen_attn

    bounds = F.pad(torch.tensor(lengths, device=device, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    return lambda q, k, v: varlen_attn(q, k, v, bounds, bounds, max(lengths), max(lengths))


KINDS: dict[str, Callable[[Sequence[int], torch.device], Attend]] = {
    "sdpa": lambda lengths, device: build_ours("sdpa", lengths, device),
    "xformers": lambda lengths, device: build_ours("xformers", lengths, device),
    "padded": build_padded,
    "flex": build_flex,
    "varlen": build_varlen,
}


if __name__ == "__main__":
    main()
