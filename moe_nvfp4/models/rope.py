"""The frequencies of rotary embeddings, from the spellings that configs use."""

import torch

from moe_nvfp4.errors import CheckpointError
from moe_nvfp4.layouts.fields import Fields


def rope_settings(fields: Fields, kind: str = "default") -> tuple[float, float]:
    """(theta, the share of a head that is rotated). transformers 5 writes rope_parameters; 4.x files have
    rope_theta and rope_scaling."""
    settings = fields.section("rope_parameters") or fields
    scaling = fields.section("rope_scaling") or settings
    return _settings(settings, scaling, kind)


def rope_settings_of_kind(fields: Fields, layer_kind: str, kind: str, theta: float) -> tuple[float, float]:
    """The same where each kind of layer has its own entry in rope_parameters."""
    section = fields.section("rope_parameters")
    settings = section.section(layer_kind) if section else None
    return _settings(settings, settings, kind) if settings else (theta, 1.0)


def _settings(settings: Fields, scaling: Fields, kind: str) -> tuple[float, float]:
    if (given := scaling.text("rope_type", "type", default=kind)) != kind:
        raise CheckpointError(
            f"config.json: rope type {given!r:.40}: not supported; expected {kind!r}. "
            "Without the entry the model runs within its trained context."
        )
    share = settings.number("partial_rotary_factor", 1.0)
    if share > 1:
        raise settings.error("partial_rotary_factor", "a number from 0 to 1")
    return settings.number("rope_theta", 10_000.0), share


def frequencies(theta: float, rotated: int) -> torch.Tensor:
    """float32 [rotated / 2]"""
    return theta ** -(torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)


def proportional_frequencies(theta: float, head_dim: int, share: float) -> torch.Tensor:
    """float32 [head_dim / 2]: exponents over the whole head, and zeros, which rotate nothing, after the share."""
    rotated = int(share * head_dim // 2)
    exponents = torch.arange(0, 2 * rotated, 2, dtype=torch.float32) / head_dim
    return torch.cat((theta**-exponents, torch.zeros(head_dim // 2 - rotated)))
