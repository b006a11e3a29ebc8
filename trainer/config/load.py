"""Read a run config: a YAML file, then `key=value` overrides, then the typed and frozen RunConfig. Other sections are read likewise.

YAML and dotted keys are OmegaConf's; types, bounds and rules are pydantic's. What this file adds is the sentence that a
user reads when something is wrong: every problem of the file at once, each with the key, what was found and what would do.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from models.config import Section
from trainer.config.data import DataConfig, DataSection, ImagePairsData, NuscenesData, ShardsData
from trainer.config.run import RunConfig
from trainer.config.store import StoreConfig
from trainer.errors import ConfigError

_S = TypeVar("_S", bound=Section)
_MUCH_ALIKE = 0.8

_DATA_KINDS: dict[str, type[DataSection]] = {
    "nuscenes": NuscenesData,
    "synthetic": NuscenesData,
    "shards": ShardsData,
    "image_pairs": ImagePairsData,
}


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that `path` describes with `overrides` (`optim.lr=3e-4`) applied; ConfigError says all that is wrong."""
    return override_run_config(_read_yaml(path, what="run config", place="launch/runs"), overrides, origin=str(path))


def override_run_config(content: Any, overrides: Sequence[str], *, origin: str) -> RunConfig:
    """As `parse_run_config`, with `overrides` applied to plain data or to a YAML document."""
    document = OmegaConf.create(content)
    kind = OmegaConf.select(document, "data.kind")
    try:
        document.merge_with_dotlist(_checked(overrides))
        resolved = OmegaConf.to_container(document, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"the overrides {list(overrides)} do not fit {origin}: {error}; write them as key.key=value") from error
    return parse_run_config(_without_keys_of(kind, resolved, overrides), origin=origin)


def parse_run_config(content: Any, *, origin: str) -> RunConfig:
    """A RunConfig from plain data; `origin` is what an error calls it."""
    return parse_section(RunConfig, content, complaint=f"{origin} is not a run that can start")


def parse_section(kind: type[_S], content: Any, *, complaint: str) -> _S:
    """A section of `kind` from plain data; ConfigError has `complaint` and a line for each thing that is wrong."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        details = error.errors()
        # A list with a wrong entry counts as empty too: the entry is what is wrong.
        causes = [d for d in details if not any(d["loc"] == other["loc"][: len(d["loc"])] for other in details if other is not d)]
        problems = "\n".join(f"  {_sentence(detail, kind)}" for detail in causes)
        raise ConfigError(f"{complaint}:\n{problems}") from error


def load_section(kind: type[_S], path: Path, *, what: str, place: str) -> _S:
    """The section of `kind` that the file `path` holds, a `what` such as those in `place`; ConfigError says all that is wrong."""
    content = OmegaConf.to_container(_read_yaml(path, what=what, place=place))
    return parse_section(kind, content, complaint=f"{path} is not a {what}")


def parse_store_config(settings: Sequence[str]) -> StoreConfig:
    """How a store is reached, from `key=value` pairs with the keys of a run's `store` section; ConfigError says what is wrong."""
    try:
        pairs = _checked(settings, what="--store", example="endpoint_url=http://host:9000")
        return StoreConfig.model_validate(OmegaConf.to_container(OmegaConf.from_dotlist(pairs)))
    except ValidationError as error:
        problems = "; ".join(f"store.{_sentence(detail, StoreConfig)}" for detail in error.errors())
        raise ConfigError(f"a store was to be reached with {' '.join(settings)} and that is wrong: {problems}") from error


class _DataOnly(Section):
    """A run's data section by itself."""

    data: DataConfig


def as_data_overrides(settings: Sequence[str]) -> list[str]:
    """Overrides of a run from `key=value` pairs with the keys of its data section; ConfigError where one is no such pair."""
    for setting in _checked(settings, what="--data", example="root=/data/nuscenes"):
        if setting.startswith("data."):
            raise ConfigError(f"--data {setting} says data. twice; write {setting.removeprefix('data.')}")
    return [f"data.{setting}" for setting in settings]


def parse_data_config(defaults: Mapping[str, Any], settings: Sequence[str]) -> DataConfig:
    """A data section from `key=value` pairs with its keys over `defaults`; ConfigError says what is wrong."""
    document = OmegaConf.create({"data": dict(defaults)})
    try:
        document.merge_with_dotlist(as_data_overrides(settings))
        content = OmegaConf.to_container(document, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{list(settings)} are no keys of a data section: {error}; write them as root=/data/nuscenes"
        ) from error
    return parse_section(_DataOnly, content, complaint=f"data was to be read with {' '.join(settings)} and that is wrong").data


