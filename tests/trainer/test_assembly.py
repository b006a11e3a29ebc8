"""The model of a run."""

import pytest
import torch

from models.pretraining import build_model
from tests.trainer.plan.short import run_config
from trainer.assembly import assemble_model


def test_it_has_the_weights_that_the_seed_gives_and_trains_them_all() -> None:
    config = run_config()
    torch.manual_seed(3)
    assembled = assemble_model(config)
    torch.manual_seed(3)
    built = build_model(config.encoder, config.objectives, config.token_grid)
    for (name, ours), theirs in zip(assembled.named_parameters(), built.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.requires_grad == theirs.requires_grad, name


@pytest.mark.parametrize("trained", [True, False])
def test_its_encoder_is_frozen_where_the_run_does_not_train_it(trained: bool) -> None:
    config = run_config()
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"train_encoder": trained})})
    assert any(weight.requires_grad for weight in assemble_model(config).encoder.parameters()) == trained
