"""Settings of every test: deterministic kernels, fixed seeds, no network, one environment variable for the device."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from hypothesis import settings

settings.register_profile("danlu", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("danlu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _deterministic():
    """Seed torch and switch on deterministic algorithms, which also fill uninitialised memory with NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _recompiles():
    """Count the recompilations of each test alone: many compile the same function, and `fullgraph` counts them all."""
    yield
    torch.compiler.reset()


@pytest.fixture
def device() -> torch.device:
    """The device under test: `DANLU_TEST_DEVICE`, default the CPU."""
    return torch.device(os.environ.get("DANLU_TEST_DEVICE", "cpu"))
