"""Seeds, poisoned memory, skips for tests that need GPUs, and how `pytest -n` spreads the tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may use the network
# Tiny models are slower with more threads, and processes that wait for each other's threads many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy
import pytest
import torch

# The same examples on every run; `--hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("fixed")

# A shell makes what it starts in the background ignore interrupts, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

KERNEL_TESTS = Path(__file__).parent / "kernels"
FLOAT_POISON = 0xFF  # every byte 0xFF is NaN in fp64, fp32, fp16, bf16, e4m3fn, e5m2 and e8m0
INT_POISON = 0x7F  # 127, 32639, 2139062143, ...: large, positive and easy to recognise


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill the storage, gaps between strided rows included, with NaN or a recognisable integer."""
    if tensor.device.type == "meta" or type(tensor) is not torch.Tensor:
        return tensor
    if tensor.dtype == torch.bool:
        byte = 1
    elif tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        byte = FLOAT_POISON
    else:
        byte = INT_POISON
    tensor.untyped_storage().fill_(byte)
    return tensor


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor if kwargs.get("out") is not None else poison(tensor)

    return wrapper


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.empty and its kin return NaN: a row nobody wrote then shows up in the result."""
    for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


@pytest.fixture(autouse=True)
def _poison_kernel_tests(request: pytest.FixtureRequest) -> None:
    if KERNEL_TESTS in request.path.parents:
        request.getfixturevalue("poisoned_memory")


def _gpus_needed(item: pytest.Item) -> int:
    needed = 1 if item.get_closest_marker("gpu") else 0
    marker = item.get_closest_marker("multi_gpu")
    if marker is None:
        return needed
    if len(marker.args) != 1 or not isinstance(marker.args[0], int):
        raise pytest.UsageError(f"{item.nodeid}: write multi_gpu(n) with the number of GPUs")
    return max(needed, marker.args[0])


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = _gpus_needed(item)
    if needed == 0:
        return
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if present < needed:
        pytest.skip(f"needs {needed} CUDA GPU{'s' * (needed > 1)}, this machine has {present}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist; alone, pytest keeps the order of the files
        from spreading import place_of

        items.sort(key=lambda item: place_of(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    if config.getoption("dist") != "loadfile":
        return None
    from spreading import Spreading

    return Spreading(config, log)
