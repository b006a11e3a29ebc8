"""A store that is a prefix of an S3 bucket, through boto3.

An object that fits in one part is one PUT, a longer one is streamed as a multipart upload: parts are filled from memory, one at
a time, while others travel, and the object appears when the upload is completed. Each request carries the CRC-32 of its
bytes, and the completion that of the whole object, put together from those of its parts, so the server refuses what was
damaged on the way.

Who retries what: botocore repeats a request that is throttled, answered with 5xx or lost; here we repeat one whose body broke
off while it was read, whose body arrived damaged, or that met another conditional PUT. What still fails becomes an error
in `s3_errors`.

Left to whom: credentials, their renewal and the variables that stand in for empty fields of StoreConfig are boto3's.
"""

import base64
import functools
import io
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any, NamedTuple

from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from trainer.config.store import StoreConfig
from trainer.store.base import Checksum, ObjectExistsError, ObjectInfo, StoreError, ends_too_early
from trainer.store.s3_errors import explaining
from trainer.store.s3_ranges import Range, RangeReader, write_range

_MB = 1 << 20
_RANGE_BYTES = 8 * _MB  # what one GET of a `get` reads of a larger object
_PIECE_BYTES = _MB
_ONE_PUT_BYTES = 5 << 30  # the most that S3 takes in one request; a manifest of thousands of ranks needs some of it
_DELETE_BATCH = 1000  # the most that one DeleteObjects takes
_AGAIN = {
    "BadDigest": "was damaged on the way",
    "XAmzContentChecksumMismatch": "was damaged on the way",
    "XAmzContentSHA256Mismatch": "was damaged on the way",
    "ConditionalRequestConflict": "met another write of the same name",
    "OperationAborted": "met another write of the same name",
}


class _TryAgainError(StoreError):
    """What botocore does not retry, and we do."""


_try_again = retry(
    retry=retry_if_exception_type(_TryAgainError),
    stop=stop_after_attempt(5),
    wait=wait_random_exponential(multiplier=0.2, max=5),
    reraise=True,
)


class _Sent(NamedTuple):
    """A part of an upload."""

    number: int
    checksum: Checksum
    etag: str = ""

    @property
    def proof(self) -> dict[str, Any]:
        return {"PartNumber": self.number, "ChecksumCRC32": _in_base64(self.checksum)}


