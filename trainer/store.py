"""One store of named objects, under every run: checkpoints, incidents, pictures, whatever has to outlive a pod.

An object is whole or absent: a reader never sees half of one, whenever the writer was killed. Keys are relative names with
"/" between their parts; a prefix is a run of whole parts, so "a" holds "a/b" and never "ab". Every object that is put has
its CRC-32 returned, computed from the bytes in memory: it finds every truncation and every burst of flipped bits up to
32 long, other damage but once in 2^32, runs at 3.3 GB/s on a core where SHA-256 runs at 1.4, and is a checksum that S3 keeps
for whole objects too, so it is the same number end to end. It is no guard against somebody who means harm.

Left to whom: what is stored under which name, and which objects belong together, is the caller's business.
"""

import errno
import os
import secrets
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

from trainer.errors import ConfigError, RetryError

_PARTIAL = ".partial-"
_WRONG_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}


class StoreError(RetryError):
    """The store does not do, at the moment, what it was asked."""


class ObjectMissingError(StoreError):
    """There is no object of this name, or it has fewer bytes than were asked for."""


class ObjectExistsError(StoreError):
    """An object that must not be there yet is there."""


@dataclass(frozen=True)
class ObjectInfo:
    """An object as the store knows it; only `put` knows the checksum."""

    key: str
    bytes: int
    checksum: str | None = None


class Checksum:
    """CRC-32 and length of the bytes shown to it; its text names its kind, so that another kind can join."""

    def __init__(self) -> None:
        self.bytes = 0
        self._crc = 0

    def update(self, piece: bytes | memoryview) -> None:
        """Count one more piece."""
        self._crc = zlib.crc32(piece, self._crc)
        self.bytes += memoryview(piece).nbytes

    def __str__(self) -> str:
        return f"crc32:{self._crc:08x}"


@runtime_checkable
class Store(Protocol):
    """Named objects in one place; `uri` says where, for messages."""

    uri: str

    def put(self, key: str, payload: bytes | Iterable[memoryview], *, exclusive: bool = False) -> ObjectInfo:
        """Store `payload` under `key`, whole or not at all, over what was there; the answer has size and checksum.

        With `exclusive` an object that is there already stays, and ObjectExistsError is raised.
        """
        ...

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """The bytes of `key` from `offset` on, `length` of them or all that are left.

        ObjectMissingError where there is no such object, or it ends before.
        """
        ...

    def list(self, prefix: str) -> list[ObjectInfo]:
        """Every whole object under `prefix`, or named so, by key; "" is everything.

        What is being written is not in it, and what is not there is no error.
        """
        ...

    def delete(self, prefix: str) -> None:
        """Remove every object under `prefix`, or named so, and what a killed `put` left there; "" is refused.

        What is not there is no error, and others may still see some of the objects until it returns.
        """
        ...

    def child(self, prefix: str) -> "Store":
        """The same store seen from `prefix`: its keys begin there.

        Nothing is created or looked up.
        """
        ...


class LocalStore:
    """A folder of this machine, or of a file system that it mounts.

    An object is written beside its place under another name, brought to the disk and renamed. `exclusive` needs hard links.
    """

    def __init__(self, root: Path) -> None:
        self.uri = str(root)
        self._root = root

    def put(self, key: str, payload: bytes | Iterable[memoryview], *, exclusive: bool = False) -> ObjectInfo:
        """See Store."""
        target = self._path(key)
        assert target != self._root, "an object has a name"
        partial = target.with_name(_PARTIAL + secrets.token_hex(8))
        with self._explaining("write", key):
            _make_folder(target.parent)
            try:
                checksum = _write(partial, [memoryview(payload)] if isinstance(payload, bytes) else payload)
                if exclusive:
                    self._link(partial, target, key)
                else:
                    partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
            _sync_folder(target.parent)
        return ObjectInfo(key, checksum.bytes, str(checksum))

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See Store."""
        with self._explaining("read", key), self._path(key).open("rb") as file:
            file.seek(offset)
            data = file.read(-1 if length is None else length)
        if length is not None and len(data) < length:
            raise ObjectMissingError(
                f"{self.uri} was asked for {length} bytes of {key} from byte {offset} on, and it ends {length - len(data)} too early"
            )
        return data

    def list(self, prefix: str) -> list[ObjectInfo]:
        """See Store."""
        start = self._path(prefix)
        with self._explaining("list", prefix):
            found = [self._info(start)] if start.is_file() else [self._info(path) for path in _files(start)]
        return sorted((info for info in found if info), key=lambda info: info.key)

    def delete(self, prefix: str) -> None:
        """See Store."""
        assert PurePosixPath(prefix).parts, "a whole store is never deleted"
        path = self._path(prefix)
        with self._explaining("delete", prefix):
            if path.is_dir():
                # What lists show goes last: a delete that is killed can be seen, and done again.
                for partial in path.rglob(f"{_PARTIAL}*"):
                    partial.unlink(missing_ok=True)
                shutil.rmtree(path, onerror=_raise_unless_missing)
            else:
                path.unlink(missing_ok=True)

    def child(self, prefix: str) -> "LocalStore":
        """See Store."""
        return LocalStore(self._path(prefix))

    def _path(self, key: str) -> Path:
        """Where `key`, or a prefix with or without its last "/", lies; the root for an empty one."""
        parts = key.removesuffix("/").split("/") if key else []
        assert all(part.strip(".") and not part.startswith(_PARTIAL) and "\0" not in part for part in parts), key
        return self._root.joinpath(*parts)

    def _info(self, path: Path) -> ObjectInfo | None:
        try:
            return ObjectInfo(path.relative_to(self._root).as_posix(), path.stat().st_size)
        except FileNotFoundError:  # deleted since it was listed
            return None

    def _link(self, partial: Path, target: Path, key: str) -> None:
        try:
            os.link(partial, target)
        except FileExistsError as error:
            raise ObjectExistsError(
                f"{key} was to be created in {self.uri} and is there already; another writer made it"
            ) from error

    @contextmanager
    def _explaining(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise ObjectMissingError(f"{self.uri} was asked to {verb} {key or 'everything'}, which is not there") from error
        except OSError as error:
            sentence = f"{self.uri} was asked to {verb} {key or 'everything'} and the system says: {error.strerror}"
            if error.errno in _WRONG_PLACE:
                raise ConfigError(f"{sentence}; give a folder that this user may read and write") from error
            raise StoreError(f"{sentence}; mend that (space, quota, mount) and start the same job again") from error


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


def _write(path: Path, pieces: Iterable[memoryview]) -> Checksum:
    """Write `pieces` to a new file and wait until the disk has them."""
    checksum = Checksum()
    with path.open("xb") as file:
        for piece in pieces:
            checksum.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return checksum


def _make_folder(folder: Path) -> None:
    """Create `folder` so that it outlives a power cut: a file on the disk in a folder that is not is lost."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder, onerror=_raise_walk_error):
        yield from (Path(place, name) for name in names if not name.startswith(_PARTIAL))


def _raise_walk_error(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _raise_unless_missing(_function: object, _path: str, failure: tuple[type, BaseException, object]) -> None:
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]
