"""Kernels in triton's interpreter, which a process chooses when it imports triton: tests of a file run in one of their
own."""

import inspect
import os
import subprocess
import sys
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_interpreted(file: str) -> None:
    """The tests of a file that have `interpreted` in their names."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "interpreted", file]
    # Plugins of others take 4 s to load, and are not needed here.
    environment = {"TRITON_INTERPRET": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(command, env={**os.environ, **environment}, check=True)


def search_language_once() -> None:
    """The interpreter replaces triton's language whenever a jit function calls another, and each time looks at every
    member of it for those to replace: a third to a half of the time of our tests. Which they are does not change."""
    from triton import language
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}
    is_builtin, replace = language.core.is_builtin, interpreter._patch_attr

    def patch_builtin(owner: Any, *arguments: Any) -> None:
        if owner not in names:
            names[owner] = [name for name, member in inspect.getmembers(owner) if is_builtin(member)]
        for name in names[owner]:
            if is_builtin(member := getattr(owner, name)):  # it has not been replaced yet
                replace(owner, name, member, *arguments)

    interpreter._patch_builtin = patch_builtin


if INTERPRETED:
    search_language_once()
