"""What an earlier version saved in its checkpoints is taken up: a run that was begun with it goes on with this one.

``common/older_states.json`` has what TokenSuperposition saved at three moments of a run of 24 steps, as it was in the
checkpoints: bags of 4 until 3ba, of 2 until 0.5dur, 128 positions of the model a step, 4 samples a loader batch. Each
has beside it what was counted by hand from the steps of that run.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from composer_tst import TokenSuperposition

OLDER = json.loads((Path(__file__).parents[1] / 'common' / 'older_states.json').read_text())


@pytest.fixture(params=OLDER, ids=lambda older: older['moment'])
def older(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One of the moments."""
    return json.loads(json.dumps(request.param))  # a test may change it


def resumed(state: dict[str, Any]) -> TokenSuperposition:
    """An algorithm of the same settings that has taken up what was saved."""
    algorithm = TokenSuperposition(**state['settings'])
    algorithm.load_state_dict(state)
    return algorithm


def saved_by(algorithm: TokenSuperposition) -> dict[str, Any]:
    """What it would save, but for how it prints."""
    return {key: value for key, value in algorithm.state_dict().items() if key != 'repr'}


def test_the_moments_are_a_phase_an_epochs_end_and_recovery():
    assert [older['moment'] for older in OLDER] == ['in a phase', "at an epoch's end", 'in recovery']
    assert [older['resumed']['bag_size'] for older in OLDER] == [4, 2, 1]


def test_an_older_state_is_taken_up_with_its_bag_size_and_its_counts(older: dict[str, Any]):
    algorithm = resumed(older['state'])
    state = algorithm.state_dict()
    says = {'bag_size': algorithm.schedule.bag_size, 's_tokens': state['s_tokens'], 'left_out': state['left_out']}
    assert says == older['resumed']


def test_an_older_state_is_saved_again_as_it_was(older: dict[str, Any]):
    """A later version may save more, but nothing of this differs or is gone."""
    saved = saved_by(resumed(older['state']))
    assert {key: saved.get(key, 'gone') for key in older['state'] if key != 'repr'} == {
        key: value for key, value in older['state'].items() if key != 'repr'
    }
    assert json.loads(json.dumps(saved)) == saved  # in plain Python types
    assert saved_by(resumed(saved)) == saved


def test_a_state_from_before_the_samples_of_a_batch_were_saved_is_taken_up(older: dict[str, Any]):
    """They are then not known; all else is."""
    whole = saved_by(resumed(older['state']))
    del older['state']['batch_samples']
    algorithm = resumed(older['state'])
    assert algorithm.schedule.bag_size == older['resumed']['bag_size']
    assert saved_by(algorithm) == whole | {'batch_samples': None}


def test_a_state_from_before_the_batches_drawn_were_counted_is_refused(older: dict[str, Any]):
    """The sentence says what to do."""
    del older['state']['drawn']
    message = 'of an earlier composer-tst, which did not save how many loader batches its epoch drew: resume it with'
    with pytest.raises(ValueError, match=message):
        resumed(older['state'])
