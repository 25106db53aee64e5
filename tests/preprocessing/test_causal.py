"""A causal low-pass: what it lets through comes as late as it says."""

import numpy as np
import pytest

from braindecode_vis.preprocessing.causal import CausalFilter


@pytest.mark.parametrize("h_freq", [20.0, 40.0])
def test_a_low_pass_is_late_by_half_of_its_length(h_freq):
    """With that taken off, the output of a click is the same before it and behind it."""
    samples = np.zeros((1, 2001))
    samples[0, 700] = 1.0
    low_pass = CausalFilter(250.0, h_freq=h_freq)
    found = low_pass.filter_stretch(samples)[0]
    assert (found.shape, found.argmax()) == ((2001,), 700)
    np.testing.assert_allclose(found[700:1300], found[101:701][::-1], atol=1e-12)
    assert low_pass.push(np.zeros((1, 30))).shape == (1, 30)  # it goes on
    low_pass.restart()
    assert low_pass.push(np.zeros((1, 30 + low_pass.delay))).shape == (1, 30)
    assert CausalFilter(250.0).delay == CausalFilter(250.0, notch=(50.0,), l_freq=1.0).delay == 0
