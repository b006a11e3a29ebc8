"""From a URI to the store that it names."""

from pathlib import Path

from trainer.config.store import StoreConfig
from trainer.errors import ConfigError
from trainer.store.base import Store
from trainer.store.local import LocalStore
from trainer.store.s3 import S3Store


def open_store(uri: str | Path, config: StoreConfig | None = None) -> Store:
    """The store at `uri`, a folder that need not exist yet or s3://bucket/prefix, reached as `config` says; nothing is asked."""
    text = str(uri)
    if text.startswith("s3:/"):
        return _open_s3(text, config or StoreConfig())
    if "://" in text:
        raise ConfigError(
            f"{text} is neither a folder nor a kind of store that this version knows; give a folder or s3://bucket/prefix"
        )
    return LocalStore(Path(text).absolute())


def _open_s3(uri: str, config: StoreConfig) -> S3Store:
    bucket, _, prefix = uri.removeprefix("s3://").strip("/").partition("/")
    if not uri.startswith("s3://") or uri.startswith("s3:///") or not bucket:  # one slash: a Path has swallowed the other
        raise ConfigError(f"{uri} names no bucket on S3; give a text, no Path, of the form s3://bucket/prefix")
    if not all(part.strip(".") for part in prefix.split("/")) and prefix:
        raise ConfigError(f"{uri} has an empty part, or one of dots only, in its prefix; give s3://bucket/prefix without")
    return S3Store(bucket, prefix and prefix + "/", config)
