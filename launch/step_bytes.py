"""The bytes that one decode step must move, by kind: a floor, with every weight read once and nothing read twice."""

from moe_nvfp4.dense_weights import dense_bytes
from moe_nvfp4.expert_buffers import expert_bytes
from moe_nvfp4.kernels.delta_state import bytes_per_token
from moe_nvfp4.runner import MoERunner


def step_bytes(runner: MoERunner, batch: int, length: int) -> dict[str, float]:
    """`length` tokens of each sequence; experts under uniform routing, so the expected number of distinct ones."""
    moved = dict.fromkeys(("experts", "attention and mixers", "dense MLP", "router", "head", "cache"), 0.0)
    dense, config = runner.found.dense, runner.config
    has_head = "lm_head.weight" in dense
    for name, source in dense.items():
        nbytes = dense_bytes(source, runner.dtype)
        if name == "embed_tokens.weight":
            moved["head"] += 0 if has_head else nbytes
        elif name == "lm_head.weight":
            moved["head"] += nbytes
        elif "_attn." in name:
            moved["attention and mixers"] += nbytes
        elif "router." in name or name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
            moved["router"] += nbytes
        else:
            moved["dense MLP"] += nbytes
    for block in runner.found.layout.experts:
        shared = block.count - config.num_experts  # among the routed ones
        distinct = config.num_experts * (1 - (1 - config.experts_per_token / config.num_experts) ** batch)
        moved["experts"] += expert_bytes(block) * (distinct + shared)
    spec, settings = config.cache_spec, runner.cache.settings
    for attention in spec.attention:
        kept = min(length, attention.window) if attention.window else length
        tokens = 2 * kept * attention.kv_heads * attention.head_dim * settings.kv_dtype.itemsize
        moved["cache"] += batch * len(attention.layers) * tokens
    if delta := spec.delta:
        moved["cache"] += batch * len(delta.layers) * bytes_per_token(delta.heads, batch)
    return moved
