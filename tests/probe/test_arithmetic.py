"""What the rates of a machine are measured with."""

import weakref
from contextlib import closing

import pytest
import torch

from flexgen.kernels.packed_linear import PackedMatrix
from flexgen.memory.machine import Machine
from flexgen.probe import arithmetic
from flexgen.probe.arithmetic import ArithmeticProbe
from flexgen.probe.effort import Effort
from flexgen.quant import CODECS


class Watch:
    """A stopwatch that runs the work once and takes it to last a second."""

    def seconds(self, work, settle=None):
        work()
        return 1.0


@pytest.mark.parametrize("codec", CODECS.values(), ids=list(CODECS))
def test_encoded_matrices_keep_no_decoded_copy(codec, monkeypatch):
    """The ring holds a working set of encoded matrices; their decoded copies would be several times as large."""
    decoded, alive = [], []

    class Tracked(PackedMatrix):
        def __init__(self, packed, dtype, decode):
            def tracked():
                alive.append(sum(copy() is not None for copy in decoded))
                out = decode()
                assert out.dtype == dtype and tuple(out.shape) == tuple(packed.shape)
                decoded.append(weakref.ref(out))
                return out

            super().__init__(packed, dtype, tracked)

    monkeypatch.setattr(arithmetic, "PackedMatrix", Tracked)
    monkeypatch.setattr(arithmetic, "fused_rows", lambda *_: 64)  # is asked to measure 64 rows,
    monkeypatch.setattr(
        "flexgen.kernels.linear.fused_rows", lambda *_: 1
    )  # for which every product decodes its matrix
    with closing(Machine.open("cpu", None)) as machine:
        effort = Effort(hidden=256, heads=4, rows=(1, 64), working_set=1)
        points = ArithmeticProbe(machine.device, torch.float32, effort, Watch()).encoded_products(codec)
    assert [rows for rows, _ in points] == [1.0, 64.0]
    assert len(alive) > 2 and not any(alive)
