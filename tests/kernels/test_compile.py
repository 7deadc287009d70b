"""Every kernel compiles for every architecture, without a GPU, and without spilling registers.

`pytest tests/kernels/test_compile.py -s` prints registers, spills and shared memory of all of them.
"""

import importlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest

from moe_nvfp4.kernels.compiling import (
    ARCHITECTURES,
    SHARED_LIMIT,
    CompileCase,
    Resources,
    compile_case,
    resources,
    with_ones,
)

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def compiled_here() -> list[str]:
    """Kernel files with a Triton or Gluon kernel, whether or not they say how it is compiled."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(KERNELS.glob("*.py"))}
    return [name for name, text in sources.items() if "def compile_cases(" in text]


def cases(module: str) -> list[CompileCase]:
    found: list[CompileCase] = importlib.import_module(f"moe_nvfp4.kernels.{module}").compile_cases()
    return found


def but_for_pdl(case: CompileCase) -> str:
    """What a case has in common with the one that differs from it in programmatic dependent launch alone."""
    constexprs = {name: value for name, value in case.constexprs.items() if name != "PDL"}
    options = {name: value for name, value in case.options.items() if name != "launch_pdl"}
    return repr((function_name(case), *map(sorted, (case.signature.items(), constexprs.items(), options.items()))))


def plan(found: list[CompileCase]) -> Iterator[tuple[int, int, bool]]:
    """(case, architecture, integers are 1): a kernel's first cases for every architecture. Its others for sm_90 or, if
    they are not for it, for one in turn; but not those without PDL, which is two instructions, where sm_90 has it.
    That is a third of the pairs. MOE_NVFP4_COMPILE=all takes every one."""
    every = os.environ.get("MOE_NVFP4_COMPILE") == "all"
    with_pdl = {but_for_pdl(case) for case in found if case.options.get("launch_pdl")}
    seen: dict[str, set[int]] = {}
    for index, case in enumerate(found):
        known = seen.setdefault(function_name(case), set())
        main = 90 if 90 in case.architectures else case.architectures[index % len(case.architectures)]
        if not known:
            yield index, main, True
        chosen = set(case.architectures) - (set() if every else known)
        if not chosen and (case.options.get("launch_pdl") or but_for_pdl(case) not in with_pdl):
            chosen = {main}
        known |= chosen
        for architecture in sorted(chosen):
            yield index, architecture, False


def prepare() -> None:
    os.nice(5)  # tests that run beside have limits on time
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"


def worker(module: str, index: int, architecture: int, ones: bool, scratch: Path) -> Resources:
    case = cases(module)[index]
    return resources(compile_case(with_ones(case) if ones else case, architecture), scratch)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    # Not forked: pytest's process has threads of torch.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn, initializer=prepare) as executor:
        yield executor


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("module", compiled_here())
def test_compiles(module: str, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    found = cases(module)
    jobs: dict[tuple[int, int, bool], Future[Resources]] = {
        job: pool.submit(worker, module, *job, tmp_path) for job in plan(found)
    }
    problems = []
    rows: dict[tuple[str, str], dict[int, Resources]] = {}
    for (index, architecture, ones), job in jobs.items():
        case, place = found[index], f"{found[index].name}, sm_{architecture}{', integers of 1' * ones}"
        try:
            used = job.result()
        except Exception as error:
            problems.append(f"{place}: {type(error).__name__}: {error}")
            continue
        if ones:
            continue
        rows.setdefault((case.name, function_name(case)), {})[architecture] = used
        if used.stack > case.allowed_spill:
            problems.append(f"{place}: spills {used.stack} bytes, {case.allowed_spill} are allowed")
        if used.shared > SHARED_LIMIT[architecture]:
            problems.append(f"{place}: {used.shared} bytes of shared memory, there are {SHARED_LIMIT[architecture]}")
    print(table(module, rows))
    assert not problems, "\n" + "\n".join(problems)


def function_name(case: CompileCase) -> str:
    return str(case.function.__name__)


def table(module: str, rows: dict[tuple[str, str], dict[int, Resources]]) -> str:
    heads = "".join(f"{f'sm_{a}':>16}" for a in ARCHITECTURES)
    lines = [f"\n{module}: registers / spilled bytes / KB of shared memory", f"{'':48}{heads}"]
    for (name, function), by_architecture in rows.items():
        label = name if name.startswith(function) else f"{function} {name}"
        cells = [by_architecture.get(a) for a in ARCHITECTURES]
        texts = [f"{c.registers} / {c.stack} / {c.shared / 1024:.0f}" if c else "-" for c in cells]
        lines.append(f"{label[:47]:48}" + "".join(f"{text:>16}" for text in texts))
    return "\n".join(lines)


def test_every_kernel_is_compiled() -> None:
    """Each jit function that is launched belongs to a case; those that others call are compiled with them."""
    missing = []
    for path in sorted(KERNELS.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "[(" not in text and "[grid" not in text:
            continue
        module = importlib.import_module(f"moe_nvfp4.kernels.{path.stem}")
        launched = {
            name for name, value in vars(module).items() if hasattr(value, "arg_names") and f"    {name}[" in text
        }
        covered = {function_name(case) for name in compiled_here() for case in cases(name)}
        missing += [f"kernels/{path.name}: {name}" for name in sorted(launched - covered)]
    assert not missing, "no compile case: " + ", ".join(missing)
