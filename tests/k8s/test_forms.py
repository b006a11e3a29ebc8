"""Strings in Kubernetes' forms. What a wrong one is answered with, key by key, is in test_cluster."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from k8s.cluster import cluster_config_schema
from k8s.forms import Bytes, DnsLabel, count_bytes


@pytest.mark.parametrize(("quantity", "expected"), [("1Ki", 1024), ("5G", 5e9), ("2Ti", 2 * 2**40), ("7k", 7000)])
def test_quantities_are_counted_as_kubernetes_counts_them(quantity: str, expected: float) -> None:
    assert count_bytes(quantity) == expected


@given(st.integers(1, 10**6), st.sampled_from(["K", "Ki", "M", "Mi", "G", "Gi", "T", "Ti", "k", "ki"]))
def test_every_quantity_that_is_taken_can_be_counted(number: int, suffix: str) -> None:
    assert count_bytes(TypeAdapter(Bytes).validate_python(f"{number}{suffix}")) >= number * 1000


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a" * 64, "a.b", "a\n"])
def test_what_is_no_dns_label_is_refused_and_shown_one(name: str) -> None:
    with pytest.raises(ValidationError, match="as perception"):
        TypeAdapter(DnsLabel).validate_python(name)


def test_the_schema_tells_forms_and_meanings_to_editors() -> None:
    keys = json.loads(cluster_config_schema())["properties"]
    assert keys["memory"]["pattern"].startswith("^[1-9]")
    assert "staged checkpoints" in keys["memory"]["description"]
