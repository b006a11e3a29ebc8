"""Reading: the index of a packed data set as columns on this node, and the bytes behind its rows by ranges of its shards.

Files of a clip that are neighbours in a shard come by one request. What lies between two of them is fetched along when that is
little: gaps are closed from the smallest on, as long as what nobody asked for stays below a quarter of what was asked for. A
clip of T instants of all cameras is one range; one camera of six, or every second instant, is one range a piece.

Every file is compared with its checksum, so a damaged shard costs the clips that lie in the damage and no others: they become
ClipErrors, which the loader replaces and counts. A store that does not answer is no ClipError: it ends the run with exit 75.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from trainer.config.data import CacheConfig
from trainer.config.store import StoreConfig
from trainer.data.columns import Columns
from trainer.data.counting import count
from trainer.data.read_ahead import waiting
from trainer.data.shards.cache import RangeCache
from trainer.errors import ClipError
from trainer.store.base import ObjectMissingError, Store, StoreError
from trainer.store.open import open_store

_MOST_WASTE = 0.25
"""Bytes that nobody asked for, as a share of those that somebody did."""
_FREE_GAP_BYTES = 1536
"""Header and padding of a file in a tar: never worth a request."""


class Span(NamedTuple):
    """Some bytes of a shard."""

    shard: int
    offset: int
    bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.bytes

    def is_in(self, other: "Span") -> bool:
        """Whether all of it lies in `other`."""
        return self.shard == other.shard and other.offset <= self.offset and self.end <= other.end


@dataclass(frozen=True)
class ShardFiles:
    """The files of a packed data set, by the columns of its index."""

    columns: Columns
    store_config: StoreConfig
    cache_config: CacheConfig | None
    patience_s: float = 0.0
    """How long a read is tried again that the store has given up on: thousands of reads are under way, and the store's own tries are
    bounded for one."""

    def read_images(self, rows: Int[np.ndarray, " K"], *, clip: str) -> list[bytes]:
        """As Files has it."""
        return self._read("image", rows, clip)

    def read_sweeps(self, rows: Int[np.ndarray, " K"], *, clip: str) -> list[bytes]:
        """As Files has it."""
        return self._read("sweep", rows, clip)

    def name_image(self, row: int) -> str:
        """As Files has it."""
        return self._name(self._spans("image", np.array([row]))[0])

    def name_sweep(self, row: int) -> str:
        """As Files has it."""
        return self._name(self._spans("sweep", np.array([row]))[0])

    def plan_images(self, rows: Int[np.ndarray, " K"]) -> list[Span]:
        """The requests that `read_images` makes where nothing is cached."""
        return join_spans(self._spans("image", rows))

    def plan_sweeps(self, rows: Int[np.ndarray, " K"]) -> list[Span]:
        """The requests that `read_sweeps` makes where nothing is cached."""
        return join_spans(self._spans("sweep", rows))

    def __reduce__(self) -> tuple[type["ShardFiles"], tuple[Columns, StoreConfig, CacheConfig | None, float]]:
        return type(self), (self.columns, self.store_config, self.cache_config, self.patience_s)

    @cached_property
    def _store(self) -> Store:
        return open_store(self.columns.header["root"], self.store_config)

    @cached_property
    def _cache(self) -> RangeCache | None:
        return RangeCache(self.cache_config) if self.cache_config else None

    def _read(self, kind: str, rows: Int[np.ndarray, " K"], clip: str) -> list[bytes]:
        spans = self._spans(kind, rows)
        wanted = dict(zip(spans, self.columns[f"{kind}_crc32"][rows].tolist(), strict=True))
        files: dict[Span, bytes] = {}
        for joined in join_spans(list(wanted)):
            inside = {span: checksum for span, checksum in wanted.items() if span.is_in(joined)}
            data = self._fetch_whole(joined, inside, clip)
            files |= {span: bytes(cut(data, joined, span)) for span in inside}
        return [files[span] for span in spans]

    def _fetch_whole(self, joined: Span, inside: Mapping[Span, int], clip: str) -> memoryview:
        """A range whose files have their checksums, kept or fetched; once more where they do not, for a byte may flip on the way."""
        key = f"{self._store.uri}/{self._shard(joined)} {joined.offset} {joined.bytes}"
        kept = self._cache.get(key) if self._cache else None
        if kept is not None and not find_damaged(memoryview(kept), joined, inside):
            count("cache_hits")
            return memoryview(kept)
        for _ in range(2):
            data = self._fetch(joined, clip)
            damaged = find_damaged(memoryview(data), joined, inside)
            if damaged:
                continue
            if self._cache:
                self._cache.put(key, data)
            return memoryview(data)
        raise ClipError(clip, f"{self._name(damaged[0])} is damaged: its bytes have another checksum than the index says")

    def _fetch(self, joined: Span, clip: str) -> bytes:
        try:
            with waiting():
                data = _trying_for(self.patience_s)(self._store.get, self._shard(joined), joined.offset, joined.bytes)
        except ObjectMissingError as error:
            raise ClipError(clip, str(error)) from error
        count("fetches")
        count("bytes", float(len(data)))
        return data

    def _spans(self, kind: str, rows: Int[np.ndarray, " K"]) -> list[Span]:
        columns = [self.columns[f"{kind}_{name}"][rows].tolist() for name in ("shard", "offset", "bytes")]
        return [Span(*values) for values in zip(*columns, strict=True)]

    def _shard(self, span: Span) -> str:
        return self.columns["shard_key"][span.shard].decode()

    def _name(self, span: Span) -> str:
        return f"{self.columns.header['root']}/{self._shard(span)}, {span.bytes} bytes from {span.offset} on,"


def _trying_for(seconds: float) -> Retrying:
    """Repeats what a store has given up on for the moment; what is not there will not come."""
    return Retrying(
        retry=retry_if_exception(lambda error: isinstance(error, StoreError) and not isinstance(error, ObjectMissingError)),
        stop=stop_after_delay(seconds),
        wait=wait_random_exponential(multiplier=0.5, max=10),
        reraise=True,
    )


def cut(data: memoryview, joined: Span, span: Span) -> memoryview:
    """The bytes of `span` from those of the range that it lies in."""
    return data[span.offset - joined.offset :][: span.bytes]


def find_damaged(data: memoryview, joined: Span, checksums: Mapping[Span, int]) -> list[Span]:
    """The files in a range whose bytes do not have their CRC-32."""
    return [span for span, checksum in checksums.items() if zlib.crc32(cut(data, joined, span)) != checksum]


def join_spans(spans: Sequence[Span]) -> list[Span]:
    """The ranges to fetch for `spans`, in the order of shards and offsets: as few as the bytes between them that are allowed buy."""
    ordered = sorted(set(spans))
    gaps = {
        place: after.offset - before.end for place, (before, after) in enumerate(pairwise(ordered)) if after.shard == before.shard
    }
    closed = _choose_gaps(gaps, allowed=_MOST_WASTE * sum(span.bytes for span in ordered))
    joined: list[Span] = []
    for place, span in enumerate(ordered):
        if place - 1 in closed:
            joined[-1] = Span(span.shard, joined[-1].offset, span.end - joined[-1].offset)
        else:
            joined.append(span)
    return joined


def _choose_gaps(gaps: Mapping[int, int], *, allowed: float) -> set[int]:
    """Which gaps to close, from the smallest on, for `allowed` bytes in all; those that a tar leaves between its members are free."""
    closed = set()
    for place in sorted(gaps, key=lambda place: gaps[place]):
        allowed -= gaps[place] if gaps[place] > _FREE_GAP_BYTES else 0
        if allowed < 0:
            break
        closed.add(place)
    return closed
