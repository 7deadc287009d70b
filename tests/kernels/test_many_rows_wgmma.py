"""The sm_90 products of many_rows compile without a GPU; test_many_rows.py runs them on one."""

from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from moe_nvfp4.kernels.many_rows_wgmma import down_wgmma, gate_up_wgmma

TYPES = {"w": "*i32", "s": "*i16", "g": "*fp32", "ptr": "*bf16", "tiles": "i32"}
INTEGERS = ("order_ptr", "table_ptr")


def compiled(kernel: Any, constants: dict[str, Any], warps: int) -> Any:
    names = kernel.arg_names
    types = {n: "*i32" if n in INTEGERS else TYPES[n.split("_")[-1]] for n in names if n not in constants}
    signature = {n: types.get(n, "constexpr") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = GluonASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})


@pytest.mark.parametrize("bn", [32, 128])
@pytest.mark.parametrize("name", ["gate and up", "without a gate", "down"])
def test_compiles(name: str, bn: int) -> None:
    common = {"STRIPS": 116, "TILES": 29, "W": 4, "BN": bn, "PDL": True}
    if name == "down":
        kernel = compiled(down_wgmma, {**common, "COLUMNS": 1856}, 4)
    else:
        gated = name == "gate and up"
        kind = "silu" if gated else "relu2"
        kernel = compiled(gate_up_wgmma, {**common, "TOP": 8, "COLUMNS": 1856, "GATED": gated, "KIND": kind}, 4)
    assert f"wgmma.mma_async.sync.aligned.m64n{bn}k16" in kernel.asm["ptx"]
    assert "mma.sync" not in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 99 * 1024  # two programs on a multiprocessor
