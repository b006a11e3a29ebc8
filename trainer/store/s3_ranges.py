"""Ranges of objects on S3, asked for with few CPU seconds.

botocore builds, signs and parses every GET anew, which costs more of a core than the bytes themselves where a clip is a GET. A URL that
is signed once reads all ranges of its object for an hour, so here a GET is a line of HTTP through botocore's own connections.

Left to whom: whatever is not plainly answered (an error, a redirect, expired credentials, too few bytes) is botocore's, which is asked
again by the caller and has the retries and the words for it.
"""

import re
import time
from functools import lru_cache
from typing import Any, NamedTuple

_SIGNED_FOR_S = 3600
_OBJECTS = 4096
"""URLs that are kept; shards are read one after the other, so old ones are not missed."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class Range(NamedTuple):
    """What one answer brings: bytes, and the whole object's size and tag."""

    data: bytes
    object_bytes: int
    etag: str


def write_range(start: int, length: int) -> str:
    """`length` bytes from `start` on, as HTTP asks for them."""
    return f"bytes={start}-{start + length - 1}"


class RangeReader:
    """Reads ranges of the objects of `bucket` with the credentials, proxies and connections of a boto3 client; threads may share it."""

    def __init__(self, client: Any, bucket: str) -> None:
        self._client = client
        self._bucket = bucket
        self._http = client._endpoint.http_session  # private, but made of all that the client knows of certificates and proxies
        self._sign = lru_cache(_OBJECTS)(self._sign_anew)

    def read(self, name: str, offset: int, length: int) -> Range | None:
        """The bytes of object `name` from `offset` on, `length` or as many as there are; none where that has to be asked of botocore."""
        from botocore.awsrequest import AWSPreparedRequest
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        url = self._sign(name, int(time.time() / (_SIGNED_FOR_S / 2)))
        headers = {"Range": write_range(offset, length)}
        try:
            answer = self._http.send(AWSPreparedRequest("GET", url, headers, None, stream_output=True))
            data: bytes = answer.raw.read()  # at once; botocore would join it from pieces of 64 KB
        except (BotoCoreError, HTTPError):
            return None
        sent = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status_code != 206 or sent is None:
            self._sign.cache_clear()  # perhaps the credentials have changed
            return None
        first, last, whole = map(int, sent.groups())
        if first != offset or len(data) != last + 1 - first or len(data) != min(length, whole - offset):
            return None
        return Range(data, whole, answer.headers.get("ETag", ""))

    def _sign_anew(self, name: str, period: int) -> str:
        """A URL that holds for this half hour and the next; which one it is tells old URLs from new ones."""
        del period
        place = {"Bucket": self._bucket, "Key": name}
        url: str = self._client.generate_presigned_url("get_object", Params=place, ExpiresIn=_SIGNED_FOR_S)
        return url
