"""What tests of Kubernetes share: a real API server."""

from collections.abc import Iterator

import pytest

from tests.k8s.control_plane import ControlPlane, find_assets, running


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """An API server with the namespace `perception`."""
    assets = find_assets(tmp_path_factory.mktemp("assets"))
    if isinstance(assets, str):
        pytest.skip(assets)
    with running(assets, tmp_path_factory.mktemp("control-plane")) as plane:
        made = plane.kubectl("create", "namespace", "perception")
        assert made.returncode == 0, made.stderr
        yield plane
