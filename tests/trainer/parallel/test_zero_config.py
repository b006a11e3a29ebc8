"""What may stand in DeepSpeed's config, and the sentences for what may not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.parallel.zero_config import read_zero_config

SHIPPED = sorted((Path(__file__).parents[3] / "launch" / "deepspeed").glob("*.json"))


def read(folder: Path, **config: Any) -> dict[str, Any]:
    """What becomes of ZeRO-2 with `config` beside it in a file."""
    file = folder / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | config))
    return read_zero_config({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_configs_pass_through_as_they_are(file: Path) -> None:
    assert read_zero_config({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}) == json.loads(file.read_text())


def test_auto_leaves_the_choice_open(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        train_batch_size="auto",
        fp16={"enabled": "auto", "loss_scale": "auto"},
        bf16={"enabled": False},
        optimizer={"params": {"lr": "auto"}},
        zero_optimization={"stage": 2, "reduce_bucket_size": "auto"},
    )
    assert config == {"zero_optimization": {"stage": 2}, "bf16": {"enabled": False}}


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("optimizer", {"type": "AdamW", "params": {"lr": 1e-3}}, "optim"),
        ("scheduler", {"type": "WarmupLR"}, "optim"),
        ("gradient_clipping", 1.0, "optim.clip_grad_norm"),
        ("train_batch_size", 32, "global_batch"),
        ("train_micro_batch_size_per_gpu", 4, "parallel.micro_batch"),
        ("gradient_accumulation_steps", 2, "parallel.micro_batch"),
        ("fp16", {"enabled": True}, "parallel.precision"),
        ("bf16", {"enabled": True}, "parallel.precision"),
        ("activation_checkpointing", {"partition_activations": True}, "parallel.activation_checkpointing"),
    ],
)
def test_what_the_run_config_decides_is_refused(key: str, value: object, place: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"zero.json sets {key}, which the run config decides as {place};"):
        read(tmp_path, **{key: value})


@pytest.mark.parametrize("zero", [{"stage": 0}, {"stage": 4}, {"stage": "2"}, {}])
def test_a_stage_that_is_none_is_refused(zero: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this trainer runs stages 1, 2 and 3"):
        read(tmp_path, zero_optimization=zero)


def test_options_that_move_weights_elsewhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization\.offload_param, .* drop it"):
        read(tmp_path, zero_optimization={"stage": 3, "offload_param": {"device": "cpu"}})
    with pytest.raises(ConfigError, match="offloads the optimiser to nvme"):
        read(tmp_path, zero_optimization={"stage": 3, "offload_optimizer": {"device": "nvme"}})


def test_accelerates_own_fields_do_without_a_file() -> None:
    environ = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    assert read_zero_config(environ) == {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(ConfigError, match="accelerate's deepspeed_config sets gradient_clipping"):
        read_zero_config(environ | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"})


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_a_file_that_is_no_config_is_refused(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    if content:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"broken\.json as deepspeed_config_file, which is no readable JSON object"):
        read_zero_config({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})


def test_other_engines_do_without_deepspeed() -> None:
    check = "import sys, trainer.start; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[3]).returncode == 0
