"""Which changes of a run's config are another experiment."""

import pytest

from trainer.config.changes import differences, is_free, refuse_another_experiment
from trainer.errors import ConfigError

BEFORE = {
    "seed": 0,
    "steps": 20,
    "data": {"root": "/old", "clip": {"frames": 4}, "datasets": [{"uri": "s3://a", "weight": 1.0}]},
    "optim": {"lr": 1e-3},
}


def change(**sections: object) -> list[str]:
    return list(differences(BEFORE, BEFORE | sections))


def test_differences_are_told_key_by_key_also_in_lists_of_sections() -> None:
    assert change() == []
    data = {"root": "/new", "clip": {"frames": 8}, "datasets": [{"uri": "s3://b", "weight": 2.0}]}
    assert change(data=data) == [
        "data.root /old -> /new",
        "data.clip.frames 4 -> 8",
        "data.datasets[0].uri s3://a -> s3://b",
        "data.datasets[0].weight 1.0 -> 2.0",
    ]


def test_where_data_is_and_how_long_a_run_goes_on_is_free() -> None:
    moved = change(data=BEFORE["data"] | {"root": "/new"}, steps=30, optim={"lr": 2e-3})  # type: ignore[operator]
    assert [one for one in moved if is_free(one)] == ["data.root /old -> /new"]
    refuse_another_experiment(moved, uri="runs/mine")


@pytest.mark.parametrize("sections", [{"seed": 1}, {"data": BEFORE["data"] | {"clip": {"frames": 8}}}])  # type: ignore[operator]
def test_what_would_have_made_other_steps_is_refused_by_name(sections: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"runs/mine was to be resumed and is another experiment: (seed 0|data\.clip\.frames)"):
        refuse_another_experiment(change(**sections), uri="runs/mine")
