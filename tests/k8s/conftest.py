"""What tests of Kubernetes share: a real control plane, a node on it, and somebody who may submit."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s.control_plane import Assets, ControlPlane, controlling, find_assets, running
from tests.k8s.kubelet import Kubelet
from tests.k8s.workloads import MINIMAL, ROOT


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """The binaries of a control plane."""
    found = find_assets(tmp_path_factory.mktemp("assets"))
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def control_plane(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """An API server with the namespace `perception`."""
    with running(assets, tmp_path_factory.mktemp("control-plane")) as plane:
        plane.must("create", "namespace", "perception")
        yield plane


@pytest.fixture(scope="session")
def kubelet(assets: Assets, control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubelet]:
    """A node, and what makes pods of Jobs."""
    if assets.controller_manager is None:
        pytest.skip("no kube-controller-manager in KUBEBUILDER_ASSETS")
    node = Kubelet(control_plane, tmp_path_factory.mktemp("kubelet"), images=[MINIMAL["image"]])
    with controlling(assets, control_plane), node.running():
        yield node


@pytest.fixture(scope="session")
def submitter(control_plane: ControlPlane) -> Path:
    """The kubeconfig of somebody with the role of k8s/rbac, and no other."""
    control_plane.must("apply", "-n", "perception", "--validate=false", "-f", str(ROOT / "k8s" / "rbac" / "submitter.yaml"))
    control_plane.must("create", "serviceaccount", "ada", "-n", "perception")
    bound = ("--role=odonata-submitter", "--serviceaccount=perception:ada")
    control_plane.must("create", "rolebinding", "ada-submits", "-n", "perception", *bound)
    return control_plane.log_in("perception", "ada")
