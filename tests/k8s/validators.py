"""Strict validators of manifests, each from a package of its own: what is wrong with one, as text.

The schemas of Kubernetes 1.27 to 1.37 know no CRDs. JobSet and Trainer come as pydantic models, which keep silent about keys that they
do not know: so what they read is written out again and compared. Pods inside of CRDs are checked against Kubernetes' own schemas as well.
"""

import json
from collections.abc import Iterator
from typing import Any

import kubernetes_validate

VERSIONS = tuple(f"1.{minor}" for minor in range(27, 38))
IN_PLACE_VERSIONS = tuple(f"1.{minor}" for minor in range(34, 38))

Manifest = dict[str, Any]


def find_problems(manifest: Manifest, versions: tuple[str, ...] = VERSIONS) -> list[str]:
    """What the validator of its kind says against `manifest`, nothing if it is right."""
    match manifest["kind"]:
        case "JobSet" | "TrainJob" | "ClusterTrainingRuntime":
            return [*_find_trainer_problems(manifest), *_find_inner_problems(manifest, versions)]
        case "PyTorchJob":
            return [*_find_pytorchjob_problems(manifest), *_find_inner_problems(manifest, versions)]
        case "PodMonitor" | "PrometheusRule":
            return _find_operator_problems(manifest)
    return _find_kubernetes_problems(manifest, versions)


def _find_kubernetes_problems(manifest: Manifest, versions: tuple[str, ...]) -> list[str]:
    problems = []
    for version in versions:
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            problems.append(f"{version} {error.json_path}: {error.message}")
    return problems


def _find_inner_problems(manifest: Manifest, versions: tuple[str, ...]) -> list[str]:
    inner = [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "inner"}, "spec": spec}
        for spec in _find(manifest, "podFailurePolicy")
    ]
    if manifest["kind"] == "PyTorchJob":
        inner = [
            {"apiVersion": "v1", "kind": "PodTemplate", "template": spec["template"]}
            for spec in _find(manifest, "restartPolicy")
            if "template" in spec
        ]
    return [problem for each in inner for problem in _find_kubernetes_problems(each, versions)]


def _find(content: Any, key: str) -> Iterator[Manifest]:
    """Mappings in `content` that have `key`."""
    children = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    if isinstance(content, dict) and key in content:
        yield content
    for child in children:
        yield from _find(child, key)


def _find_trainer_problems(manifest: Manifest) -> list[str]:
    from kubeflow_trainer_api import models

    kinds = {
        "JobSet": models.JobsetV1alpha2JobSet,
        "TrainJob": models.TrainerV1alpha1TrainJob,
        "ClusterTrainingRuntime": models.TrainerV1alpha1ClusterTrainingRuntime,
    }
    try:
        read = kinds[manifest["kind"]].from_dict(manifest)
    except ValueError as error:
        return [str(error)]
    return _find_lost(manifest, json.loads(read.to_json()))


def _find_operator_problems(manifest: Manifest) -> list[str]:
    from cloudcoil.models.prometheus_operator import v1

    try:
        read = getattr(v1, manifest["kind"]).model_validate(manifest)
    except ValueError as error:
        return [str(error)]
    return _find_lost(manifest, read.model_dump(mode="json", by_alias=True, exclude_none=True))


def _find_pytorchjob_problems(manifest: Manifest) -> list[str]:
    from kubeflow.training import models

    return _find_unknown(manifest, models.KubeflowOrgV1PyTorchJob, models)


def _find_unknown(content: Any, model: Any, models: Any, path: str = "$") -> list[str]:
    """Keys and types that a model of openapi-generator does not know; it would not say so itself."""
    keys = {json_name: name for name, json_name in model.attribute_map.items()}
    problems = []
    for key, value in content.items():
        place = f"{path}.{key}"
        if key not in keys:
            problems.append(f"{place}: unknown")
            continue
        kind = model.openapi_types[keys[key]]
        inner = kind.removeprefix("dict(str, ").rstrip(")") if kind.startswith("dict") else kind
        if inner.startswith("KubeflowOrg"):
            parts = value.items() if kind.startswith("dict") else [("", value)]
            problems += [problem for _, part in parts for problem in _find_unknown(part, getattr(models, inner), models, place)]
        elif kind in ("int", "str", "bool") and type(value).__name__ != kind:
            problems.append(f"{place}: {value!r} is no {kind}")
    return problems


def _find_lost(sent: Any, kept: Any, path: str = "$") -> list[str]:
    """Paths of what is in `sent` and not, or not so, in `kept`."""
    if isinstance(sent, dict) and isinstance(kept, dict):
        lost = [f"{path}.{key}: unknown" for key in sent if key not in kept]
        return lost + [
            problem for key in sent.keys() & kept.keys() for problem in _find_lost(sent[key], kept[key], f"{path}.{key}")
        ]
    if isinstance(sent, list) and isinstance(kept, list) and len(sent) == len(kept):
        return [
            problem
            for place, pair in enumerate(zip(sent, kept, strict=True))
            for problem in _find_lost(*pair, f"{path}[{place}]")
        ]
    return [] if sent == kept or str(sent) == str(kept) else [f"{path}: {sent!r} became {kept!r}"]
