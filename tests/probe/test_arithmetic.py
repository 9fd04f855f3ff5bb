"""The work with which the speed of a machine is measured."""

import weakref
from contextlib import closing
from functools import partial

import pytest
import torch

from flexgen.kernels.quantized import EVERY_ROW
from flexgen.memory.machine import Machine
from flexgen.probe.arithmetic import ArithmeticProbe
from flexgen.probe.effort import Effort
from flexgen.quant import CODECS


class Watch:
    """A stopwatch that runs the work once and takes it to last a second."""

    def seconds(self, work, settle=None):
        work()
        return 1.0


DECODING = {
    name: codec
    for name, codec in CODECS.items()
    if codec.expected_fused_rows(on_host=True, dtype=torch.float32) < EVERY_ROW
}
"""The codecs whose products of many rows decode the matrix."""


@pytest.mark.parametrize("codec", DECODING.values(), ids=list(DECODING))
def test_encoded_matrices_keep_no_decoded_copy(codec, monkeypatch):
    """The ring holds a working set of encoded matrices; their decoded copies would be several times as large."""
    matrix, decoded, alive = type(codec).matrix, [], []

    def tracked_matrix(self, encoded, shape, dtype, decode):
        def tracked():
            alive.append(sum(copy() is not None for copy in decoded))
            out = decode()
            assert out.dtype == dtype and tuple(out.shape) == tuple(shape)
            decoded.append(weakref.ref(out))
            return out

        return matrix(self, encoded, shape, dtype, tracked)

    monkeypatch.setattr(type(codec), "matrix", tracked_matrix)
    with closing(Machine.open("cpu", None)) as machine:
        effort = Effort(hidden=256, heads=4, working_set=1)
        probe = ArithmeticProbe(machine.device, torch.float32, effort, Watch())
        # With this number of rows, every product decodes its matrix.
        points = probe._rates(partial(probe._encoded, codec), [4096])
    assert [rows for rows, _ in points] == [4096.0]
    assert len(alive) > 2 and not any(alive)