class S3Store:
    """The objects of `bucket` under `prefix`, which is empty or ends with "/".

    An exclusive put is one request. It succeeds, too, where the same bytes are there already: they are taken for those
    of a try whose answer was lost, so writers who compete put something of their own in.
    """

    def __init__(self, bucket: str, prefix: str, config: StoreConfig) -> None:
        assert not prefix or prefix.endswith("/")
        self.uri = f"s3://{bucket}/{prefix}".removesuffix("/")
        self._bucket = bucket
        self._prefix = prefix
        self._config = config

    def put(self, key: str, payload: bytes | Iterable[memoryview], *, exclusive: bool = False) -> ObjectInfo:
        """See Store."""
        name = self._name(key)
        assert key, "an object has a name"
        part_bytes = _ONE_PUT_BYTES if exclusive else self._part_bytes
        parts = _parts([memoryview(payload)] if isinstance(payload, bytes) else payload, part_bytes)
        with explaining(self.uri, "write", key):
            first = list(islice(parts, 2))
            if len(first) == 1:
                checksum = self._put_object(name, first[0], exclusive=exclusive)
            else:
                assert not exclusive, "an exclusive object goes up in one request"
                checksum = self._put_parts(name, _after(first, parts))
        return ObjectInfo(key, checksum.bytes, str(checksum))

    def get(self, key: str, offset: int = 0, length: int | None = None) -> bytes:
        """See Store; an object that one request brings is checked against its checksum when all of it is asked for."""
        with explaining(self.uri, "read", key):
            first = self._fetch_first(self._name(key), offset, length)
            available = max(first.object_bytes - offset, 0)
            wanted = available if length is None else length
            if available < wanted:
                raise ends_too_early(self.uri, key, offset=offset, wanted=wanted, found=available)
            return first.data if len(first.data) == wanted else self._get_parts(self._name(key), offset, wanted, first)

    def read_into(self, key: str, offset: int, places: Sequence[memoryview]) -> None:
        """See Store; one request, which is also what is repeated when it breaks off, so ask for some tens of MB at once."""
        wanted = sum(len(place) for place in places)
        if not wanted:  # HTTP cannot ask for nothing
            return
        with explaining(self.uri, "read", key):
            try:
                found = self._fetch_into(self._name(key), offset, places)
            except self._client.exceptions.ClientError as error:
                if not _is_past_the_end(error):
                    raise
                found = 0
        if found < wanted:
            raise ends_too_early(self.uri, key, offset=offset, wanted=wanted, found=found)

    def list(self, prefix: str) -> list[ObjectInfo]:
        """See Store."""
        with explaining(self.uri, "list", prefix):
            found = [ObjectInfo(name.removeprefix(self._prefix), size) for name, size in self._objects(prefix)]
        folder_markers_left_out = (info for info in found if not info.key.endswith("/"))
        return sorted(folder_markers_left_out, key=lambda info: info.key)

    def delete(self, prefix: str) -> None:
        """See Store."""
        assert prefix.removesuffix("/"), "a whole store is never deleted"
        with explaining(self.uri, "delete", prefix):
            # What lists show goes last: a delete that is killed can be seen, and done again.
            for name, upload in self._unfinished(prefix):
                self._abort(name, upload)
            names = iter([name for name, _ in self._objects(prefix)])
            while batch := list(islice(names, _DELETE_BATCH)):
                self._delete_objects(batch)

    def measure_clock_skew_s(self) -> float:
        """How many seconds the clock of this machine is ahead of the server's, to the second that HTTP tells."""
        with explaining(self.uri, "list", ""):
            answer = self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        told = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return time.time() - told.timestamp()

    @property
    def _client(self) -> Any:
        return _client(self._config, os.getpid())

    @property
    def _part_bytes(self) -> int:
        return self._config.part_mb * _MB

    def _name(self, key: str) -> str:
        """The name in the bucket of `key`, or of a prefix with or without its last "/"; that of the store for an empty one."""
        parts = key.removesuffix("/").split("/") if key else []
        assert all(part.strip(".") and "\0" not in part for part in parts), key
        return self._prefix + "/".join(parts)

    # Writing

    @_try_again
    def _put_object(self, name: str, data: bytearray, *, exclusive: bool) -> Checksum:
        checksum = _checksum_of(data)
        condition = {"IfNoneMatch": "*"} if exclusive else {}
        arguments = {"Bucket": self._bucket, "Key": name, "Body": data, "ChecksumCRC32": _in_base64(checksum)}
        with _named_again(name):
            try:
                self._client.put_object(**arguments, **condition, **self._encryption)
            except self._client.exceptions.ClientError as error:
                if not exclusive or error.response["ResponseMetadata"]["HTTPStatusCode"] != 412:
                    raise
                if self._fetch(name, len(data) + 1).data != data:
                    raise ObjectExistsError(
                        f"s3://{self._bucket}/{name} was to be created and is there already; another writer made it"
                    ) from error
        return checksum

    def _put_parts(self, name: str, parts: Iterator[bytearray]) -> Checksum:
        place = {"Bucket": self._bucket, "Key": name}
        upload = self._client.create_multipart_upload(
            **place, ChecksumAlgorithm="CRC32", ChecksumType="FULL_OBJECT", **self._encryption
        )["UploadId"]
        whole = Checksum()
        try:
            sent = self._send(name, upload, parts)
            for part in sent:
                whole.append(part.checksum)
            with _named_again(name):
                self._client.complete_multipart_upload(
                    **place,
                    UploadId=upload,
                    MultipartUpload={"Parts": [{**part.proof, "ETag": part.etag} for part in sent]},
                    ChecksumType="FULL_OBJECT",
                    ChecksumCRC32=_in_base64(whole),
                )
        except self._client.exceptions.NoSuchUpload:
            if not self._is_there(name, whole):
                raise
        except BaseException:
            with suppress(*_boto_errors()):
                self._abort(name, upload)
            raise
        return whole

    def _send(self, name: str, upload: str, parts: Iterator[bytearray]) -> Sequence[_Sent]:
        """Send `parts`, `threads` at once, while the next one is filled; the first failure ends it."""
        sent: list[_Sent] = []
        travelling: set[Future[_Sent]] = set()
        with ThreadPoolExecutor(self._config.threads) as threads:
            for number, part in enumerate(parts, start=1):
                if len(travelling) == self._config.threads:
                    arrived, travelling = wait(travelling, return_when=FIRST_COMPLETED)
                    sent += [future.result() for future in arrived]
                travelling.add(threads.submit(self._send_part, name, upload, number, part))
            sent += [future.result() for future in travelling]
        return sorted(sent, key=lambda part: part.number)

    @_try_again
    def _send_part(self, name: str, upload: str, number: int, part: bytearray) -> _Sent:
        sent = _Sent(number, _checksum_of(part))
        with _named_again(f"part {number} of {name}"):
            answer = self._client.upload_part(Bucket=self._bucket, Key=name, UploadId=upload, Body=part, **sent.proof)
        return sent._replace(etag=answer["ETag"])

    def _is_there(self, name: str, checksum: Checksum) -> bool:
        """Whether the object is ours: a completion whose answer was lost has succeeded, and its repetition finds no upload."""
        with suppress(*_boto_errors()):
            head = self._client.head_object(Bucket=self._bucket, Key=name, ChecksumMode="ENABLED")
            return (head["ContentLength"], head.get("ChecksumCRC32")) == (checksum.bytes, _in_base64(checksum))
        return False

    @property
    def _encryption(self) -> dict[str, str]:
        if self._config.sse == "none":
            return {}
        key = {"SSEKMSKeyId": self._config.kms_key_id} if self._config.kms_key_id else {}
        return {"ServerSideEncryption": self._config.sse, **key}

    # Reading

    def _fetch_first(self, name: str, offset: int, length: int | None) -> Range:
        """As much of what is wanted as one request brings; nothing where the object ends at `offset` or before."""
        limit = _RANGE_BYTES if length is None else min(length, _RANGE_BYTES)
        if offset == 0 and length is None:
            return self._fetch(name, limit)
        asked = limit or 1  # HTTP cannot ask for nothing
        if found := _range_reader(self._config, self._bucket, os.getpid()).read(name, offset, asked):
            return found._replace(data=found.data[:limit])
        try:
            return self._fetch(name, limit, Range=write_range(offset, asked))
        except self._client.exceptions.ClientError as error:
            if not _is_past_the_end(error):
                raise
            return Range(b"", offset, "")

    def _get_parts(self, name: str, offset: int, wanted: int, first: Range) -> bytes:
        """What `first` begins, the rest of it read by several threads into its place."""
        buffer = io.BytesIO()  # gives its memory away as bytes without a copy
        buffer.seek(wanted - 1)
        buffer.write(b"\0")
        with buffer.getbuffer() as memory, ThreadPoolExecutor(self._config.threads) as threads:
            memory[: len(first.data)] = first.data

            def fill(start: int) -> None:
                end = min(start + _RANGE_BYTES, wanted)
                self._fetch_into(name, offset + start, [memory[start:end]], IfMatch=first.etag)

            for _ in threads.map(fill, range(len(first.data), wanted, _RANGE_BYTES)):
                pass
        return buffer.getvalue()

    @_try_again
    def _fetch(self, name: str, limit: int, **conditions: str) -> Range:
        """The first `limit` bytes that a GET under `conditions` answers with."""
        with self._answer(name, **conditions) as answer:
            coming = answer["ContentLength"]
            data = answer["Body"].read() if coming <= limit else answer["Body"].read(limit)
        whole = int(answer["ContentRange"].rpartition("/")[2]) if "ContentRange" in answer else coming
        return Range(data[:limit], whole, answer["ETag"])

    @_try_again
    def _fetch_into(self, name: str, offset: int, places: Sequence[memoryview], **conditions: str) -> int:
        """Fill `places` with what one GET brings, from `offset` on; how many bytes there are, and if too few, none is read."""
        wanted = sum(len(place) for place in places)
        with self._answer(name, Range=write_range(offset, wanted), **conditions) as answer:
            if answer["ContentLength"] < wanted:
                return int(answer["ContentLength"])
            for place in places:
                _read_body_into(answer["Body"], place)
            answer["Body"].read()  # nothing is left: at its end botocore compares length and checksum
        return wanted

    @contextmanager
    def _answer(self, name: str, **conditions: str) -> Iterator[dict[str, Any]]:
        """The answer to a GET under `conditions`, whose body is read meanwhile; one that is spoilt is asked for again."""
        from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError, ResponseStreamingError

        answer = self._client.get_object(Bucket=self._bucket, Key=name, ChecksumMode="ENABLED", **conditions)
        try:
            yield answer
        except (FlexibleChecksumError, HTTPClientError, IncompleteReadError, ResponseStreamingError) as error:
            raise _TryAgainError(
                f"s3://{self._bucket}/{name} was read and its bytes broke off or were damaged ({error}); "
                "mend the way to the store and start the same job again"
            ) from error
        finally:
            answer["Body"].close()

    # Listing and deleting

    def _objects(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Name and size of the object that is called `prefix`, and of all under it."""
        name = self._name(prefix)
        if prefix:  # of all names that begin so, the name itself is the first
            alone = self._client.list_objects_v2(Bucket=self._bucket, Prefix=name, MaxKeys=1)
            yield from ((entry["Key"], entry["Size"]) for entry in alone.get("Contents", []) if entry["Key"] == name)
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=_folder(name))
        yield from ((entry["Key"], entry["Size"]) for page in pages for entry in page.get("Contents", []))

    def _unfinished(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Name and id of the multipart uploads of `prefix` and of all under it."""
        name = self._name(prefix)
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=name)
        uploads = ((entry["Key"], entry["UploadId"]) for page in pages for entry in page.get("Uploads", []))
        yield from ((key, upload) for key, upload in uploads if key == name or key.startswith(_folder(name)))

    def _abort(self, name: str, upload: str) -> None:
        with suppress(self._client.exceptions.NoSuchUpload):  # somebody else ended it
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=name, UploadId=upload)

    def _delete_objects(self, names: Sequence[str]) -> None:
        wanted = {"Objects": [{"Key": name} for name in names], "Quiet": True}
        answer = self._client.delete_objects(Bucket=self._bucket, Delete=wanted)
        for error in answer.get("Errors", []):
            raise self._client.exceptions.ClientError({"Error": error, **answer}, "DeleteObjects")