def dump_run_config(config: RunConfig) -> str:
    """YAML that `load_run_config` reads back to an equal object, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def run_config_schema() -> str:
    """JSON schema of a run config, for editors and for the curious."""
    return json.dumps(RunConfig.model_json_schema(), indent=2)


def _read_yaml(path: Path, *, what: str, place: str) -> DictConfig:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else f"{what}s lie in {place}/."
        raise ConfigError(f"the {what} {path} is not a file; {hint}")
    try:
        document = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(document, DictConfig):
        raise ConfigError(f"{path} holds a {type(document).__name__}; a {what} is a mapping of keys to values")
    return document


def _without_keys_of(kind: object, content: Any, overrides: Sequence[str]) -> Any:
    """`content` without what the file says of its own kind of data, where an override has chosen another kind that has no such keys."""
    data = content.get("data")
    if not isinstance(data, dict) or kind is None or data.get("kind") in (kind, None) or data["kind"] not in _DATA_KINDS:
        return content
    chosen = _DATA_KINDS[data["kind"]]
    asked = {override.partition("=")[0] for override in overrides}
    kept = {name: value for name, value in data.items() if name in chosen.model_fields or f"data.{name}" in asked}
    return {**content, "data": kept}


def _checked(pairs: Sequence[str], *, what: str = "the override", example: str = "optim.lr=3e-4") -> list[str]:
    for pair in pairs:
        key, equals, _ = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"{what} {pair!r} is not key=value; write for example {example}")
    return list(pairs)


def _sentence(detail: ErrorDetails, section: type[Section]) -> str:
    """`encoder.pach_px: unknown key; did you mean patch_px?` from pydantic's error record of a `section`."""
    key = _key(detail["loc"], section)
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_hint(detail['loc'], section)}"
    if detail["type"] == "missing":
        how = f"give --data {key.removeprefix('data.')}=..." if section is _DataOnly else "set it in the file"
        return f"{key}: required and not given; {how}{f' or as {key}=...' if section is RunConfig else ''}"
    if detail["type"] in ("list_type", "tuple_type"):
        return f"{key}: takes a list, found {detail['input']!r}; write it in brackets, as [a, b]"
    if detail["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, found {detail['input']!r}"


def _key(place: tuple[int | str, ...], section: type[Section]) -> str:
    """`objectives.0.mask.ratio`, as it is written; pydantic names the member of a union in between, `objectives.0.croco.mask.ratio`."""
    schema = section.model_json_schema()
    return ".".join(str(part) for i, part in enumerate(place) if not _is_kind(part, _schemas_at(schema, place[:i])))


def _is_kind(part: int | str, schemas: list[Any]) -> bool:
    """Whether it names a kind of what may stand there, and no key of it."""
    return any(part in _kinds(node) for node in schemas) and not any(part in node.get("properties", {}) for node in schemas)


def _hint(place: tuple[int | str, ...], section: type[Section]) -> str:
    """The key that was meant: one beside the wrong one, or elsewhere if much like it; or all that could stand there."""
    wrong, schema = str(place[-1]), section.model_json_schema()
    beside = _keys(_schemas_at(schema, place[:-1]))
    elsewhere = [key for key in _keys([schema, *schema.get("$defs", {}).values()]) if key != wrong]
    near = (
        difflib.get_close_matches(wrong, beside, n=1)
        or [key for key in beside if wrong in key or key in wrong]
        or difflib.get_close_matches(wrong, elsewhere, n=1, cutoff=_MUCH_ALIKE)
    )
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(beside)}"


def _schemas_at(schema: Any, place: tuple[int | str, ...]) -> list[Any]:
    """The sections that may stand at `place` of a JSON schema. pydantic names the kind of a union's member in it, which is no key."""
    found = _alternatives(schema, schema)
    for part in place:
        deeper = [node["properties"][part] for node in found if part in node.get("properties", {})]
        deeper += [node["items"] for node in found if isinstance(part, int) and "items" in node]
        of_kind = [node for node in found if part in _kinds(node)]
        found = [each for node in deeper for each in _alternatives(node, schema)] or of_kind or found
    return found


def _kinds(section: Any) -> list[str]:
    kind = section.get("properties", {}).get("kind", {})
    return [kind["const"]] if "const" in kind else kind.get("enum", [])


def _alternatives(node: Any, schema: Any) -> list[Any]:
    """`node` itself, what it refers to, or the members of its union."""
    if "$ref" in node:
        return [schema["$defs"][node["$ref"].rpartition("/")[2]]]
    members = node.get("anyOf", node.get("oneOf", []))
    return [each for member in members for each in _alternatives(member, schema)] or [node]


def _keys(schemas: list[Any]) -> list[str]:
    return list(dict.fromkeys(key for schema in schemas for key in schema.get("properties", {})))
