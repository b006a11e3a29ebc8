"""What holds for the project as a whole: its folders, packages, pins and version agree with each other."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.whole import WHOLE

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGES = ("k8s", "models", "monitoring", "odonata", "trainer")
FOLDERS = (*PACKAGES, "benchmarks", "docs", "launch", "tests")

# A path of one machine, or a place to install from: pip's own configuration has the say in that.
FORBIDDEN = re.compile(r"(?<![\w.$}])/(?:work|root|home|Users)/\w|--(?:extra-)?index-url|--find-links|pypi\.|download\.pytorch")


def test_each_test_file_is_named_after_what_it_tests() -> None:
    strays = []
    for path in (ROOT / "tests").rglob("test_*.py"):
        place = path.relative_to(ROOT / "tests").parent
        name = path.stem.removeprefix("test_")
        modules = {child.stem for child in (ROOT / place).glob("*")}
        named_after_one = any(name == module or name.startswith(f"{module}_") for module in modules)
        if path != Path(__file__) and not named_after_one and f"{place}/{name}" not in WHOLE:
            strays.append(str(path.relative_to(ROOT)))
    assert not strays, f"no module of theirs: {strays}; rename them, or list them in WHOLE if they test a whole folder"


def test_the_packages_of_pyproject_are_the_folders_that_are_packages() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    found = [init.parent.relative_to(ROOT) for name in PACKAGES for init in (ROOT / name).rglob("__init__.py")]
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in found)


def test_every_folder_with_code_says_what_it_is_for_and_nothing_else() -> None:
    for name in PACKAGES:
        for folder in {path.parent for path in (ROOT / name).rglob("*.py")}:
            text = (folder / "__init__.py").read_text().strip()
            assert re.fullmatch(r'"""[^"]+"""', text), f"{folder}/__init__.py should hold a docstring alone"


def test_launch_is_no_package() -> None:
    assert not list((ROOT / "launch").rglob("*.py")), "ROS 2 owns the import name `launch`"


def test_the_changelog_begins_with_the_version_of_pyproject() -> None:
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading
    assert heading[1] == PROJECT["version"]


def test_each_dependency_is_pinned_and_its_pin_is_allowed() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {}
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==", f"{pin} is no exact pin"
        pinned[canonicalize_name(pin.name)] = Version(specifier.version)
    extras = PROJECT["optional-dependencies"].values()
    for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]:
        wanted = Requirement(text)
        version = pinned.get(canonicalize_name(wanted.name))
        assert version, f"constraints.txt does not pin {wanted.name}"
        assert wanted.specifier.contains(version), (
            f"constraints.txt pins {wanted.name} to {version}, pyproject.toml asks for {wanted}"
        )


def test_no_file_names_a_path_of_one_machine_or_a_place_to_install_from() -> None:
    named = []
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for name in (*FOLDERS, ".ci") for path in (ROOT / name).rglob("*") if path.is_file()]
    for path in files:
        if path == Path(__file__) or "__pycache__" in path.parts:
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture
        named += [f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, hit.start()) + 1}" for hit in FORBIDDEN.finditer(text)]
    assert not named


@pytest.mark.parametrize("module", ["trainer.config.run", "trainer.config.load", "models.config"])
def test_a_config_is_read_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
