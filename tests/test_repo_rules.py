"""The rules of the tree, executable: imports, links, packaging, sizes, and what code may not contain."""

import ast
import io
import os
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "routing", "launch")
PACKAGE = "moe_nvfp4"

# Which of our folders a folder may import from.
ALLOWED = {
    "kernels": {"kernels"},
    "routing": {"kernels", "routing"},
    PACKAGE: {"kernels", "routing", PACKAGE},
    "launch": {"kernels", "routing", PACKAGE, "launch"},
}
FILE_LINES = {"kernels": 450, "tests": 600}  # the aim is 300, kernels 400
FILE_LINES_ELSEWHERE = 350
FUNCTION_LINES = 100  # the aim is 60
KERNEL_HELPERS = {"compiling.py", "fragment_mma.py"}  # files of kernels/ that need no test of their own name
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


def source_files(folder: str) -> list[Path]:
    """Python files of a folder, not through links."""
    found = []
    for here, _, names in os.walk(ROOT / folder, followlinks=False):
        found += [Path(here) / name for name in names if name.endswith(".py")]
    return sorted(found)


def code_files() -> Iterator[tuple[str, Path]]:
    for folder in ALLOWED:
        for path in source_files(folder):
            yield folder, path


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def check(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def imports(path: Path) -> Iterator[tuple[ast.stmt, int, str]]:
    """(statement, relative level, absolute dotted name) of every import; names of `from` are appended."""
    relative = path.relative_to(ROOT).with_suffix("").parts
    module = relative if relative[0] == PACKAGE else (PACKAGE, *relative)
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = list(module[: len(module) - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield node, node.level, ".".join([*base, alias.name])


def folder_of(name: str) -> str | None:
    """The folder of ours that a dotted import name leads to; None for other packages."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LINKED else PACKAGE


def test_imports_point_one_way() -> None:
    problems = []
    for folder, path in code_files():
        for node, _, name in imports(path):
            target = folder_of(name)
            if target is not None and target not in ALLOWED[folder]:
                problems.append(f"{where(path, node)}: {folder}/ may not import {name}")
    check(problems)


def test_only_launch_imports_ray() -> None:
    check(
        [
            f"{where(path, node)}: only launch/ may import ray"
            for folder, path in code_files()
            for node, _, name in imports(path)
            if folder != "launch" and name.split(".")[0] == "ray"
        ]
    )


def test_one_import_name() -> None:
    problems = []
    for path in [path for _, path in code_files()] + source_files("tests"):
        for node, level, name in imports(path):
            if level >= 2:
                problems.append(f"{where(path, node)}: write moe_nvfp4.x instead of a relative import of a parent")
            elif level == 0 and name.split(".")[0] in LINKED:
                problems.append(f"{where(path, node)}: write {PACKAGE}.{name}; two names are two modules")
    check(problems)


@pytest.mark.parametrize("folder", LINKED)
def test_links(folder: str) -> None:
    link = ROOT / PACKAGE / folder
    assert link.is_symlink(), f"{link} is no link: checkout lost its symlinks; clone with git"
    assert os.readlink(link) == f"../{folder}"
    assert not (ROOT / folder / "__init__.py").exists(), (
        f"{folder}/__init__.py makes a top-level package, which can shadow another project's `{folder}`"
    )


def test_every_package_is_listed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packages = {f"{PACKAGE}.{folder}" for folder in LINKED}
    for path in source_files(PACKAGE):
        packages.add(".".join(path.relative_to(ROOT).parent.parts))
    for folder in LINKED:
        nested = [path for path in source_files(folder) if path.parent != ROOT / folder]
        assert not nested, f"{folder}/ is flat; found {nested}"
        assert setuptools["package-dir"][f"{PACKAGE}.{folder}"] == folder
    assert set(setuptools["packages"]) == packages


def test_sizes() -> None:
    problems = []
    for folder in (*ALLOWED, "tests"):
        limit = FILE_LINES.get(folder, FILE_LINES_ELSEWHERE)
        for path in source_files(folder):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > limit:
                problems.append(f"{path.relative_to(ROOT)}: {lines} lines, the limit is {limit}")
            for node in ast.walk(parse(path)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    length = (node.end_lineno or node.lineno) - node.lineno + 1
                    if length > FUNCTION_LINES:
                        problems.append(
                            f"{where(path, node)}: {node.name}: {length} lines, the limit is {FUNCTION_LINES}"
                        )
    check(problems)


def test_comments_hold_no_open_tasks() -> None:
    problems = []
    for folder in (*ALLOWED, "tests"):
        for path in source_files(folder):
            readline = io.StringIO(path.read_text(encoding="utf-8")).readline
            for token in tokenize.generate_tokens(readline):
                if token.type == tokenize.COMMENT and any(w in token.string for w in ("TODO", "FIXME", "XXX")):
                    problems.append(f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string}")
    check(problems)


def test_checkpoints_cannot_run_code() -> None:
    """No pickle in any form, and no remote code: `trust_remote_code=False` is the one spelling allowed."""
    problems = []
    for _, path in code_files():
        for node, _, name in imports(path):
            if name.split(".")[0] in FORBIDDEN_MODULES or name == "torch.load":
                problems.append(f"{where(path, node)}: import of {name}")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node.value) == "torch":
                problems.append(f"{where(path, node)}: torch.load unpickles; use safetensors")
            elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    problems.append(f"{where(path, node.value)}: trust_remote_code must be False")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
                problems.append(f"{where(path, node)}: {node.func.id}()")
    check(problems)


def test_every_kernel_has_a_test() -> None:
    check(
        [
            f"kernels/{path.name} has no tests/kernels/test_{path.name}"
            for path in source_files("kernels")
            if path.name not in KERNEL_HELPERS and not (ROOT / "tests/kernels" / f"test_{path.name}").exists()
        ]
    )


def gpu_marked(node: ast.AST) -> bool:
    return any(text in ast.unparse(node) for text in ("mark.gpu", "mark.multi_gpu"))


def uses_cuda(function: ast.FunctionDef) -> ast.AST | None:
    """A call in the body that needs a GPU: x.cuda(), x.to("cuda"), torch.f(..., device="cuda")."""
    for node in (inner for statement in function.body for inner in ast.walk(statement)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        values = [keyword.value for keyword in node.keywords if keyword.arg == "device"]
        if node.func.attr == "to":
            values += node.args
        elif node.func.attr == "cuda":
            return node
        elif ast.unparse(node.func).split(".")[0] != "torch":
            continue
        if any(isinstance(v, ast.Constant) and str(v.value).startswith("cuda") for v in values):
            return node
    return None


def test_gpu_tests_are_marked() -> None:
    problems = []
    for path in source_files("tests"):
        tree = parse(path)
        for scope in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]:
            marks = [s for s in scope.body if isinstance(s, ast.Assign) and "pytestmark" in ast.unparse(s.targets[0])]
            marks += getattr(scope, "decorator_list", [])
            if any(gpu_marked(mark) for mark in marks):
                continue
            for test in scope.body:
                if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
                    call = uses_cuda(test)
                    if call is not None and not any(gpu_marked(mark) for mark in test.decorator_list):
                        problems.append(f"{where(path, call)}: {test.name} needs pytest.mark.gpu or multi_gpu(n)")
    check(problems)
