"""A cluster's API server, through the official client: plain manifests in and out, and errors that say what to do.

The official client brings what is hard about reaching a cluster: kubeconfig, certificates, logins of clouds, proxies. Its typed models stay
out: what is sent are the manifests that `render` makes, and what comes back is looked at as it is, so kinds that it does not know (JobSet,
TrainJob) are like all others.

What the server says becomes one of ours: what has to be changed is a ConfigError, what may pass (quota, a server that does not
answer) a RetryError, and None where something that was looked for is not there.

Left to whom: which objects a run has is `render`'s, what they say of it `runs`.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import ConfigError, OdonataError, RetryError

Manifest = dict[str, Any]

_TIMEOUT_S = (5, 30)
"""To connect, and to wait for an answer."""
_APPLY = "application/apply-patch+yaml"
_MANAGER = "odonata"


@dataclass(frozen=True)
class Kind:
    """Where the API server has the objects of a kind."""

    api_version: str
    kind: str
    plural: str
    is_namespaced: bool = True
    comes_with: str = "Kubernetes 1.27 or later"
    """What a cluster needs to know it."""


_JOBSET, _TRAINER, _OPERATOR = "JobSet", "Kubeflow Trainer v2", "Kubeflow Training Operator v1"
KINDS = {
    kind.kind: kind
    for kind in (
        Kind("v1", "ConfigMap", "configmaps"),
        Kind("v1", "Event", "events"),
        Kind("v1", "Pod", "pods"),
        Kind("v1", "Service", "services"),
        Kind("v1", "ServiceAccount", "serviceaccounts"),
        Kind("batch/v1", "Job", "jobs"),
        Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies"),
        Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets"),
        Kind("monitoring.coreos.com/v1", "PodMonitor", "podmonitors", comes_with="the Prometheus operator"),
        Kind("scheduling.volcano.sh/v1beta1", "PodGroup", "podgroups", comes_with="Volcano"),
        Kind("jobset.x-k8s.io/v1alpha2", "JobSet", "jobsets", comes_with=_JOBSET),
        Kind("trainer.kubeflow.org/v1alpha1", "TrainJob", "trainjobs", comes_with=_TRAINER),
        Kind("trainer.kubeflow.org/v1alpha1", "ClusterTrainingRuntime", "clustertrainingruntimes", False, _TRAINER),
        Kind("kubeflow.org/v1", "PyTorchJob", "pytorchjobs", comes_with=_OPERATOR),
    )
}


class KindMissingError(ConfigError):
    """The cluster knows no objects of this kind."""


class NameTakenError(ConfigError):
    """An object of this name is there already."""


class Cluster:
    """One namespace of a cluster, as the user of a kubeconfig sees it."""

    def __init__(self, api: Any, namespace: str) -> None:
        self._api = api
        self.namespace = namespace
        self.url: str = api.configuration.host

    def get(self, kind: str, name: str) -> Manifest | None:
        """The object, if it is there."""
        with self._explaining(f"get {kind} {name}", kind):
            return self._call_or_none("GET", self._path(kind, name))

    def list(self, kind: str, selector: Mapping[str, str], **fields: str) -> list[Manifest]:
        """Objects with the labels of `selector` and the fields of `fields`; none where the kind is not known."""
        query = {"labelSelector": _join(selector), "fieldSelector": _join(fields)}
        with self._explaining(f"list {KINDS[kind].plural}", kind):
            found = self._call_or_none("GET", self._path(kind), {key: text for key, text in query.items() if text})
        return found["items"] if found else []

    def create(self, manifest: Manifest, *, dry_run: bool) -> Manifest:
        """Make an object that must not be there yet, as the server then has it; a `dry_run` goes through all its checks and makes none."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        with self._explaining(f"create {kind} {name}", kind):
            return self._call("POST", self._path(kind), _dry(dry_run), manifest)

    def apply(self, manifest: Manifest, *, dry_run: bool) -> Manifest:
        """Make an object, or make it what `manifest` says, by server-side apply."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        query = {"fieldManager": _MANAGER, "force": "true", **_dry(dry_run)}
        with self._explaining(f"apply {kind} {name}", kind):
            return self._call("PATCH", self._path(kind, name), query, manifest, content_type=_APPLY)

    def delete(self, kind: str, name: str, *, propagation: str = "Background") -> None:
        """Delete an object and what it owns; one that is gone is no error. `Foreground` keeps it until what it owns is gone."""
        with self._explaining(f"delete {kind} {name}", kind):
            self._call_or_none("DELETE", self._path(kind, name), body={"propagationPolicy": propagation})

    def read_log(self, pod: str, container: str, *, tail: int | None, follow: bool) -> Iterator[str]:
        """What a container has written, in pieces as they come; with `follow` until it ends."""
        query = {"container": container, "follow": str(follow).lower(), **({"tailLines": str(tail)} if tail is not None else {})}
        with self._explaining(f"read the log of pod {pod}", "Pod"):
            answer = self._call("GET", f"{self._path('Pod', pod)}/log", query, stream=True)
            try:
                for piece in answer.stream(1 << 16, decode_content=True):
                    yield piece.decode(errors="replace")
            finally:
                answer.release_conn()

    def fetch(self, pod: str, port: int, path: str) -> str:
        """What a pod answers at `path` of a port, asked by way of the API server."""
        with self._explaining(f"ask pod {pod} for {path}", "Pod"):
            answer = self._call("GET", f"{self._path('Pod', pod)}:{port}/proxy/{path}", stream=True)
            try:
                text: str = answer.read().decode()
            finally:
                answer.release_conn()
        return text

    def _path(self, kind: str, name: str | None = None) -> str:
        known = KINDS[kind]
        root = f"/apis/{known.api_version}" if "/" in known.api_version else f"/api/{known.api_version}"
        place = f"{root}/namespaces/{self.namespace}" if known.is_namespaced else root
        return f"{place}/{known.plural}" + (f"/{name}" if name else "")

    def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        *,
        content_type: str = "application/json",
        stream: bool = False,
    ) -> Any:
        return self._api.call_api(
            path,
            method,
            query_params=list((query or {}).items()),
            header_params={"Accept": "*/*" if stream else "application/json", "Content-Type": content_type},
            body=body,
            response_type="object",
            auth_settings=["BearerToken"],
            _return_http_data_only=True,
            _preload_content=not stream,
            _request_timeout=(_TIMEOUT_S[0], None) if stream and (query or {}).get("follow") == "true" else _TIMEOUT_S,
        )

    def _call_or_none(self, method: str, path: str, query: Mapping[str, str] | None = None, body: Manifest | None = None) -> Any:
        from kubernetes.client import ApiException

        try:
            return self._call(method, path, query, body)
        except ApiException as error:
            if error.status == 404:
                return None
            raise

    @contextmanager
    def _explaining(self, verb: str, kind: str) -> Iterator[None]:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        asked = f"the cluster at {self.url} was asked to {verb} in namespace {self.namespace}"
        try:
            yield
        except ApiException as error:
            raise _refused(asked, error, KINDS[kind], self.namespace) from error
        except HTTPError as error:
            raise RetryError(
                f"{asked} and does not answer: {error}; see that it runs and that this machine reaches it, or choose another with --context"
            ) from error


def connect(*, context: str | None, namespace: str | None, config_file: Path | None = None) -> Cluster:
    """The cluster of a kubeconfig: its current context, or the one that is named, and that context's namespace; nothing is asked yet."""
    from kubernetes import client, config

    settings, file = client.Configuration(), str(config_file) if config_file else None
    settings.retries = False
    try:
        config.load_kube_config(file, context=context, client_configuration=settings)
        contexts, current = config.list_kube_config_contexts(file)
    except (config.ConfigException, yaml.YAMLError, TypeError) as error:  # the last where it is YAML, and no mapping
        raise ConfigError(
            f"a cluster was to be found in the kubeconfig ({file or os.environ.get('KUBECONFIG') or '~/.kube/config'}) and there is none: "
            f"{error}; name a file in KUBECONFIG and a context of it with --context (kubectl config get-contexts lists them)"
        ) from error
    chosen = next((each for each in contexts if each["name"] == context), current)
    return Cluster(client.ApiClient(settings), namespace or chosen["context"].get("namespace") or "default")


