"""The same layer in other engines, where they are installed. Imported here only, and only when asked for."""

import importlib
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moe_nvfp4.launch.bench_data import Routing, Shape
from moe_nvfp4.launch.bench_timing import Timing, graph_time


class VllmMarlin:
    """vLLM 0.26's fused Marlin MoE as its MarlinExperts call it (align, product, activation, product, sum)."""

    def __init__(self, shape: Shape, sets: int):
        if not shape.gated:
            raise ImportError("timed for gated experts only")
        layers = "vllm.model_executor.layers"
        self._config = importlib.import_module("vllm.config")
        self._ops = importlib.import_module("vllm._custom_ops")
        importlib.import_module("vllm.platforms").current_platform.import_kernels()
        self._fp4 = importlib.import_module(f"{layers}.quantization.utils.marlin_utils_fp4")
        self._fused = importlib.import_module(f"{layers}.fused_moe.experts.marlin_moe").fused_marlin_moe
        self._type = importlib.import_module("vllm.scalar_type").scalar_types.float4_e2m1f.id
        kinds = importlib.import_module(f"{layers}.fused_moe.activation").MoEActivation
        self._activation = {"silu": kinds.SILU, "gelu_tanh": kinds.GELU_TANH}[shape.activation]
        self._shape = shape
        with self._config.set_current_vllm_config(self._config.VllmConfig()):
            self._weights = [self._prepare() for _ in range(sets)]

    def time(self, x_TH: Tensor, routings: Sequence[Routing]) -> Timing:
        pairs, out = x_TH.shape[0] * self._shape.top, torch.empty_like(x_TH)
        first = x_TH.new_empty(pairs * max(2 * self._shape.inner, self._shape.hidden))
        second = x_TH.new_empty(pairs * max(self._shape.inner, self._shape.hidden))

        def call(index: int) -> Tensor:
            w = self._weights[index % len(self._weights)]
            result: Tensor = self._fused(
                hidden_states=x_TH, w1=w[0], w2=w[3], bias1=None, bias2=None, w1_scale=w[1], w2_scale=w[4],
                topk_weights=routings[index].weights_TK, topk_ids=routings[index].expert_ids_TK,
                global_scale1=w[2], global_scale2=w[5], quant_type_id=self._type,
                global_num_experts=self._shape.experts, activation=self._activation, moe_sum=self._sum,
                expert_map=None, output=out, intermediate_cache13=first, intermediate_cache2=second,
                workspace=None, is_k_full=True,
            )  # fmt: skip
            return result

        with self._config.set_current_vllm_config(self._config.VllmConfig()):
            return graph_time([partial(call, index) for index in range(len(routings))])

    def _sum(self, inputs: Tensor, out: Tensor, topk_ids: Any = None, expert_map: Any = None) -> None:
        self._ops.moe_sum(inputs, out)

    def _prepare(self) -> Any:
        shape = self._shape
        (w13, s13, g13), (w2, s2, g2) = (
            (
                torch.randint(256, (shape.experts, n, k // 2), dtype=torch.uint8, device="cuda"),
                (100 + 300 * torch.rand(shape.experts, n, k // 16, device="cuda")).to(torch.float8_e4m3fn),
                torch.full((shape.experts,), k**-0.5 / 700, device="cuda"),
            )
            for n, k in ((2 * shape.inner, shape.hidden), (shape.hidden, shape.inner))
        )
        layer = SimpleNamespace(
            num_experts=shape.experts, hidden_size=shape.hidden, intermediate_size_per_partition=shape.inner,
            params_dtype=torch.bfloat16,
        )  # fmt: skip
        return self._fp4.prepare_nvfp4_moe_layer_for_marlin(
            layer=layer, w13=w13, w13_scale=s13, w13_scale_2=g13, w2=w2, w2_scale=s2, w2_scale_2=g2, is_act_and_mul=True
        )


def peer_layer(name: str | None, shape: Shape, sets: int) -> VllmMarlin | str | None:
    """The peer's layer, or why there is none."""
    if name is None:
        return None
    try:
        return VllmMarlin(shape, sets)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "vllm"
        return f"{name} is not installed" if missing else f"{name}: {error}"
