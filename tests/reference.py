"""transformers on the dequantised weights of a checkpoint: what a model must agree with.

The dequantisation is stated here once more, element by element from the format's definition, and shares no code
with the package.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

TOWERS_AND_MTP = ("mtp.", "model.visual.", "model.vision_tower.", "model.embed_vision.")
SCALES = {"weight_scale", "weight_scale_2", "weight_global_scale", "input_scale", "input_global_scale"}
SCALES |= {"k_scale", "v_scale"}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def dequantised(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Module weights in float32 under their plain names; scales are left out."""
    plain = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            scale = tensors[f"{module}.weight_scale"].double() / tensors[f"{module}.weight_global_scale"].double()
            plain[f"{module}.weight"] = _nvfp4(tensor, scale)
        elif leaf == "weight" and f"{module}.weight_scale_2" in tensors:
            scale = tensors[f"{module}.weight_scale"].double() * tensors[f"{module}.weight_scale_2"].double()
            plain[name] = _nvfp4(tensor, scale)
        elif leaf == "weight" and tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[f"{module}.weight_scale"].double()
            plain[name] = (tensor.double() * (scale if scale.numel() == 1 else scale.reshape(-1, 1))).float()
        elif leaf not in SCALES:
            plain[name] = tensor.float()
    return plain


def _nvfp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    return (E2M1[codes] * scale.repeat_interleave(16, dim=1)).float()


def reference_model(folder: Path) -> PreTrainedModel:
    """The float32 text model; every one of its parameters is taken from the checkpoint."""
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = config.get_text_config()
    text.tie_word_embeddings = config.tie_word_embeddings
    text._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(text, dtype=torch.float32).eval()
    tensors = {name: tensor for name, tensor in read_tensors(folder).items() if not name.startswith(TOWERS_AND_MTP)}
    plain = {name.replace("model.language_model.", "model."): w for name, w in dequantised(tensors).items()}
    weights = fuse_experts(plain)
    if text.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    buffers = {name for name, _ in model.named_buffers()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= buffers, set(missing) - buffers
    return model


def fuse_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5 holds experts as [E, 2I, H] with gate before up, and [E, H, I]."""
    fused = {name: weight for name, weight in weights.items() if ".experts." not in name}
    blocks = sorted({name.split(".experts.")[0] + ".experts" for name in weights if ".experts." in name})
    for block in blocks:
        count = len({name.split(".experts.")[1].split(".")[0] for name in weights if name.startswith(block + ".")})
        gate, up, down = (
            [weights[f"{block}.{e}.{projection}_proj.weight"] for e in range(count)]
            for projection in ("gate", "up", "down")
        )
        fused[f"{block}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        fused[f"{block}.down_proj"] = torch.stack(down)
    return fused


@torch.no_grad()
def reference_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([token_ids])).logits[0].float()
