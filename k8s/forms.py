"""Strings in the forms that Kubernetes has for them: names, labels, quantities. Who writes one otherwise is shown how it is written."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

_FACTORS = {
    "": 1,
    "k": 1e3,
    "K": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "Ki": 2**10,
    "ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


@dataclass(frozen=True)
class Form:
    """What a string has to look like, for pydantic and for a person."""

    pattern: str
    words: str
    """After `is not`: what it should be, with an example."""

    def check(self, text: str) -> str:
        """`text`, or ValueError with the words."""
        if not re.fullmatch(self.pattern, text):
            raise ValueError(f"{text!r} is not {self.words}")
        return text

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema) | {"pattern": f"^{self.pattern}$"}


_LABEL = r"[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?"

DnsLabel = Annotated[
    str, Form(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", "a name of at most 63 lower-case letters, digits and dashes, as perception")
]
ObjectName = Annotated[
    str, Form(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?", "a name of lower-case letters, digits, dashes and dots, as odonata-s3")
]
LabelKey = Annotated[
    str, Form(rf"([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?{_LABEL}", "the key of a label or taint, as nvidia.com/gpu.product")
]
LabelValue = Annotated[str, Form(rf"({_LABEL})?", "the value of a label or taint, as NVIDIA-H100-80GB-HBM3")]
ResourceName = Annotated[str, Form(r"[a-z0-9.-]+/[A-Za-z0-9._-]+", "the name of a resource, as nvidia.com/gpu")]
Cores = Annotated[
    str,
    BeforeValidator(lambda cores: str(cores) if type(cores) in (int, float) else cores),
    Form(r"[0-9]+(\.[0-9]+|m)?", "a number of cores, as 96 or 500m"),
]
Bytes = Annotated[str, Form(r"[1-9][0-9]*([KMGT]i?|ki?)", "an amount of memory, as 900Gi (1024^3 bytes) or 900G (1000^3)")]
Count = Annotated[str, Form(r"[1-9][0-9]*", 'a number in quotes, as "8"')]
MountPath = Annotated[str, Form(r"(/[A-Za-z0-9._-]+)+", "a folder from the root, as /data/nuscenes")]
Url = Annotated[str, Form(r"https?://.+", "a URL, as https://s3.example.com")]
ImageName = Annotated[
    str,
    Form(
        r"[a-z0-9][a-z0-9._/:-]*[a-z0-9](:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?",
        "an image with its tag or digest, as registry.example.com/odonata:0.1.0-cuda",
    ),
]


def count_bytes(quantity: str) -> float:
    """Bytes of a quantity such as 64Gi."""
    digits = quantity.rstrip("KMGTki")
    return int(digits) * _FACTORS[quantity[len(digits) :]]
