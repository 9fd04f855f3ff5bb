"""Each test of a kernel runs in torch and in every compiled variant that this processor has."""

from __future__ import annotations

import pytest
import torch

from flexgen.kernels.loading import native

NOT_BUILT = "flexgen.kernels._native is not built: pip install -e . with a C++17 compiler"

if native is None:
    COMPILED = [pytest.param("compiled", marks=pytest.mark.skip(reason=NOT_BUILT))]
else:
    COMPILED = [pytest.param(name) for name in native.variants()]


@pytest.fixture(params=COMPILED)
def variant(request):
    """The name of a compiled variant, which is in use."""
    before = native.variant()
    native.set_variant(request.param)
    yield request.param
    native.set_variant(before)


@pytest.fixture(params=["torch", *COMPILED])
def version(request):
    """ "torch", or the name of a compiled variant, which is in use."""
    if request.param == "torch":
        yield request.param
    else:
        before = native.variant()
        native.set_variant(request.param)
        yield request.param
        native.set_variant(before)


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
