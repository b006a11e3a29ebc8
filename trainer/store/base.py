"""One store of named objects, under every run: checkpoints, incidents, pictures, whatever has to outlive a pod.

An object is whole or absent: a reader never sees half of one, whenever the writer was killed. Keys are relative names with
"/" between their parts; a prefix is a run of whole parts, so "a" holds "a/b" and never "ab". Every object that is put has
its CRC-32 returned, computed from the bytes in memory: it finds every truncation and every burst of flipped bits up to
32 long, other damage but once in 2^32, runs at 3.3 GB/s on a core where SHA-256 runs at 1.4, and is a checksum that S3 keeps
for whole objects too, so it is the same number end to end. It is no guard against somebody who means harm.

Left to whom: what is stored under which name, and which objects belong together, is the caller's business.
"""

import functools
import secrets
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from trainer.errors import ConfigError, RetryError


class StoreError(RetryError):
    """The store does not do, at the moment, what it was asked."""


class ObjectMissingError(StoreError):
    """There is no object of this name, or it has fewer bytes than were asked for."""


class BucketMissingError(ConfigError):
    """There is nothing to put objects into."""


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

    def append(self, following: "Checksum") -> None:
        """Count all that `following` has counted, without seeing it again."""
        self._crc = _multiply(_power_of_bytes(following.bytes), self._crc) ^ following._crc
        self.bytes += following.bytes

    def __str__(self) -> str:
        return f"crc32:{self._crc:08x}"


# A CRC-32 is the remainder of a polynomial over bits, the lowest power in the highest bit. n bytes that follow multiply it by x^8n.
_POLYNOMIAL = 0xEDB88320
_ONE, _X = 1 << 31, 1 << 30


def _multiply(one: int, other: int) -> int:
    """The remainder of a product of remainders."""
    product = 0
    for power in range(31, -1, -1):
        if one >> power & 1:
            product ^= other
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product


@functools.lru_cache(maxsize=1024)
def _power_of_bytes(count: int) -> int:
    """The remainder of x to the power of 8 `count`."""
    result, square, exponent = _ONE, _X, 8 * count
    while exponent:
        if exponent & 1:
            result = _multiply(result, square)
        square, exponent = _multiply(square, square), exponent >> 1
    return result


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

    def read_into(self, key: str, offset: int, places: Sequence[memoryview]) -> None:
        """Fill `places`, flat bytes, one after the other with those of `key` from `offset` on; no copy of them is held.

        ObjectMissingError as for `get`; after any error `places` hold anything.
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


def ends_too_early(uri: str, key: str, *, offset: int, wanted: int, found: int) -> ObjectMissingError:
    """The error for an object that has fewer bytes than are asked for."""
    return ObjectMissingError(
        f"{uri} was asked for {wanted} bytes of {key} from byte {offset} on, and it ends {wanted - found} too early"
    )


def check_exclusive(store: Store) -> None:
    """ConfigError where `store` does not honour exclusive puts: a run's writers would not see each other there."""
    nonce = secrets.token_hex(8)
    key = f"exclusive-check-{nonce}"
    store.put(key, nonce.encode(), exclusive=True)
    try:
        store.put(key, b"second", exclusive=True)
    except ObjectExistsError:
        return
    finally:
        store.delete(key)
    raise ConfigError(
        f"{store.uri} was asked to create {key} twice and did so, where the second must be refused; "
        'give a store that honours conditional PUTs (If-None-Match: "*"), or a folder'
    )
