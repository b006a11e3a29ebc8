"""What a step sends: every collective with its payload, and how much of it crosses which link.

    FSDP2   gathers each block for the forward and again for the backward of every micro-step, the rest once, in the precision of the
            products; reduces and scatters float32 gradients once a step; HSDP then sums each shard over its replicas
    DDP     sums all float32 gradients once a step
    ZeRO    1: sums gradients once a step, 2: in every micro-step; both gather the new float32 weights. 3: gathers float32 weights in every
            micro-step, twice those whose next use is further than stage3_max_reuse_distance, reduces and scatters gradients in each,
            and gathers small weights, which stay, once a step

The payload of a collective is its whole tensor, as the largest buffer of one rank has it. Over g ranks on m nodes, k = g / m on each, every
rank gets (g - 1) / g of the payload, of which (m - 1) / m has to come into a node once and is spread over the k network cards of its ranks;
the rest crosses NVLink. Sums cost twice that: this is the traffic of NCCL's rings, which go through a node's ranks one after the other.
Their steps cost latency: (g - m) hops over NVLink and m - 1 over the network a pass; sums may go up and down a tree instead, k - 1 hops
inside a node and log2(m) between nodes each way. What a hop takes is from NCCL's own model (src/graph/tuning.cc, protocol Simple).

Left out: agreeing on a loss and a norm, a few bytes a step.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from trainer.hardware import Gpu
from trainer.plan.setup import Setup
from trainer.plan.weights import BYTES, Unit, Weights

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]
_PASSES: dict[Kind, int] = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
_RING_HOPS_S = (3.4e-6, 9.6e-6)
_TREE_HOPS_S = (28e-6, 50e-6)
"""Over NVLink, and over the network."""
_DDP_BUCKET_BYTES = 25.0 * 2**20


@dataclass(frozen=True)
class Collective:
    """One that is issued `count` times a step."""

    kind: Kind
    payload_bytes: float
    ranks: int
    nodes: int
    count: int = 1

    @property
    def network_bytes(self) -> float:
        """Through the network card of each rank, in a step."""
        return self.count * _PASSES[self.kind] * self.payload_bytes * (self.nodes - 1) / self.ranks

    @property
    def nvlink_bytes(self) -> float:
        """Over the NVLink of each rank, in a step."""
        whole = self.count * _PASSES[self.kind] * self.payload_bytes * (self.ranks - 1) / self.ranks
        return whole - self.network_bytes

    def latency_s(self) -> float:
        """Of the hops, in a step."""
        across = self.nodes - 1
        ring_s = (self.ranks - self.nodes) * _RING_HOPS_S[0] + across * _RING_HOPS_S[1]
        tree_s = (self.ranks / self.nodes - 1) * _TREE_HOPS_S[0] + math.log2(self.nodes) * _TREE_HOPS_S[1]
        return self.count * _PASSES[self.kind] * (min(ring_s, tree_s) if self.kind == "all_reduce" else ring_s)


@dataclass(frozen=True)
class Wire:
    """All collectives of a step."""

    collectives: tuple[Collective, ...]

    def payload_bytes(self) -> dict[Kind, float]:
        """By kind, in a step."""
        sums: dict[Kind, float] = dict.fromkeys(_PASSES, 0.0)
        for one in self.collectives:
            sums[one.kind] += one.count * one.payload_bytes
        return sums

    @property
    def nvlink_bytes(self) -> float:
        return sum((one.nvlink_bytes for one in self.collectives), 0.0)

    @property
    def network_bytes(self) -> float:
        return sum((one.network_bytes for one in self.collectives), 0.0)

    def nvlink_s(self, gpu: Gpu) -> float:
        """Inside nodes; hops that stay there belong to it."""
        inside = sum(one.latency_s() for one in self.collectives if one.nodes == 1)
        return self.nvlink_bytes / gpu.nvlink_bytes_per_s + inside

    def network_s(self, gpu: Gpu) -> float:
        """Between nodes, all hops of rings that span several."""
        across = sum(one.latency_s() for one in self.collectives if one.nodes > 1)
        return self.network_bytes / gpu.network_bytes_per_s + across


def list_collectives(weights: Weights, setup: Setup, *, peer_bytes: float = 0.0, peer_gradient_bytes: float = 0.0) -> Wire:
    """The collectives of a step; the two last are what a sample gives to contrasts over all ranks, and gets back from them."""
    match setup.engine:
        case "single":
            return Wire(())
        case "fsdp2" | "hsdp":
            listed = _list_fsdp(weights, setup)
        case "ddp":
            listed = list(_in_buckets(setup, "all_reduce", BYTES * weights.learning, _DDP_BUCKET_BYTES))
        case "zero1" | "zero2":
            listed = _list_zero_below_three(weights, setup)
        case "zero3":
            listed = _list_zero_three(weights, setup)
    samples = setup.gpus * setup.micro_batch
    listed += [
        _over(setup, "all_gather", samples * peer_bytes, setup.gpus, count=setup.micro_steps),
        _over(setup, "all_reduce", samples * peer_gradient_bytes, setup.gpus, count=setup.micro_steps),
    ]
    return Wire(tuple(one for one in listed if one.payload_bytes))


def gathered_bytes(unit: Unit, setup: Setup) -> float:
    """What FSDP2's gather of `unit` brings together."""
    size = BYTES if setup.precision == "fp32" or unit.is_float32 else 2.0
    return size * unit.padded_elements(setup.shards)


