"""A small transformer that trains the same on any number of ranks, and a store that fails on demand."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from trainer.checkpoint.boxes import Boxes, State
from trainer.checkpoint.logical import logical_state
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.record import Record
from trainer.optim import MovingAverage
from trainer.store.base import ObjectInfo, Store, StoreError

WIDTH = 12
SAMPLES = 8


class Block(nn.Module):
    """Attention and MLP, with odd sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 17), nn.GELU(), nn.Linear(17, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(tokens)).unflatten(-1, (3, 1, WIDTH)).unbind(-3)
        hidden: Tensor = self.mlp(functional.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT[..., 0, :])
        return tokens + hidden


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class Toy(nn.Module):
    """An encoder and a head of three rows; one gain of a single element, one weight that is never trained, one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(WIDTH, 3)
        self.gain = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.register_buffer("offset", torch.randn(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.encoder(tokens)) * self.gain + self.offset
        return outputs


class Trainer:
    """A toy with its optimiser and moving average; `wrap` spreads it over ranks."""

    def __init__(
        self, seed: int, *, wrap: Callable[[nn.Module], nn.Module] = lambda module: module, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(seed)
        self.module = wrap(Toy().to(dtype))
        self.dtype = dtype
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=3e-3)
        self.average = MovingAverage(self.module.named_parameters(), 0.9)

    def state(self) -> dict[str, Boxes]:
        return logical_state(self.module, self.optimizer, self.average.averages)

    def train(self, steps: range) -> list[float]:
        """Losses of the whole batch at each of `steps`, which decide the batch."""
        return [self._step(step) for step in steps]

    def _step(self, step: int) -> float:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        draws = torch.Generator().manual_seed(step)
        batch = torch.randn(SAMPLES, 4, WIDTH, generator=draws).to(self.dtype)[rank::ranks]
        loss = (self.module(batch) - batch[..., :3].sin()).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(torch.tensor(True))
        total = loss.detach().double()
        if ranks > 1:
            dist.all_reduce(total)
        return float(total) / ranks


def whole(state: State) -> dict[str, Tensor]:
    """Full tensors, from the boxes of all ranks; every rank must call it."""
    of_ranks: list[Any] = [None] * dist.get_world_size() if dist.is_initialized() else [state]
    if dist.is_initialized():
        dist.all_gather_object(of_ranks, dict(state))
    return {name: assemble([of_rank[name] for of_rank in of_ranks]) for name in state}


def assemble(parts: list[Boxes]) -> Tensor:
    """The tensor that `parts` cover."""
    full = torch.empty(parts[0].shape, dtype=parts[0].dtype)
    for part in parts:
        for offsets, tensor in part.boxes:
            full[tuple(slice(start, start + length) for start, length in zip(offsets, tensor.shape, strict=True))] = tensor
    return full


def save_now(manager: CheckpointManager, step: int, state: State, *, engine: str = "single") -> Record:
    """Save, wait, and raise what went wrong."""
    manager.save(step, state, engine=engine, progress={"step": step})
    manager.finish()
    (report,) = manager.poll()
    if report.error:
        raise report.error
    assert report.record is not None
    return report.record


def unequal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names that only one side has or whose bits differ."""
    same = {name for name in found.keys() & expected.keys() if torch.equal(found[name], expected[name])}
    return sorted((found.keys() | expected.keys()) - same)


class FailingStore:
    """A store whose `put` fails, half-way, for keys that end in `ending` while it is full."""

    def __init__(self, store: Store, ending: str) -> None:
        self.uri = store.uri
        self.full = True
        self._store = store
        self._ending = ending

    def put(self, key: str, payload: bytes | Iterable[memoryview], *, exclusive: bool = False) -> ObjectInfo:
        if self.full and key.endswith(self._ending):
            if not isinstance(payload, bytes):
                next(iter(payload))
            raise StoreError(f"{self.uri} was asked to write {key} and the system says: No space left on device; make room")
        return self._store.put(key, payload, exclusive=exclusive)

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._store.get(key, offset, length)

    def read_into(self, key: str, offset: int, places: Sequence[memoryview]) -> None:
        self._store.read_into(key, offset, places)

    def list(self, prefix: str) -> list[ObjectInfo]:
        return self._store.list(prefix)

    def delete(self, prefix: str) -> None:
        self._store.delete(prefix)
