"""Every test of this folder is marked gpu, and skipped with the reason where no kernel can run."""

import pytest
import torch

from odtk import kernels as compiled


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def gpu() -> str:
    """The name of the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU, or a torch built without CUDA")
    return torch.cuda.get_device_name()


@pytest.fixture
def kernels(gpu: str):
    """odtk._C on a GPU that it can run on."""
    if compiled.extension is None:
        pytest.skip("odtk._C is not built: `pip install .` where nvcc is (see `odtk info`)")
    if reason := compiled.extension.device_error():
        pytest.skip(f"odtk._C cannot run here: {reason}")
    return compiled.extension
