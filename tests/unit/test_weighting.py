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


@pytest.mark.parametrize(
    ('weighting', 'message'),
    [
        ('linear', "weighting is 'linear': use one of uniform, power_law"),
        (3.0, 'weighting is 3.0'),
        ([1, 2], 'weighting has 2 numbers but bag_size is 4'),
        ([1, 2, -1, 1], 'not negative'),
        ([0, 0, 0, 0], 'do not all vanish'),
        ([1, 2, math.nan, 1], 'finite'),
        (['a', 'b', 'c', 'd'], 'or a list of numbers'),
    ],
)
def test_unusable_weights_are_refused_in_one_sentence(weighting, message: str):
    with pytest.raises(ValueError, match=message):
        target_weights(weighting, 4)
