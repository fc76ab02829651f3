"""A short form of `make test-fuzz`: some whole runs of a fixed seed against their simulation."""

import collections

import pytest
from fuzz_runs import fuzz

pytestmark = pytest.mark.streaming


def test_runs_are_what_their_simulation_is():
    kinds: collections.Counter = collections.Counter()
    fuzz(seed=0, examples=40, kinds=kinds)
    trained = sum(count for kind, count in kinds.items() if not kind.startswith('refused'))
    assert trained >= 20, kinds
