"""All checks on all ranks, and what they come to.

    accelerate launch --config_file launch/accelerate/fsdp2.yaml -m odonata doctor RUN.yaml

Every rank takes part in every collective whatever it has found, so that one bad node does not hang the others; what is a node's business is
looked at by its local rank 0. Two things are judged where all are heard: that versions agree, and clocks.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.config.run import RunConfig
from trainer.doctor.collectives import check_collectives
from trainer.doctor.finding import Finding, look
from trainer.doctor.machine import VERSIONS, check_devices, check_disk, check_shared_memory, check_versions
from trainer.doctor.storage import check_clock, check_data, check_store, open_run_store
from trainer.errors import EXIT_DO_NOT_RETRY, EXIT_DONE, EXIT_RETRY
from trainer.parallel.launch import Launch, process_group

_MEETING_S = 120.0
"""For ranks that do not come: less than a run would wait."""


@dataclass(frozen=True)
class Diagnosis:
    """One finding, and the ranks that made it."""

    finding: Finding
    ranks: Sequence[int]


def examine(config: RunConfig, launch: Launch) -> list[Diagnosis]:
    """Look at everything, on every rank; all ranks get the same answer. Peers that are lost on the way are torch's errors."""
    with process_group(launch, timeout_s=min(config.parallel.timeout_s, _MEETING_S)):
        findings = [look("collectives", lambda: check_collectives(launch)), check_versions()]
        apart_s = _measure_clocks(launch)
        if launch.local_rank == 0:
            findings += _examine_node(config, launch)
        of_ranks = _hear_all(findings, launch)
    tolerance_s = _tolerance_s(config)
    return [*group_findings(of_ranks), *compare_versions(of_ranks), *compare_clocks(apart_s, tolerance_s)]


def choose_exit_code(diagnoses: Sequence[Diagnosis]) -> int:
    """2 where something has to be changed, else 75 where something may pass, else 0."""
    wrong = [each.finding for each in diagnoses if each.finding.cure]
    if not wrong:
        return EXIT_DONE
    return EXIT_RETRY if all(finding.may_pass for finding in wrong) else EXIT_DO_NOT_RETRY


def _examine_node(config: RunConfig, launch: Launch) -> list[Finding]:
    store = open_run_store(config)
    return [
        check_devices(launch),
        check_shared_memory(launch),
        look("disk", lambda: check_disk(config, Path(tempfile.gettempdir()))),
        look("store", lambda: check_store(store)),
        look("clock", lambda: check_clock(store, tolerance_s=_tolerance_s(config))),
        look("data", lambda: check_data(config)),
    ]


def _tolerance_s(config: RunConfig) -> float:
    return config.checkpoint.claim_expiry_s / 4  # how often a claim is renewed


def _hear_all(own: Any, launch: Launch) -> list[Any]:
    if not dist.is_initialized():
        return [own]
    heard: list[Any] = [None] * launch.world_size
    dist.all_gather_object(heard, own)
    return heard


def _measure_clocks(launch: Launch) -> list[float]:
    """What the clock of each rank says at the same moment, as far as a barrier makes one."""
    if dist.is_initialized():
        dist.barrier()
    return _hear_all(time.time(), launch)


def group_findings(of_ranks: Sequence[Sequence[Finding]]) -> list[Diagnosis]:
    """What is wrong in the same way on several ranks as one, and what is well by its name, in the words of the first rank."""
    groups: dict[tuple[str, str], tuple[Finding, list[int]]] = {}
    for rank, findings in enumerate(of_ranks):
        for finding in findings:
            groups.setdefault((finding.name, finding.value if finding.cure else ""), (finding, []))[1].append(rank)
    return [Diagnosis(finding, ranks) for finding, ranks in groups.values()]


def compare_versions(of_ranks: Sequence[Sequence[Finding]]) -> list[Diagnosis]:
    """What is wrong where ranks run different versions."""
    ranks: dict[str, list[int]] = {}
    for rank, findings in enumerate(of_ranks):
        ranks.setdefault(next(finding.value for finding in findings if finding.name == VERSIONS), []).append(rank)
    if len(ranks) == 1:
        return []
    told = "; ".join(f"ranks {', '.join(map(str, running))}: {versions}" for versions, running in ranks.items())
    return [Diagnosis(Finding(VERSIONS, f"differ between {told}", "start one image on all nodes"), range(len(of_ranks)))]


def compare_clocks(clocks: Sequence[float], tolerance_s: float) -> list[Diagnosis]:
    """How far the clocks of several ranks are apart, and whether that is too far."""
    if len(clocks) == 1:
        return []
    apart_s = max(clocks) - min(clocks)
    cure = "set the clocks of the nodes, as with NTP" if apart_s > tolerance_s else ""
    return [Diagnosis(Finding("clocks of ranks", f"{apart_s:.1f} s apart", cure), range(len(clocks)))]
