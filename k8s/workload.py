"""A run on a cluster, checked and resolved: what every object of every flavour is built from.

The run config is changed in four places that only the cluster knows, and written out in full: the world size that has to start, the
length of the grace period, where S3 is, and nothing else. It goes into a ConfigMap together with accelerate's config file (and
DeepSpeed's), so what a pod runs can be read with kubectl. The hash of these files is in labels and in the ConfigMap's name.

Left to whom: rules of either file alone are in `trainer.config` and `cluster`; how the files get into a pod is `pod`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from k8s import labels
from k8s.cluster import Claim, ClusterConfig
from k8s.forms import count_bytes
from trainer.config.data import NuscenesData, ShardsData
from trainer.config.load import dump_run_config
from trainer.config.run import RunConfig
from trainer.config.store import StoreConfig
from trainer.config.training import split_batch
from trainer.errors import ConfigError

_LAUNCH = Path(__file__).parents[1] / "launch"
_HTTPS = 443

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """One run under its name, resolved for one cluster."""

    name: str
    run: RunConfig
    cluster: ClusterConfig

    @cached_property
    def files(self) -> dict[str, str]:
        """The files of the ConfigMap by name."""
        accelerate = self._accelerate_config()
        files = {"run.yaml": dump_run_config(self.run)}
        deepspeed = accelerate.get("deepspeed_config", {}).get("deepspeed_config_file")
        if deepspeed:
            files["deepspeed.json"] = (_LAUNCH.parent / deepspeed).read_text()
            accelerate["deepspeed_config"]["deepspeed_config_file"] = f"{labels.CONFIG_FOLDER}/deepspeed.json"
        return files | {"accelerate.yaml": yaml.safe_dump(accelerate, sort_keys=False)}

    @property
    def hash(self) -> str:
        """Ten digits that differ where any of the files does."""
        return hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in sorted(self.files.items())).encode()).hexdigest()[:10]

    @property
    def config_name(self) -> str:
        """The ConfigMap of the files."""
        return f"{self.name}-{self.hash}"

    @property
    def service_account(self) -> str:
        """The account of the pods, made for them or lent."""
        return self.cluster.service_account or self.name

    @property
    def labels(self) -> dict[str, str]:
        """On every object and pod."""
        return {
            "app.kubernetes.io/name": labels.APPLICATION,
            "app.kubernetes.io/instance": self.name,
            "app.kubernetes.io/managed-by": labels.APPLICATION,
            labels.RUN: self.name,
            labels.CONFIG: self.hash,
            labels.FLAVOUR: self.cluster.flavour,
            labels.ENGINE: self.cluster.engine,
        }

    @property
    def metrics_ports(self) -> list[int]:
        """The ports of /metrics by local rank."""
        first = self.run.observe.metrics_port
        assert first is not None, "build_workload has looked"
        return list(range(first, first + self.cluster.processes))

    @property
    def store_ports(self) -> list[int]:
        """Ports at which stores and proxies of the run are reached."""
        return sorted(
            {_HTTPS} | {_port(url) for store in _stores(self.run) for url in (store.endpoint_url, store.proxy_url) if url}
        )

    def describe(self, kind: str, api_version: str, name: str | None = None, **annotations: str) -> Manifest:
        """The head of an object: what it is, its name (the run's by default), its namespace and labels."""
        metadata: Manifest = {"name": name or self.name, "namespace": self.cluster.namespace, "labels": self.labels}
        if annotations:
            metadata["annotations"] = annotations
        return {"apiVersion": api_version, "kind": kind, "metadata": metadata}

    def _accelerate_config(self) -> dict[str, Any]:
        cluster = self.cluster
        engine = _LAUNCH / "accelerate" / f"{cluster.engine}.yaml"
        config: dict[str, Any] = yaml.safe_load(engine.read_text())
        config |= {"num_machines": cluster.nodes, "num_processes": cluster.world_size}
        config["mixed_precision"] = cluster.mixed_precision
        config["same_network"] = True  # ranks meet at the main address, in the order of their nodes
        if "parallelism_config" in config:
            config["parallelism_config"] |= {
                "parallelism_config_dp_replicate_size": cluster.nodes,
                "parallelism_config_dp_shard_size": cluster.processes,
            }
        return config


def build_workload(run: RunConfig, cluster: ClusterConfig, *, name: str | None) -> Workload:
    """`run` resolved for `cluster`; ConfigError where the two do not fit each other."""
    split_batch(cluster.world_size, run.parallel, run.global_batch)
    _check_precision(run, cluster)
    _check_mesh(cluster)
    _check_ports(run, cluster)
    _check_places(run, cluster)
    return Workload(labels.choose_name(run.run.uri, name), _resolve(run, cluster), cluster)


def _resolve(run: RunConfig, cluster: ClusterConfig) -> RunConfig:
    if run.parallel.world_size not in (None, cluster.world_size):
        raise ConfigError(
            f"parallel.world_size asks for {run.parallel.world_size} processes, and {cluster.nodes} nodes of {cluster.processes} make "
            f"{cluster.world_size}; drop parallel.world_size or change the nodes"
        )
    content = run.model_dump(mode="json")
    content["parallel"]["world_size"] = cluster.world_size
    content["checkpoint"]["grace_s"] = float(cluster.grace_s)
    if cluster.s3_endpoint_url:
        for section in (content, content["data"]):
            if "store" in section:
                section["store"]["endpoint_url"] = cluster.s3_endpoint_url
    return RunConfig.model_validate(content)


def _check_precision(run: RunConfig, cluster: ClusterConfig) -> None:
    asked = {"no": "fp32", "bf16": "bf16"}[cluster.mixed_precision]
    if run.parallel.precision not in (None, asked):
        raise ConfigError(
            f"the run's parallel.precision is {run.parallel.precision} and the cluster's precision is {cluster.mixed_precision}; "
            "make them agree or drop the run's"
        )


def _check_mesh(cluster: ClusterConfig) -> None:
    if cluster.engine == "hsdp" and (cluster.nodes == 1 or cluster.processes == 1):
        raise ConfigError(
            f"engine hsdp shards inside a node and replicates across nodes, and there are {cluster.nodes} nodes of {cluster.processes} "
            "ranks; take engine fsdp2"
        )


def _check_ports(run: RunConfig, cluster: ClusterConfig) -> None:
    first = run.observe.metrics_port
    if not first or first < 1024 or first + cluster.processes > 65536:
        raise ConfigError(
            f"observe.metrics_port is {first}, and a pod is probed at that port (one more for each local rank), as a user that may not "
            "take those below 1024; set it to 9400"
        )


def _check_places(run: RunConfig, cluster: ClusterConfig) -> None:
    """Each folder that the run reads or writes is mounted, and a run's own place outlives its pods."""
    _check_own_place(run.run.uri, cluster.claims)
    writable = [claim.path for claim in cluster.claims if claim.writable]
    mounted = [claim.path for claim in cluster.claims]
    scratch = [labels.SCRATCH_FOLDER, "/tmp"]
    for key, place in _read_places(run):
        if not _is_remote(place) and not _lies_under(place, mounted):
            raise ConfigError(
                f"{key} {place} is not in the pods; give s3://, or mount it with claims and name the place under the mount (there are: "
                f"{', '.join(mounted) or 'none'})"
            )
    for key, folder in _written_folders(run):
        if not _lies_under(folder, [*scratch, *writable]):
            raise ConfigError(
                f"{key} is {folder}, and pods write to {', '.join([labels.SCRATCH_FOLDER, *writable])} alone; put it there"
            )
    cache = run.data.cache if isinstance(run.data, ShardsData) else None
    if cache and _lies_under(str(cache.folder), scratch) and cache.size_gb * 1e9 >= count_bytes(cluster.scratch):
        raise ConfigError(
            f"data.cache.size_gb is {cache.size_gb:g}, and scratch has {cluster.scratch}; lower the first or raise the second"
        )


def _check_own_place(uri: str, claims: Sequence[Claim]) -> None:
    """What a run writes is there when its pods are not."""
    under = [claim for claim in claims if _lies_under(uri, [claim.path])]
    if _is_remote(uri) or any(claim.writable for claim in under):
        return
    if under:
        raise ConfigError(
            f"run.uri {uri} lies under claim {under[0].claim}, which pods only read; set its writable: true, or give s3://bucket/prefix"
        )
    writable = ", ".join(claim.path for claim in claims if claim.writable) or "none"
    raise ConfigError(
        f"run.uri {uri} would lie on a pod's own disk and end with it; give s3://bucket/prefix, or a folder under a claim with "
        f"writable: true (there are: {writable})"
    )


def _read_places(run: RunConfig) -> list[tuple[str, str]]:
    places = [("warm_start.uri", run.warm_start.uri)] if run.warm_start else []
    if isinstance(run.data, ShardsData):
        return places + [(f"data.datasets.{place}.uri", dataset.uri) for place, dataset in enumerate(run.data.datasets)]
    return [*places, ("data.root", str(run.data.root))]


def _written_folders(run: RunConfig) -> list[tuple[str, str]]:
    folders = {}
    if isinstance(run.data, NuscenesData | ShardsData):
        folders["data.index_folder"] = run.data.index_folder
    if isinstance(run.data, ShardsData) and run.data.cache:
        folders["data.cache.folder"] = run.data.cache.folder
    return [(key, str(folder)) for key, folder in folders.items() if folder]


def _stores(run: RunConfig) -> list[StoreConfig]:
    return [run.store, run.data.store] if isinstance(run.data, ShardsData) else [run.store]


def _is_remote(place: str) -> bool:
    return place.startswith("s3://")


def _lies_under(place: str, folders: list[str]) -> bool:
    return any(Path(place).is_relative_to(folder) for folder in folders)


def _port(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (_HTTPS if parts.scheme == "https" else 80)
