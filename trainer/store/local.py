"""A store that is a folder of this machine, or of a file system that it mounts."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from trainer.errors import ConfigError
from trainer.store.base import Checksum, ObjectExistsError, ObjectInfo, ObjectMissingError, StoreError, ends_too_early

_PARTIAL = ".partial-"
_WRONG_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}


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
            raise ends_too_early(self.uri, key, offset=offset, wanted=length, found=len(data))
        return data

    def read_into(self, key: str, offset: int, places: Sequence[memoryview]) -> None:
        """See Store."""
        found = 0
        with self._explaining("read", key), self._path(key).open("rb") as file:
            file.seek(offset)
            for place in places:
                found += file.readinto(place)
        wanted = sum(place.nbytes for place in places)
        if found < wanted:
            raise ends_too_early(self.uri, key, offset=offset, wanted=wanted, found=found)

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
            if verb == "write":  # the folder cannot be made: /proc/x, say
                raise ConfigError(f"{self.uri} was asked to write {key} and no folder can be made there; give another") from error
            raise ObjectMissingError(f"{self.uri} was asked to {verb} {key or 'everything'}, which is not there") from error
        except NotADirectoryError as error:
            raise ConfigError(
                f"{self.uri} was asked to {verb} {key or 'everything'} and is a file, or lies in one; give a folder "
                "(weights in a file become a run by `odonata import`)"
            ) from error
        except OSError as error:
            sentence = f"{self.uri} was asked to {verb} {key or 'everything'} and the system says: {error.strerror}"
            if error.errno in _WRONG_PLACE:
                raise ConfigError(f"{sentence}; give a folder that this user may read and write") from error
            raise StoreError(f"{sentence}; mend that (space, quota, mount) and start the same job again") from error


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
