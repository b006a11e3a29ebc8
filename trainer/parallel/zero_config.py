"""DeepSpeed's part of accelerate's config file: which ZeRO stage, and DeepSpeed's own options for it.

Options of ZeRO are DeepSpeed's and pass through; whatever says what is learnt or in what batches belongs to the run config
and is refused here, or left out where it says "auto", as configs shared with other trainers do. accelerate's own
DeepSpeedPlugin cannot be asked: it demands that `transformers` be installed.
"""

from collections.abc import Mapping
from typing import Any

from trainer.errors import ConfigError

_OWNED = {
    "optimizer": "optim",
    "scheduler": "optim",
    "gradient_clipping": "optim.clip_grad_norm",
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "parallel.micro_batch",
    "gradient_accumulation_steps": "parallel.micro_batch",
    "fp16": "parallel.precision",
    "bf16": "parallel.precision",
    "amp": "parallel.precision",
    "torch_autocast": "parallel.precision",
    "data_types": "parallel.precision",
    "activation_checkpointing": "parallel.activation_checkpointing",
    "checkpoint": "checkpoint",
}
"""Keys of DeepSpeed's config that the run config owns, and where it says them."""

_ZERO_KEYS = {
    "stage",
    "overlap_comm",
    "contiguous_gradients",
    "reduce_scatter",
    "reduce_bucket_size",
    "allgather_partitions",
    "allgather_bucket_size",
    "round_robin_gradients",
    "sub_group_size",
    "offload_optimizer",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
}
"""Options of ZeRO that leave its memory laid out as checkpoints expect it."""


def read_zero_config(environ: Mapping[str, str]) -> dict[str, Any]:
    """DeepSpeed's config without what it leaves open: zero_optimization, with its stage 1 to 3, and what goes with it."""
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    origin = file or "accelerate's deepspeed_config"
    config = _without_auto(_read_file(file) if file else _read_fields(environ))
    _refuse_owned(config, origin)
    _check_zero(config.get("zero_optimization", {}), origin)
    return config


def _read_file(file: str) -> dict[str, Any]:
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    try:
        config: Any = HfDeepSpeedConfig(file).config
    except (ValueError, AttributeError, OSError) as error:  # AttributeError: JSON that is no object
        raise ConfigError(
            f"accelerate's config file names {file} as deepspeed_config_file, which is no readable JSON object ({error}); "
            "its path counts from the folder where the command is started"
        ) from error
    return config


def _read_fields(environ: Mapping[str, str]) -> dict[str, Any]:
    """The config that accelerate's own fields stand for, where they name no file."""
    fields = {
        "gradient_accumulation_steps": environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
        "gradient_clipping": environ.get("ACCELERATE_GRADIENT_CLIPPING", "none"),
    }
    zero: dict[str, Any] = {"stage": int(environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    for option in ("offload_optimizer", "offload_param"):
        device = environ.get(f"ACCELERATE_DEEPSPEED_{option.upper()}_DEVICE", "none")
        if device != "none":
            zero[option] = {"device": device}
    return {name: value for name, value in fields.items() if value not in ("1", "none")} | {"zero_optimization": zero}


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """`config` without what says "auto", and without what then says nothing."""
    kept: dict[str, Any] = {}
    for key, value in config.items():
        left = _without_auto(value) if isinstance(value, dict) else value
        if left != "auto" and (left != {} or value == {}):
            kept[key] = left
    return kept


def _refuse_owned(config: Mapping[str, Any], origin: str) -> None:
    for key, place in _OWNED.items():
        asked = config.get(key)
        if asked is not None and asked != {"enabled": False}:
            raise ConfigError(f'{origin} sets {key}, which the run config decides as {place}; drop {key} or write "auto"')


def _check_zero(zero: Mapping[str, Any], origin: str) -> None:
    if zero.get("stage") not in (1, 2, 3):
        raise ConfigError(
            f"{origin} asks for ZeRO stage {zero.get('stage')}; this trainer runs stages 1, 2 and 3: "
            "set zero_optimization.stage, or take launch/accelerate/ddp.yaml to shard nothing"
        )
    unknown = sorted(zero.keys() - _ZERO_KEYS)
    if unknown:
        raise ConfigError(
            f"{origin} sets zero_optimization.{unknown[0]}, with which this trainer cannot say where a weight lies in memory; "
            f"drop it (known: {', '.join(sorted(_ZERO_KEYS))})"
        )
    device = zero.get("offload_optimizer", {}).get("device", "none")
    if device not in ("none", "cpu"):
        raise ConfigError(
            f"{origin} offloads the optimiser to {device}; this trainer offloads to cpu alone: "
            "set zero_optimization.offload_optimizer.device to cpu or none"
        )
