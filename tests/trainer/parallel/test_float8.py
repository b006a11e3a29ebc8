"""Products in float8: how far they may be from exact ones, that they learn, and where they are refused."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from models.config import EncoderConfig, Grid
from models.layers import build_linear
from models.pretraining import PretrainingModel, build_model
from tests.models.samples import CROCO, PATCH_PX, random_batch
from trainer.config.training import OptimConfig, ParallelConfig
from trainer.errors import ConfigError
from trainer.parallel.engine import build_engine
from trainer.parallel.float8 import use_float8
from trainer.parallel.launch import Launch, Mesh

ALONE = Launch(0, 0, 1, 1, "single", "bf16", Mesh(1, 1), True)
FLOAT8 = ParallelConfig(fp8_linears=True)
ENCODER, GRID = EncoderConfig(size="nano", patch_px=PATCH_PX, positions="sincos"), Grid(t=1, v=1, h=4, w=4)


def build_croco() -> PretrainingModel:
    torch.manual_seed(0)
    return build_model(ENCODER, [CROCO], GRID)


def is_float8(module: nn.Module) -> bool:
    return type(module).__name__ == "Float8Linear"


def test_linear_layers_of_blocks_and_no_others_change_their_class_and_no_weight_its_name_or_value() -> None:
    model, plain = build_croco(), build_croco()
    use_float8(model, ALONE)
    converted = {name for name, module in model.named_modules() if is_float8(module)}
    assert converted == {name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and "blocks." in name}
    assert any(isinstance(module, nn.Linear) and not is_float8(module) for module in model.modules())
    for (name, weight), (same_name, same) in zip(model.state_dict().items(), plain.state_dict().items(), strict=True):
        assert name == same_name and torch.equal(weight, same) and weight.dtype == torch.float32


def test_nothing_changes_unless_it_is_asked_for() -> None:
    model = build_croco()
    build_engine(model, ALONE, ParallelConfig(), OptimConfig())
    assert not any(map(is_float8, model.modules()))


def test_a_product_is_as_near_to_the_exact_one_as_two_roundings_to_three_bits_allow() -> None:
    torch.manual_seed(0)
    block = build_croco().encoder.blocks[0]
    x = torch.randn(21, block.mlp.fc1.in_features)  # filled up to 32 tokens in the backward
    exact = block.mlp.fc1(x).detach()
    sizes = x.abs() @ block.mlp.fc1.weight.abs().T
    use_float8(nn.ModuleList([block]), ALONE)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = block.mlp.fc1(x).float()
    half_a_step = 2.0**-4  # e4m3 has three bits behind the point
    allowed = ((1 + half_a_step) ** 2 - 1 + 2.0**-7) * sizes  # and bf16 has seven
    assert ((rounded - exact).abs() <= allowed).all()
    assert (rounded - exact).abs().max() > 2.0**-8 * exact.abs().max(), "nothing was rounded to 8 bits"


def test_it_learns_as_bf16_does() -> None:
    losses = {}
    for name, parallel in {"bf16": ParallelConfig(), "float8": FLOAT8}.items():
        engine = build_engine(build_croco(), ALONE, parallel, OptimConfig(lr=1e-3))
        batch = random_batch(ENCODER, GRID, seed=0)
        losses[name] = []
        for _ in range(12):
            total = engine.train_micro_step(batch, share=1.0, last=True).total.detach()
            engine.update(1e-3, loss=total)
            losses[name].append(float(total))
    assert losses["bf16"][-1] < 0.9 * losses["bf16"][0]
    assert losses["float8"] == pytest.approx(losses["bf16"], rel=0.05)
    assert losses["float8"] != losses["bf16"]


def test_widths_that_are_no_multiple_of_16_stay_as_they_are() -> None:
    model = build_croco()
    model.encoder.blocks[0].mlp.fc2 = build_linear(24, 40)
    use_float8(model, ALONE)
    assert not is_float8(model.encoder.blocks[0].mlp.fc2) and is_float8(model.encoder.blocks[0].mlp.fc1)


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (replace(ALONE, precision="fp32"), r"set parallel\.precision to bf16"),
        (replace(ALONE, zero={"stage": 1}), "take FSDP2 or DDP"),
    ],
    ids=["fp32", "ZeRO"],
)
def test_what_has_no_float8_products_is_refused(launch: Launch, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        use_float8(build_croco(), launch)


def test_a_gpu_without_float8_products_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError, match=r"NVIDIA A100 does not multiply float8 \(from compute capability 8\.9 on"):
        use_float8(build_croco(), ALONE)


def test_torchao_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r"pip install 'odonata\[fp8\]'"):
        use_float8(build_croco(), ALONE)
