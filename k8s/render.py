"""From a run config and a cluster config to a folder of plain YAML that kubectl, kustomize and GitOps take as it is.

One object a file, and a kustomization.yaml that lists them in the order in which they are applied. The same input gives the same bytes.

Left to whom: what is in an object is the business of the module that builds it; sending them to a cluster is not done here.
"""

from pathlib import Path
from typing import Any

import yaml

from k8s.job import build_job
from k8s.jobset import build_jobset
from k8s.pytorchjob import build_pytorchjob
from k8s.surroundings import (
    build_config_map,
    build_disruption_budget,
    build_network_policy,
    build_pod_group,
    build_pod_monitor,
    build_service,
    build_service_account,
)
from k8s.trainjob import build_runtime, build_trainjob
from k8s.workload import Manifest, Workload
from trainer.errors import ConfigError

_KUSTOMIZATION = "kustomization.yaml"


def render(workload: Workload) -> dict[str, Manifest]:
    """The objects of a run by file name, in the order in which they are applied: pods come last."""
    cluster = workload.cluster
    objects = {"config.yaml": build_config_map(workload)}
    if cluster.service_account is None:
        objects["service_account.yaml"] = build_service_account(workload)
    objects["network_policy.yaml"] = build_network_policy(workload)
    objects["disruption_budget.yaml"] = build_disruption_budget(workload)
    if cluster.monitoring.pod_monitor:
        objects["pod_monitor.yaml"] = build_pod_monitor(workload)
    if cluster.queue and cluster.queue.kind == "volcano" and cluster.flavour in ("job", "jobset"):
        objects["pod_group.yaml"] = build_pod_group(workload, cluster.queue.name)
    return objects | _render_owners(workload)


def _render_owners(workload: Workload) -> dict[str, Manifest]:
    """What owns the pods, and the Service where it does not make one itself."""
    match workload.cluster.flavour:
        case "job":
            service = {"service.yaml": build_service(workload)} if workload.cluster.nodes > 1 else {}
            return service | {"job.yaml": build_job(workload)}
        case "jobset":
            return {"jobset.yaml": build_jobset(workload)}
        case "trainjob":
            return {"runtime.yaml": build_runtime(workload), "trainjob.yaml": build_trainjob(workload)}
        case "pytorchjob":
            return {"pytorchjob.yaml": build_pytorchjob(workload)}


def render_files(workload: Workload) -> dict[str, str]:
    """The same as text, with the kustomization that lists it."""
    objects = render(workload)
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": list(objects)}
    return {name: dump_manifest(manifest) for name, manifest in (objects | {_KUSTOMIZATION: kustomization}).items()}


def write_files(files: dict[str, str], folder: Path) -> None:
    """Put `files` into `folder`; ConfigError where something else lies there, which a later apply would take along."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strangers = sorted(path.name for path in folder.iterdir() if path.name not in files)
        if strangers:
            raise ConfigError(
                f"manifests were to be written to {folder}, which also holds {', '.join(strangers)}; give another folder or clear it"
            )
        for name, text in files.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise ConfigError(f"manifests cannot be written to {folder}: {error}; give another folder with -o") from error


def dump_manifest(manifest: Manifest) -> str:
    """YAML as people write it: keys in our order, texts of several lines as they are."""
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, lists indented, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        """Two equal parts are both written out."""
        del data
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Lists stand one step to the right of their key."""
        del indentless
        super().increase_indent(flow, False)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
