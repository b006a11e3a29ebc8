"""Write a whole data set: scenes in parallel, then the tables, maps and splits that join them.

A scene is finished when its rows lie in `synthesis/scene-NNNN.json`, which is written last and at once; a run that was stopped
goes on with the others and ends with the same bytes. Beside the tables, `splits.json` names the scenes of train and val.

    odonata synthesize --out city --scenes 8 --seed 0
"""

import json
import logging
from collections.abc import Iterator
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trainer.errors import DataError
from trainer.pool import worker_processes
from trainer.synthesis.city import LOCATIONS
from trainer.synthesis.config import SynthesisConfig
from trainer.synthesis.maps import build_map, draw_mask
from trainer.synthesis.rig import RIGS
from trainer.synthesis.scene import write_scene
from trainer.synthesis.tables import Row, Tables, join_tables, shared_rows, token, write_json

VERSION = "v1.0-mini"
"""The devkit's own name of its smallest version; opened without any special case."""

_STATE = "synthesis"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SynthesisReport:
    """What was written."""

    out: Path
    scenes: int
    rendered: int
    """Scenes that were not there yet."""
    images: int
    annotations: int

    def __str__(self) -> str:
        return (
            f"{self.scenes} scenes ({self.rendered} new) with {self.images} images and {self.annotations} boxes in {self.out}, "
            f"version {VERSION}"
        )


def synthesize(out: Path, config: SynthesisConfig, *, workers: int | None = None, progress: bool = True) -> SynthesisReport:
    """Write the data set of `config` into `out`, keeping scenes that are finished; DataError if `out` holds something else."""
    try:
        _claim(out, config)
    except OSError as error:
        raise DataError(
            f"{out} was asked to hold a synthetic data set and the system says: {error.strerror}; give another --out"
        ) from error
    missing = [scene for scene in range(config.scenes) if not _state_path(out, scene).exists()]
    with _bar(config.scenes, shown=progress) as bar:
        bar.update(bar.task_ids[0], completed=config.scenes - len(missing))
        with worker_processes(workers) as pool:
            jobs = {pool.submit(_finish_scene, config, scene, out): scene for scene in missing}
            for job in as_completed(jobs):
                job.result()
                bar.advance(bar.task_ids[0])
                log.info("rendered scene %d of %d", jobs[job] + 1, config.scenes)
    tables = _write_tables(out, config)
    images = sum(row["fileformat"] == "jpg" for row in tables["sample_data"])
    return SynthesisReport(out, config.scenes, len(missing), images, len(tables["sample_annotation"]))


def _claim(out: Path, config: SynthesisConfig) -> None:
    """Mark `out` as this data set, or refuse a folder that is something else."""
    state = out / _STATE / "config.json"
    wanted = config.model_dump(mode="json")
    if state.exists():
        # A setting that did not exist yet when the folder was claimed had what is its default now.
        found = SynthesisConfig().model_dump(mode="json") | json.loads(state.read_text())
        differing = [key for key in wanted if found[key] != wanted[key]]
        if differing:
            changes = ", ".join(f"{key} {found[key]}, asked for {wanted[key]}" for key in differing)
            raise DataError(
                f"{out} was asked to hold a synthetic data set and holds another one ({changes}); give another --out or the same settings"
            )
    elif out.exists() and any(out.iterdir()):
        raise DataError(f"{out} was asked to hold a synthetic data set and is not empty; give a new folder as --out")
    else:
        write_json(state, wanted)


def _finish_scene(config: SynthesisConfig, scene: int, out: Path) -> None:
    write_json(_state_path(out, scene), write_scene(config, scene, out))


def _write_tables(out: Path, config: SynthesisConfig) -> Tables:
    parts = [json.loads(_state_path(out, scene).read_text()) for scene in range(config.scenes)]
    tables = join_tables([shared_rows(RIGS[config.rig]), *parts])
    tables["map"] = _write_maps(out, tables["log"])
    for name, rows in tables.items():
        write_json(out / VERSION / f"{name}.json", rows)
    names = [row["name"] for row in tables["scene"]]
    held_out = {name for number, name in enumerate(names) if config.is_held_out(number)}
    splits = {"train": [name for name in names if name not in held_out], "val": sorted(held_out)}
    write_json(out / VERSION / "splits.json", splits)
    return tables


def _write_maps(out: Path, logs: list[Row]) -> list[Row]:
    """A mask, a map expansion and a row for each city that a scene drives in; the devkit wants each log in one map."""
    rows = []
    mask = Image.fromarray(draw_mask())
    for location in sorted({row["location"] for row in logs}, key=LOCATIONS.index):
        name = token("map", location)
        filename = f"maps/{name}.png"
        (out / "maps").mkdir(exist_ok=True)
        mask.save(out / filename, optimize=False)
        write_json(out / "maps" / "expansion" / f"{location}.json", build_map(location))
        log_tokens = [row["token"] for row in logs if row["location"] == location]
        rows.append({"category": "semantic_prior", "token": name, "filename": filename, "log_tokens": log_tokens})
    return rows


def _state_path(out: Path, scene: int) -> Path:
    return out / _STATE / f"scene-{scene + 1:04d}.json"


@contextmanager
def _bar(scenes: int, *, shown: bool) -> Iterator[Progress]:
    """A bar on a terminal; elsewhere the log has a line a scene."""
    console = Console(stderr=True)
    columns = (TextColumn("rendering scenes"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        bar.add_task("scenes", total=scenes)
        yield bar
