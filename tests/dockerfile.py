"""Run the steps of a Dockerfile without Docker: each stage in a folder that chroot makes the root of.

What is the same as in a build: the instructions, word for word, their order and stages, ENV, ARG and WORKDIR, which files are in the
context (Dockerfile.dockerignore), the user at the end. What is not: the base is debootstrap's Debian, the network is this
machine's, and pip's configuration is that of this machine where a step mounts it as a secret.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continued lines joined."""

    name: str
    text: str


@dataclass
class Stage:
    """A root while it is built."""

    root: Path
    environment: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    )
    folder: str = "/"
    user: str = "0:0"


def read_instructions(path: Path) -> list[Instruction]:
    """The instructions of a Dockerfile in their order."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def context_of(dockerfile: Path) -> list[str]:
    """What of the checkout is sent to the builder: an ignore file that begins with * and then names what is let in."""
    first, *others = [
        line for line in Path(f"{dockerfile}.dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert first == "*"
    return [line[1:] for line in others if line.startswith("!")]


def build(dockerfile: Path, checkout: Path, base: Path, folder: Path) -> Stage:
    """The last stage of `dockerfile`, built below `folder` on the root `base`."""
    stages: dict[str, Stage] = {}
    stage = Stage(base)
    for instruction in read_instructions(dockerfile):
        if instruction.name == "FROM":
            source, _, name = instruction.text.split()
            parent = stages.get(source, Stage(base))
            root = folder / name
            subprocess.run(["cp", "-a", "--reflink=auto", parent.root, root], check=True)
            stage = stages[name] = Stage(root, dict(parent.environment), parent.folder, parent.user)
        else:
            _follow(instruction, stage, stages, checkout, context_of(dockerfile))
    return stage


def _follow(instruction: Instruction, stage: Stage, stages: Mapping[str, Stage], checkout: Path, context: list[str]) -> None:
    match instruction.name:
        case "ENV" | "ARG":
            for pair in shlex.split(instruction.text):
                name, _, value = pair.partition("=")
                stage.environment[name] = re.sub(r"\$\{?(\w+)\}?", lambda found: stage.environment.get(found[1], ""), value)
        case "WORKDIR":
            stage.folder = instruction.text
            (stage.root / instruction.text.lstrip("/")).mkdir(parents=True, exist_ok=True)
        case "USER":
            stage.user = instruction.text
        case "COPY":
            _copy(instruction.text, stage, stages, checkout, context)
        case "RUN":
            wants_pip = "id=pip" in instruction.text
            with mounted(stage.root), pip_configuration(stage.root, wanted=wants_pip):
                done = run(stage, re.sub(r"--mount=\S+\s+", "", instruction.text))
            assert done.returncode == 0, f"RUN {instruction.text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        case "LABEL" | "EXPOSE" | "HEALTHCHECK" | "ENTRYPOINT" | "CMD":
            pass  # they say things of the image and do nothing to it
        case other:
            raise AssertionError(f"{other} is not known here")


def _copy(text: str, stage: Stage, stages: Mapping[str, Stage], checkout: Path, context: list[str]) -> None:
    words = text.split()
    origin = stages[words.pop(0).removeprefix("--from=")].root if words[0].startswith("--from=") else None
    *sources, target = words
    place = stage.root / str(Path(stage.folder) / target).lstrip("/")
    names = context if sources == ["."] else sources
    for name in names:
        source = origin / name.lstrip("/") if origin else checkout / name
        goal = place if origin else place / name
        if source.is_dir():
            shutil.copytree(
                source, goal, symlinks=True, dirs_exist_ok=True, ignore=None if origin else shutil.ignore_patterns("__pycache__")
            )
        else:
            assert name in context, f"{name} is not in the context"
            shutil.copy2(source, goal)


def run(stage: Stage, command: str, *, root: Path | None = None, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
    """`command` in a shell in the stage, as its user and in its folder."""
    return subprocess.run(
        ["chroot", f"--userspec={stage.user}", root or stage.root, "/bin/sh", "-c", f"cd {stage.folder} && {command}"],
        env=stage.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@contextmanager
def mounted(root: Path, *, read_only: Path | None = None, writable: tuple[str, ...] = ()) -> Iterator[None]:
    """/proc and /dev in `root`; at `read_only` the same root, on which nothing but `writable` can be written, as in a pod."""
    mounts = [["--bind", "/dev", f"{root}/dev"], ["-t", "proc", "proc", f"{root}/proc"]]
    if read_only:
        mounts += [["--rbind", str(root), str(read_only)], ["-o", "remount,ro,bind", str(read_only)]]
        mounts += [["-t", "tmpfs", "-o", "mode=1777", "tmpfs", f"{read_only}{place}"] for place in writable]
    try:
        for mount in mounts:
            subprocess.run(["mount", *mount], check=True, capture_output=True)
        yield
    finally:
        for place in ([read_only] if read_only else []) + [root / "proc", root / "dev"]:
            subprocess.run(["umount", "--recursive", "--lazy", place], capture_output=True)


@contextmanager
def pip_configuration(root: Path, *, wanted: bool) -> Iterator[None]:
    """This machine's pip configuration, certificates and name servers in `root`, with the folders of wheels that it names."""
    names = ["/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"] + (["/etc/pip.conf"] if wanted else [])
    for name in names:
        if Path(name).exists():
            (root / name.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, root / name.lstrip("/"))
    shown = subprocess.run(["pip", "config", "list"], capture_output=True, text=True).stdout if wanted else ""
    folders = {place for place in re.findall(r"(?:file://)?(/[\w/.-]+)", shown) if Path(place).is_dir()}
    try:
        for folder in folders:
            (root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--bind", folder, root / folder.lstrip("/")], check=True)
        yield
    finally:
        for folder in folders:
            subprocess.run(["umount", "--lazy", root / folder.lstrip("/")], capture_output=True)
        if wanted:
            (root / "etc" / "pip.conf").unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Delete the stages, once nothing of this machine is mounted in them any more."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    assert not [mount for mount in mounts if Path(mount).is_relative_to(folder)], "deleting would go through a mount"
    subprocess.run(["rm", "-rf", "--one-file-system", folder], check=True)


def may_build() -> bool:
    """Whether this machine has what a build takes: root's rights and debootstrap."""
    return os.geteuid() == 0 and shutil.which("debootstrap") is not None