def _refused(asked: str, error: Any, kind: Kind, namespace: str) -> OdonataError:
    """The error for a server's answer."""
    answer = _read_status(error.body)
    message = answer.get("message") or error.reason or f"status {error.status}"
    what: type[OdonataError] = ConfigError
    match error.status:
        case 401:
            cure = "it does not know you: log in again, or choose another user with --context"
        case 403 if "exceeded quota" in message:
            what, cure = RetryError, "wait until other runs end, ask for less, or have the quota raised"
        case 403:
            cure = "have somebody allow it: k8s/rbac/submitter.yaml is a Role that may"
        case 404 if answer.get("details", {}).get("kind") == "namespaces":
            cure = f"make namespace {namespace} first, or give another"
        case 404:
            what, cure = KindMissingError, f"{kind.kind} of {kind.api_version} comes with {kind.comes_with}: have that installed"
        case 409 if answer.get("reason") == "AlreadyExists":
            what, cure = NameTakenError, "give another name with --name"
        case 409 | 429 | 500 | 502 | 503 | 504:
            what, cure = RetryError, "try again in a while"
        case _:
            cure = "change the run config or the cluster config accordingly"
    return what(f"{asked} and says: {message}; {cure}")


def _read_status(body: Any) -> Manifest:
    """What the server said in its own words; nothing where something before it has answered."""
    try:
        answer = json.loads(body)
    except (TypeError, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _dry(dry_run: bool) -> dict[str, str]:
    return {"dryRun": "All"} if dry_run else {}


def _join(selector: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in selector.items())
