"""Ahead-of-time compilation: every kernel for every architecture, without a GPU.

A kernel file exports `compile_cases() -> list[CompileCase]`; tests/kernels/test_compile.py compiles them all.
"""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

ARCHITECTURES: Final = (80, 86, 89, 90, 100, 120)
# Bytes of shared memory that one program may have, from the CUDA programming guide's table of compute capabilities.
SHARED_LIMIT: Final = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


@dataclass(frozen=True, kw_only=True)
class CompileCase:
    """One way in which a launcher calls a kernel. Pointers are taken to be aligned to 16 bytes."""

    name: str
    function: Any  # triton.jit or gluon.jit
    signature: Mapping[str, str]  # of what is no constexpr: {"x_ptr": "*bf16", "rows": "i32", "scale": "fp32"}
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()  # integers that are multiples of 16
    options: Mapping[str, Any] = field(default_factory=dict)  # num_warps, num_stages, launch_pdl, maxnreg
    architectures: tuple[int, ...] = ARCHITECTURES
    allowed_spill: int = 0  # bytes of stack a thread


class Resources(NamedTuple):
    registers: int
    stack: int  # bytes a thread: spills, since our kernels have no arrays of their own
    shared: int  # bytes a program


def compile_case(case: CompileCase, architecture: int) -> Any:
    """triton's compiled kernel; `.asm` holds ptx and cubin."""
    function = case.function
    names = function.arg_names
    unknown = {*case.signature, *case.constexprs} ^ set(names)
    if unknown:
        raise ValueError(f"{case.name}: the case and the kernel disagree about {sorted(unknown)}")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in case.divisible]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = (GluonASTSource if function.is_gluon() else ASTSource)(function, signature, dict(case.constexprs), attrs)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(case.options))


def with_ones(case: CompileCase) -> CompileCase:
    """The case when every integer argument is 1, which triton makes a constant, so that `.to` and the like fail."""
    ones = [
        param.name
        for param in case.function.params
        if case.signature.get(param.name) in ("i32", "i64") and not param.do_not_specialize
    ]
    signature = {name: kind for name, kind in case.signature.items() if name not in ones}
    constexprs = {**case.constexprs, **dict.fromkeys(ones, 1)}
    return replace(case, name=f"{case.name}, ones", signature=signature, constexprs=constexprs, divisible=())


def resources(compiled: Any, scratch: Path) -> Resources:
    """Read from the machine code with the cuobjdump that triton brings; `scratch` is a folder."""
    cubin = scratch / f"{compiled.hash}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared)
