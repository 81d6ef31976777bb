"""The accuracy contract itself: what passes, and what never does."""

import math

import pytest
import torch

from sloth_plugins.numerics import Comparison, bound, relative_error


@pytest.mark.parametrize("eager", [0.0, 1e-3, math.inf])
@pytest.mark.parametrize("error", [math.inf, math.nan])
def test_what_is_not_finite_never_passes(error: float, eager: float) -> None:
    assert not Comparison(tensor="y", error=error, eager_error=eager).passed


def test_the_bound_is_one_and_a_half_times_eager_and_a_millionth() -> None:
    assert bound(2e-3) == pytest.approx(3e-3 + 1e-6)
    assert Comparison(tensor="y", error=3e-3, eager_error=2e-3).passed
    assert not Comparison(tensor="y", error=3.1e-3, eager_error=2e-3).passed


def test_the_error_of_a_wrong_shape_of_nan_and_of_zero() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0]), truth) == math.inf
    assert relative_error(torch.tensor([3.0, math.nan]), truth) == math.inf
    assert relative_error(torch.tensor([0.0, 0.5]), torch.zeros(2)) == pytest.approx(0.5)
    assert relative_error(torch.empty(0), torch.empty(0)) == 0.0
