"""Tables: Parquet in a store, written and read some rows at a time, however long they are."""

import io
from collections.abc import Iterable, Iterator, Sequence
from tempfile import TemporaryFile

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.shards.layout import StoredObject
from trainer.errors import DataError
from trainer.store.base import ObjectInfo, ObjectMissingError, Store

_ROWS_AT_ONCE = 65_536
_PIECE_BYTES = 8 << 20


def write_table(store: Store, key: str, tables: Iterable[pa.Table], schema: pa.Schema) -> tuple[ObjectInfo, int]:
    """Write `tables` on end as one; what was stored, and how many rows."""
    rows = 0
    with TemporaryFile() as file:
        with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
            for table in tables:
                writer.write_table(table.cast(schema), row_group_size=_ROWS_AT_ONCE)
                rows += len(table)
        file.seek(0)
        return store.put(key, (memoryview(piece) for piece in iter(lambda: file.read(_PIECE_BYTES), b""))), rows


def read_table(store: Store, stored: StoredObject, columns: Sequence[str]) -> pa.Table:
    """Some columns of a table as a whole."""
    batches = list(read_batches(store, stored, columns))
    return pa.Table.from_batches(batches) if batches else _open(store, stored).schema_arrow.empty_table().select(list(columns))


def read_batches(store: Store, stored: StoredObject, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """A table some rows at a time. DataError where it is not what was stored."""
    file = _open(store, stored)
    try:
        for group in range(file.num_row_groups):  # iter_batches over all of them comes to hold the whole table
            yield from file.read_row_group(group, columns=list(columns), use_threads=False).to_batches()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{store.uri}/{stored.key} was to be read as a table of a packed data set and cannot be: {error}; "
            "bring that object back from where it was copied from, or pack the drives again elsewhere"
        ) from error


def _open(store: Store, stored: StoredObject) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(_Ranges(store, stored), page_checksum_verification=True, pre_buffer=False)
    except (pa.ArrowException, OSError, ObjectMissingError) as error:
        raise DataError(
            f"{store.uri}/{stored.key} was to be read as a table of a packed data set and is none: {error}; "
            "bring that object back from where it was copied from, or pack the drives again elsewhere"
        ) from error


class _Ranges(io.RawIOBase):
    """An object of a store as a file to read: each read is one request."""

    def __init__(self, store: Store, stored: StoredObject) -> None:
        self._store = store
        self._stored = stored
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._stored.bytes}[whence]
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        left = self._stored.bytes - self._place
        wanted = left if size is None or size < 0 else min(size, left)
        data = self._store.get(self._stored.key, self._place, wanted) if wanted > 0 else b""
        self._place += len(data)
        return data