def _list_fsdp(weights: Weights, setup: Setup) -> list[Collective]:
    listed = []
    for unit in weights.units:
        twice = unit.is_block and unit.learns
        gathers = setup.micro_steps * (2 if twice else 1)
        reduced = BYTES * unit.padded_elements(setup.shards, learning=True)
        listed.append(_over(setup, "all_gather", gathered_bytes(unit, setup), setup.shards, count=gathers))
        listed.append(_over(setup, "reduce_scatter", reduced, setup.shards))
        listed.append(_across(setup, reduced / setup.shards))
    return [one for one in listed if one.ranks > 1]


def _list_zero_below_three(weights: Weights, setup: Setup) -> list[Collective]:
    bucket_bytes = BYTES * setup.zero.reduce_bucket_size
    reductions = setup.micro_steps if setup.engine == "zero2" else 1
    gathered = BYTES * weights.learning if setup.gpus > 1 else 0.0
    return [
        *_in_buckets(setup, "all_reduce", BYTES * weights.learning, bucket_bytes, count=reductions),
        _over(setup, "all_gather", gathered, setup.gpus),
    ]


def _list_zero_three(weights: Weights, setup: Setup) -> list[Collective]:
    small = sum(w.elements for w in weights.all if w.elements < setup.zero.stage3_param_persistence_threshold)
    large = weights.elements - small
    gathered, reduced = BYTES * (large + regathered_elements(large, setup)), BYTES * weights.learning
    gathers = [
        *_in_buckets(setup, "all_gather", gathered, BYTES * setup.zero.stage3_prefetch_bucket_size, count=setup.micro_steps),
        _over(setup, "all_gather", BYTES * small, setup.gpus),
    ]
    reductions = _in_buckets(setup, "reduce_scatter", reduced, BYTES * setup.zero.reduce_bucket_size, count=setup.micro_steps)
    return [*(gathers if setup.gpus > 1 else []), *reductions]


def regathered_elements(elements: int, setup: Setup) -> int:
    """Of weights that ZeRO-3 gathers, those that it frees after the forward: an element x before the end comes again 2 x later."""
    return max(0, elements - setup.zero.stage3_max_reuse_distance // 2)


def _in_buckets(setup: Setup, kind: Kind, payload_bytes: float, bucket_bytes: float, *, count: int = 1) -> Iterable[Collective]:
    buckets = math.ceil(payload_bytes / bucket_bytes)
    return [_over(setup, kind, payload_bytes / buckets, setup.gpus, count=count * buckets)]


def _over(setup: Setup, kind: Kind, payload_bytes: float, ranks: int, *, count: int = 1) -> Collective:
    """Over neighbouring ranks, which fill node after node."""
    return Collective(kind, payload_bytes, ranks, nodes=max(1, ranks // setup.gpus_per_node), count=count)


def _across(setup: Setup, payload_bytes: float) -> Collective:
    """A sum over the replicas of a shard, which lie `setup.shards` ranks apart."""
    nodes = min(setup.replicas, max(1, setup.gpus // setup.gpus_per_node))
    return Collective("all_reduce", payload_bytes, setup.replicas, nodes=nodes)
