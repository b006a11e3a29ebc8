"""Rights, by trying: who has the role of k8s/rbac can do what the commands need and nothing else, and the pods' account can do nothing."""

from pathlib import Path

import pytest

from k8s.client import Cluster, connect
from k8s.runs import find_run
from k8s.stop import stop
from k8s.submit import resume, submit
from tests.k8s.control_plane import ControlPlane
from tests.k8s.kubelet import Kubelet
from tests.k8s.workloads import workload_of
from trainer.config.store import StoreConfig
from trainer.errors import ConfigError

NOWHERE = StoreConfig(endpoint_url="http://127.0.0.1:9")


@pytest.fixture(scope="module")
def ada(submitter: Path, kubelet: Kubelet) -> Cluster:
    del kubelet  # and with it what deletes what a deleted Job owns
    return connect(context=None, namespace="perception", config_file=submitter)


@pytest.fixture(scope="module")
def submitted(ada: Cluster) -> str:
    """A run that no node is large enough for."""
    workload = workload_of("run.uri=s3://bucket/runs/rights", monitoring={"pod_monitor": False})
    submit(ada, workload, store=NOWHERE, lenient=True)
    return workload.name


def test_the_role_is_enough_to_submit_stop_resume_and_forget(ada: Cluster) -> None:
    workload = workload_of("run.uri=s3://bucket/runs/whole", monitoring={"pod_monitor": False})
    submit(ada, workload, store=NOWHERE, lenient=True)
    assert find_run(ada, "whole").owner
    assert stop(ada, "whole")
    resume(ada, "whole", nodes=None, overrides=["steps=200001"], store=NOWHERE, lenient=True)
    assert find_run(ada, "whole").config.steps == 200001
    stop(ada, "whole", forget=True)
    with pytest.raises(ConfigError, match="does not know it"):
        find_run(ada, "whole")


FORBIDDEN = {
    "read secrets": ("get", "secrets"),
    "delete nodes": ("delete", "node", "machine-1"),
    "see nodes": ("get", "nodes"),
    "look into other namespaces": ("get", "jobs", "-n", "default"),
    "change a job": ("annotate", "job", "rights", "a=b", "--overwrite"),
    "evict or delete pods": ("delete", "pods", "--all"),
    "make pods of its own": ("run", "mine", "--image=busybox"),
    "enter pods": ("create", "--raw", "/api/v1/namespaces/perception/pods/any/exec?command=sh", "-f", "-"),
    "give rights": ("create", "rolebinding", "more", "--clusterrole=admin", "--serviceaccount=perception:ada"),
    "see roles": ("get", "roles"),
    "take on another account": ("create", "--raw", "/api/v1/namespaces/perception/serviceaccounts/rights/token", "-f", "-"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_role_is_not_enough_to(what: str, control_plane: ControlPlane, submitter: Path, submitted: str) -> None:
    content = '{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}'
    tried = control_plane.kubectl(*FORBIDDEN[what], content=content, kubeconfig=submitter)
    assert tried.returncode != 0, tried.stdout
    assert "cannot" in tried.stderr and "forbidden" in tried.stderr.lower(), tried.stderr


@pytest.mark.parametrize("what", ["configmaps", "pods", "jobs", "secrets", "services", "nodes"])
def test_the_account_of_the_pods_may_do_nothing(what: str, control_plane: ControlPlane, submitted: str) -> None:
    tried = control_plane.kubectl("get", what, kubeconfig=control_plane.log_in("perception", submitted))
    assert f'User "system:serviceaccount:perception:{submitted}" cannot list resource' in tried.stderr


def test_who_has_no_role_is_told_which_one_to_ask_for(control_plane: ControlPlane, submitted: str) -> None:
    nobody = connect(context=None, namespace="perception", config_file=control_plane.log_in("perception", submitted))
    with pytest.raises(ConfigError, match=r"cannot list resource.*k8s/rbac/submitter\.yaml is a Role that may"):
        find_run(nobody, submitted)
