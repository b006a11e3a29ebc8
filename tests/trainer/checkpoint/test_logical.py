"""Names of the logical state, and that its tensors are those that train."""

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from tests.trainer.checkpoint.toy import Block, Toy, Trainer, whole
from trainer.checkpoint.logical import logical_name, logical_state, model_state


def test_names_say_what_a_tensor_is_and_whose() -> None:
    names = Trainer(0).state().keys()
    assert {"model.encoder.blocks.0.qkv.weight", "model.frozen", "model.offset"} <= names
    assert {f"optim.head.bias.{moment}" for moment in ("step", "exp_avg", "exp_avg_sq")} <= names
    assert "ema.encoder.blocks.1.mlp.2.bias" in names
    assert not [name for name in names if "scratch" in name or name.startswith("optim.frozen")]
    weights = sum(parameter.requires_grad for parameter in Toy().parameters())
    assert len(names) == (weights + 2) + 3 * weights + sum("encoder" in name for name, _ in Toy().named_parameters())


def test_checkpointed_and_compiled_modules_have_the_names_of_the_bare_one() -> None:
    wrapped = Toy()
    wrapped.head = torch.compile(wrapped.head, backend="eager")  # type: ignore[assignment]
    apply_activation_checkpointing(wrapped, check_fn=lambda module: isinstance(module, Block))
    compiled = torch.compile(wrapped, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_parameters())
    optimizer = torch.optim.AdamW(compiled.parameters())
    bare = Toy()
    expected = logical_state(bare, torch.optim.AdamW(bare.parameters()), dict(bare.named_parameters()))
    assert logical_state(compiled, optimizer, dict(compiled.named_parameters())).keys() == expected.keys()


def test_only_the_wrapper_of_a_name_is_taken_out() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    assert logical_name(Outer(), "module.weight") == "module.weight"
    assert model_state(Outer()).keys() == {"model.module.weight", "model.module.bias"}


def test_writing_the_state_writes_what_trains() -> None:
    trainer = Trainer(0)
    for boxes in trainer.state().values():
        for _, tensor in boxes.boxes:
            tensor.fill_(2)
    assert all((parameter == 2).all() for parameter in trainer.module.parameters())
    assert all((average == 2).all() for average in trainer.average.averages.values())
    trainer.train(range(1))
    moments = trainer.optimizer.state[trainer.module.head.bias]  # type: ignore[index,union-attr]
    assert moments["step"] == 3


def test_moments_created_early_change_nothing_of_what_is_learnt() -> None:
    early, late = Trainer(0), Trainer(0)
    early.state()
    assert early.train(range(4)) == late.train(range(4))
    expected, found = whole(late.state()), whole(early.state())
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in expected)


def test_a_weight_that_never_gets_a_gradient_has_moments_of_zero() -> None:
    unused = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(unused.parameters())
    before = whole(logical_state(unused, optimizer, None))
    optimizer.step()
    after = whole(logical_state(unused, optimizer, None))
    assert before.keys() == after.keys()
    assert not any(after[name].any() for name in after if name.startswith("optim."))
