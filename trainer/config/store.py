"""How a store on S3 is reached; a store in a folder needs none of it."""

from typing import Literal

from pydantic import Field, model_validator

from models.config import Section


class StoreConfig(Section):
    """How the store of a run, an s3:// URI, is reached.

    Credentials are no part of it: they come from the standard chain (environment, profile, web identity, instance). Where a
    field is none, boto3's own variables and profiles count.
    """

    endpoint_url: str | None = Field(None, pattern="^https?://")
    """Server that speaks S3; none takes AWS_ENDPOINT_URL_S3, or AWS itself."""
    region: str | None = None
    """Region of the bucket; none takes AWS_DEFAULT_REGION or the profile's."""
    addressing_style: Literal["auto", "path", "virtual"] | None = None
    """Bucket in the path or in the host name; none is path where endpoint_url is set, else auto."""
    ca_bundle: str | None = None
    """File of certificates that the server's is checked against; none takes AWS_CA_BUNDLE, or the public ones."""
    proxy_url: str | None = Field(None, pattern="^https?://")
    """Proxy on the way to the server; none takes HTTPS_PROXY, HTTP_PROXY and NO_PROXY."""
    sse: Literal["none", "AES256", "aws:kms"] = "none"
    """Encryption that is asked for with every object; none leaves it to the bucket's default."""
    kms_key_id: str | None = None
    """Key of aws:kms; none takes the account's own for S3."""
    threads: int = Field(4, ge=1, le=64)
    """Parts of one object in flight at once, and connections that carry them."""
    part_mb: int = Field(32, ge=5, le=5120)
    """MB of a part. A put holds threads + 2 of them in host memory, and an object has at most 10,000."""
    max_attempts: int = Field(7, ge=1, le=10)
    """Tries of one request before the run ends with exit 75; seven outlast half a minute, each one more doubles that."""
    timeout_s: float = Field(60.0, gt=0)
    """Seconds of silence after which a request counts as lost."""

    @property
    def impatient(self) -> "StoreConfig":
        """The same for a look that somebody waits for: one try, and soon given up."""
        return self.model_copy(update={"max_attempts": 1, "timeout_s": 5.0})

    @model_validator(mode="after")
    def kms_key_needs_kms(self) -> "StoreConfig":
        """A key that no object would be encrypted with is a slip."""
        if self.kms_key_id is not None and self.sse != "aws:kms":
            raise ValueError('kms_key_id counts with sse: "aws:kms" only; set that, or take the key out')
        return self