@functools.cache
def _client(config: StoreConfig, _process: int) -> Any:
    """The client of this process, whose threads share it: after a fork its connections are the parent's, so the child makes one."""
    from boto3.session import Session
    from botocore.config import Config

    style = config.addressing_style or ("path" if config.endpoint_url else "auto")
    proxies = {"http": config.proxy_url, "https": config.proxy_url} if config.proxy_url else None
    return Session().client(
        "s3",
        endpoint_url=config.endpoint_url,
        region_name=config.region,
        verify=config.ca_bundle,
        config=Config(
            s3={"addressing_style": style},
            proxies=proxies,
            # "standard" draws all retries of a client on one quota, which a few threads use up in the first second of an outage.
            retries={"mode": "legacy", "total_max_attempts": config.max_attempts},
            connect_timeout=min(config.timeout_s, 10),
            read_timeout=config.timeout_s,
            max_pool_connections=4 * config.threads,  # several objects may be read at once
            tcp_keepalive=True,
        ),
    )


@functools.cache
def _range_reader(config: StoreConfig, bucket: str, process: int) -> RangeReader:
    """That of this process, as its client."""
    return RangeReader(_client(config, process), bucket)


def _parts(pieces: Iterable[memoryview], part_bytes: int) -> Iterator[bytearray]:
    """The bytes of `pieces` in parts that are full but for the last; one empty part for no bytes.

    A full part is handed out when another byte comes.
    """
    part = bytearray()
    for piece in pieces:
        rest = piece.cast("B") if piece.nbytes else memoryview(b"")
        while rest:
            if len(part) == part_bytes:
                yield part
                part = bytearray()
            room = part_bytes - len(part)
            part += rest[:room]
            rest = rest[room:]
    yield part


