"""Weights of the targets in a bag."""

import math

import pytest
import torch
from common import reference

from composer_tst.settings import target_weights


@pytest.mark.parametrize('weighting', ['uniform', 'power_law', 'exponential', 'first', [1, 0, 2, 0.5]])
def test_weights_are_the_rule_divided_by_its_sum(weighting: str | list[float]):
    expected = reference.weights_of(weighting, 4)
    expected = [w / math.fsum(expected) for w in expected]
    torch.testing.assert_close(target_weights(weighting, 4), torch.tensor(expected))
