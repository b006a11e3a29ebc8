"""What a run has left behind is read back as it is, or refused with a sentence."""

from pathlib import Path

import pytest

from trainer.errors import CheckpointError
from trainer.run_history import read_evaluation
from trainer.store.open import open_store


@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"{}"])
def test_an_evaluation_that_is_none_is_refused(content: bytes | None, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    if content:
        store.put("evaluation.json", content)
    with pytest.raises(
        CheckpointError, match=r"holds no evaluation\.json that can be read .*give the --out of an `odonata evaluate`"
    ):
        read_evaluation(store)
