"""From a URI to the store that it names."""

from pathlib import Path

from trainer.errors import ConfigError
from trainer.store.base import Store
from trainer.store.local import LocalStore


def open_store(uri: str | Path) -> Store:
    """The store at `uri`, a folder that need not exist yet."""
    text = str(uri)
    if text.startswith("s3:/"):  # one slash: a Path has swallowed the other
        raise ConfigError(
            f"{text} asks for S3, and this version keeps runs in folders only; give a folder, a mounted one if need be"
        )
    if "://" in text:
        raise ConfigError(f"{text} is neither a folder nor a kind of store that this version knows; give a folder")
    return LocalStore(Path(text).absolute())
