import pytest
import torch
from hypothesis import settings

# No deadline: how long an example takes says something about the machine, not about the code.
settings.register_profile("flexgen", deadline=None)
settings.load_profile("flexgen")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))
