"""Numbers that are positive in Python and 0 or infinite in the dtype of the curvature are refused by name."""

from __future__ import annotations

import numpy as np
import pytest

import kfaccore as kf


@pytest.mark.parametrize("precision", [1e-50, 1e50])
def test_a_precision_that_float32_does_not_hold_is_refused_and_float64_takes_it(precision):
    rng = np.random.default_rng(0)
    a, g, mean = rng.normal(size=(20, 3)), rng.normal(size=(20, 2)), rng.normal(size=(2, 3))
    for dtype in (np.float32, np.float64):
        record = kf.Record(a.astype(dtype), g.astype(dtype), 20.0)
        curvature = kf.fit(kf.EKFAC(), [{"w": record}])
        make = lambda: kf.Posterior({"w": mean.astype(dtype)}, curvature, precision)  # noqa: B023, E731
        if dtype is np.float32:
            with pytest.raises(ValueError, match=r"layer 'w' has precision 1e.50, .* in the float32"):
                make()
        else:
            make()
