"""The encoder of a CroCo checkpoint, in, under timm's names; the whole model, decoder included, is `models.official_croco`'s."""

from collections.abc import Mapping

from torch import Tensor

_RENAMES = {"patch_embed.": "patch_embed.", "enc_blocks.": "blocks.", "enc_norm.": "norm.", "enc_pos_embed": "pos_embed"}
_LEFT_OUT = ("decoder_embed.", "dec_blocks.", "dec_norm.", "prediction_head.", "mask_token", "dec_pos_embed")


def to_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's names for those of the encoder; unknown names stay, and are refused as unexpected."""
    return {_rename(name): tensor for name, tensor in weights.items() if not name.startswith(_LEFT_OUT)}


def _rename(name: str) -> str:
    for theirs, timm in _RENAMES.items():
        if name.startswith(theirs):
            return timm + name.removeprefix(theirs)
    return name
