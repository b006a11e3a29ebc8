"""The image: linted, and each of its steps run in a clean root, where the result trains as a pod would."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dockerfile import Stage, build, context_of, may_build, mounted, read_instructions, remove, run
from tests.runs import ROOT, SMALL_RUN

DOCKERFILE = ROOT / "launch" / "Dockerfile"


def lint(text: str) -> subprocess.CompletedProcess[str]:
    hadolint = Path(sys.executable).with_name("hadolint")
    return subprocess.run([hadolint, "--failure-threshold", "info", "-"], input=text, capture_output=True, text=True)


def test_hadolint_has_nothing_to_say() -> None:
    done = lint(DOCKERFILE.read_text())
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--no-install-recommends ", ""),
        ("WORKDIR /opt/odonata", "WORKDIR odonata"),
        ('CMD ["--help"]', "CMD --help"),
        ("FROM ${BASE} AS system", "FROM debian AS system"),
        ("USER 10001:10001", "USER root"),
    ],
)
def test_hadolint_would_say_something(old: str, new: str) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    assert lint(text.replace(old, new)).returncode != 0


def test_the_image_has_all_packages_and_configs_and_no_tests() -> None:
    context = context_of(DOCKERFILE)
    assert {"odonata", "pyproject.toml", "constraints.txt", "k8s", "launch", "models", "monitoring", "trainer"} <= set(context)
    assert all((ROOT / name).exists() for name in context)
    assert not {"tests", "benchmarks", "docs", ".git"} & set(context)


def test_the_image_is_of_this_version_and_its_user_is_the_pods() -> None:
    instructions = [(each.name, each.text) for each in read_instructions(DOCKERFILE)]
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert ("ARG", f"VERSION={version[1]}") in instructions
    assert ("USER", "10001:10001") in instructions
    assert ("ENTRYPOINT", '["odonata"]') in instructions


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The image, built on a fresh Debian; some 10 GB of disk until the tests end."""
    if not may_build():
        pytest.skip("an image is built by root, with debootstrap (Debian's package)")
    folder = tmp_path_factory.mktemp("image")
    made = subprocess.run(["debootstrap", "--variant=minbase", "bookworm", folder / "base"], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:]
    yield build(DOCKERFILE, ROOT, folder / "base", folder)
    remove(folder)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_step_works_in_a_clean_root_and_two_ranks_train_in_it_as_a_pod_does(image: Stage, tmp_path: Path) -> None:
    """Not root, nothing writable but /scratch and /tmp, one command from synthetic data to a committed checkpoint."""
    (image.root / "run.yaml").write_text(SMALL_RUN)
    commands = (
        "odonata synthesize --out /scratch/city --scenes 3 --duration-s 2 --scale 0.06 --workers 2",
        "odonata pod /run.yaml --accelerate launch/accelerate/fsdp2.yaml data.root=/scratch/city run.uri=/scratch/run steps=3",
        "ls /scratch/run/checkpoints/*/manifest.json",
        "! touch /opt/odonata/file",
    )
    image.environment |= {"HOME": "/scratch", "TMPDIR": "/scratch", "OMP_NUM_THREADS": "1"}
    with mounted(image.root, read_only=tmp_path, writable=("/scratch", "/tmp", "/dev/shm")):
        done = run(image, " && ".join(commands), root=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "local ranks with 0: 0, 1: 0: the pod ends with 0" in done.stderr
    assert "step-00000003" in done.stdout
