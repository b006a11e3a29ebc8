"""From what boto3 raises to an error that says what to change, and whether the same job can be started again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer.errors import ConfigError, OdonataError
from trainer.store.base import BucketMissingError, ObjectMissingError, StoreError

_PERMISSIONS = {
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "GetObject": "s3:GetObject and s3:ListBucket (without the latter a missing object looks forbidden)",
    "HeadObject": "s3:GetObject",
    "ListObjectsV2": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "DeleteObjects": "s3:DeleteObject",
}
_CREDENTIALS = "give the credentials of a user of this store (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, a role)"
_REGION = "set the store's region to the bucket's"
_CURES: dict[str, str] = {
    "NoSuchBucket": "create the bucket, or give the URI of one that is there",
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "ExpiredToken": _CREDENTIALS,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "RequestTimeTooSkewed": "set the clock of this machine",
}
_BUSY = {404, 408, 409, 412, 429}  # 404: of a bucket and an object see below, so of an upload that somebody ended


@contextmanager
def explaining(uri: str, verb: str, key: str) -> Iterator[None]:
    """What boto3 raises here was met when the store `uri` was asked to `verb` the objects of `key`."""
    from botocore.exceptions import BotoCoreError, ClientError

    asked = f"{uri} was asked to {verb} {key or 'everything'}"
    try:
        yield
    except ClientError as error:
        raise _refused(asked, error) from error
    except BotoCoreError as error:
        raise _not_answered(asked, error) from error


def _refused(asked: str, error: Any) -> OdonataError:
    """The error for a server's answer."""
    code, status = error.response["Error"].get("Code", ""), error.response["ResponseMetadata"]["HTTPStatusCode"]
    said = f"{asked} and the server says {code}: {error.response['Error'].get('Message', '')} ({error.operation_name})"
    if code == "NoSuchKey":
        return ObjectMissingError(f"{asked}, which is not there")
    if code in _CURES:
        return (BucketMissingError if code == "NoSuchBucket" else ConfigError)(f"{said}; {_CURES[code]}")
    if status == 403 or code.startswith(("AccessDenied", "KMS.")):
        permission = _PERMISSIONS.get(error.operation_name, error.operation_name)
        return ConfigError(f"{said}; allow this user {permission}, and the key if objects are encrypted with one")
    if status in _BUSY:
        return StoreError(f"{said}; another process wrote or deleted it at the same time: start the same job again")
    if 300 <= status < 500:
        return ConfigError(f"{said}; give a store whose server can do this")
    return StoreError(f"{said}, again and again; mend the server, or wait, and start the same job again")


def _not_answered(asked: str, error: Exception) -> OdonataError:
    """The error for no answer at all, or for a request that never left."""
    from botocore import exceptions as boto

    said = f"{asked} and boto3 says: {error}"
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.ProfileNotFound):
        return ConfigError(f"{said}; {_CREDENTIALS}")
    if isinstance(error, boto.ParamValidationError | boto.InvalidRegionError | boto.NoRegionError | boto.InvalidConfigError):
        return ConfigError(f"{said}; give s3://bucket/prefix with a bucket's name, and a region that there is")
    if isinstance(error, boto.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return ConfigError(f"{said}; give the store's ca_bundle, the file of certificates that this server's is signed with")
    return StoreError(
        f"{said}; see that the server runs and that endpoint_url and proxy lead to it, then start the same job again"
    )