def _after(first: list[bytearray], parts: Iterator[bytearray]) -> Iterator[bytearray]:
    """`first`, none of which is held any longer than it is used, and then `parts`."""
    while first:
        yield first.pop(0)
    yield from parts


def _read_body_into(body: Any, place: memoryview) -> None:
    """Fill `place` from `body` in pieces that stay in the cache while they are copied."""
    while place:
        place = place[body.readinto(place[:_PIECE_BYTES]) :]  # a body that ends before raises


def _is_past_the_end(error: Any) -> bool:
    """Whether a range was asked for that begins where the object has ended."""
    return bool(error.response["ResponseMetadata"]["HTTPStatusCode"] == 416)


def _folder(name: str) -> str:
    """What the names of all objects under `name` begin with."""
    return name and name.removesuffix("/") + "/"


def _checksum_of(data: bytearray) -> Checksum:
    checksum = Checksum()
    checksum.update(memoryview(data))
    return checksum


def _in_base64(checksum: Checksum) -> str:
    """A CRC-32 as S3 writes it."""
    return base64.b64encode(bytes.fromhex(str(checksum).removeprefix("crc32:"))).decode()


@contextmanager
def _named_again(name: str) -> Iterator[None]:
    """Refusals that a repetition may cure, as the error that is repeated."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        reason = _AGAIN.get(error.response["Error"].get("Code", ""))
        if reason is None:
            raise
        raise _TryAgainError(f"{name} was written and {reason} each time ({error}); start the same job again") from error


def _boto_errors() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, ClientError
