"""Interpolation of the seconds of passes."""

import numpy as np
import pytest

from flexgen.predict.pass_times import Plane


def test_noise_of_passes_that_are_nearly_alike_is_not_extrapolated():
    for at in ([(0, 0), (1000, 100), (999, 101)], [(0, 0), (100, 10), (10, 100)], [(5, 5)], [(0, 3), (9, 3)]):
        plane = Plane(at)
        for point in at:
            assert plane.shares(point).sum() == pytest.approx(1)
            assert abs(plane.shares(point)).max() <= 1.001
        least, most = np.min(at, axis=0), np.max(at, axis=0)
        for corner in (least, most, (least[0], most[1]), (most[0], least[1])):
            assert abs(plane.shares(corner)).max() < 2
    exact = Plane([(0, 0), (100, 10), (10, 100)])
    assert exact.shares((110, 110)) @ [1.0, 2.0, 3.0] == pytest.approx(4.0)
