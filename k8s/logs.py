"""The logs of a run's pods, those of the node that failed first.

When one rank fails, all others lose their peer and say so at length; what one wants to read is the pod whose exit code is the gravest, and
among equals the one that ended first.

Left to whom: which code means what is in `trainer.errors`, that the pod's is the gravest of its ranks' in `entrypoint`.
"""

from collections.abc import Iterator, Sequence

from k8s.client import Cluster, Manifest
from k8s.runs import KnownRun, read_container, read_exit, read_node_rank
from trainer.errors import EXIT_DO_NOT_RETRY, EXIT_DONE, EXIT_REFUSED, EXIT_RETRY, ConfigError

_GRAVEST_FIRST = (EXIT_DO_NOT_RETRY, EXIT_REFUSED)
ASKED_FOR_A_RETRY = (EXIT_RETRY, 143)
"""143 is a PyTorchJob's word for it."""
_MEANING = {
    EXIT_DONE: "done",
    EXIT_DO_NOT_RETRY: "config, data or checkpoint wrong, or the loss diverged: no use trying again",
    EXIT_REFUSED: "another writer holds the run: no use trying again",
    EXIT_RETRY: "asks for another try",
    137: "killed, perhaps for want of memory",
    143: "asks for another try",
}


def read_logs(cluster: Cluster, run: KnownRun, *, node: int | None, follow: bool, tail: int | None) -> Iterator[str]:
    """What the pods of `run`, or of one node, have written, each under a line that says which; `follow` reads the first to its end."""
    pods = [pod for pod in order_pods(run.pods) if node in (None, read_node_rank(pod))]
    if not pods:
        ranks = ", ".join(sorted({str(read_node_rank(pod)) for pod in run.pods})) or "none"
        which = "a pod" if node is None else f"a pod of node {node}"
        raise ConfigError(
            f"the log of {which} of run {run.name} was asked for and there is none; there are nodes: {ranks}. Logs go with their pods: "
            "what the run has recorded is in its store (odonata view)"
        )
    for pod in pods[:1] if follow else pods:
        yield f"== node {read_node_rank(pod)}, pod {pod['metadata']['name']}: {_describe_state(pod)}\n"
        if read_container(pod).get("state", {}).keys() & {"running", "terminated"}:
            yield from cluster.read_log(pod["metadata"]["name"], pod["spec"]["containers"][0]["name"], tail=tail, follow=follow)


def order_pods(pods: Sequence[Manifest]) -> list[Manifest]:
    """Those that failed by how grave that is, then those that run, then those that are done."""

    def key(pod: Manifest) -> tuple[int, str, int]:
        ended = read_exit(pod)
        finished = (ended or {}).get("finishedAt") or ""
        return _gravity(ended["exitCode"] if ended else None), finished, read_node_rank(pod)

    return sorted(pods, key=key)


def describe_exit(code: int) -> str:
    """An exit code of a pod, and what it means."""
    return f"ended with {code} ({_MEANING.get(code, 'a defect')})"


def _gravity(code: int | None) -> int:
    if code is None:
        return 4
    if code in _GRAVEST_FIRST:
        return _GRAVEST_FIRST.index(code)
    return 5 if code == EXIT_DONE else 3 if code in ASKED_FOR_A_RETRY else 2


def _describe_state(pod: Manifest) -> str:
    ended = read_exit(pod)
    return describe_exit(ended["exitCode"]) if ended else str(pod["status"].get("phase", "Pending")).lower()
