"""A checkpoint and a run with other settings: refused, or harmless and logged."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from common.trainers import Rows, llama, logged, make_trainer, random_loader
from composer import Callback

from composer_tst import TokenSuperposition

TWO_PHASES = [{'bag_size': 4, 'until': '2ba'}, {'bag_size': 2, 'until': '4ba'}]


def phases(*pairs: tuple[int, str]) -> list[dict[str, Any]]:
    return [{'bag_size': bag_size, 'until': until} for bag_size, until in pairs]


def train_and_save(folder: Path, algorithm: TokenSuperposition, rows: int = 96, interval: str = '1ba') -> Path:
    """The checkpoints of a run of 8 steps."""
    trainer, _ = make_trainer(llama(), random_loader(rows), algorithm, save_folder=str(folder), save_interval=interval)
    trainer.fit()
    trainer.close()
    return folder


@pytest.fixture(scope='module')
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after each of 8 steps: 0 to 2 with bags of 4, 2 to 4 with bags of 2, then recovery."""
    return train_and_save(tmp_path_factory.mktemp('saved'), TokenSuperposition(phases=TWO_PHASES))


def resume(saved: Path, batch: int, max_duration: str = '8ba', **settings: Any) -> list[float]:
    """Resume after ``batch`` steps with other settings; give the bag sizes from there."""
    load = {'load_path': str(saved / f'ep0-ba{batch}-rank0.pt'), 'load_ignore_keys': settings.pop('ignore', None)}
    chosen: dict[str, Any] = {'phases': TWO_PHASES} | settings
    algorithm = TokenSuperposition(**chosen)
    trainer, logger = make_trainer(llama(), random_loader(96), algorithm, max_duration, **load)
    trainer.fit()
    trainer.close()
    return logged(logger, 'superposition/bag_size')


@pytest.mark.parametrize(
    ('batch', 'settings', 'message'),
    [
        (1, {'phases': phases((3, '2ba'), (2, '4ba'))}, 'bag_size is 3 but the checkpoint was trained with 4'),
        (1, {'phases': phases((4, '3ba'), (2, '4ba'))}, 'until is 3ba but the checkpoint was trained with 2ba'),
        (3, {'phases': phases((8, '2ba'), (2, '4ba'))}, 'bag_size is 8 but the checkpoint was trained with 4'),
        (3, {'phases': phases((4, '2ba'), (3, '4ba'))}, 'bag_size is 3 but the checkpoint was trained with 2'),
        (3, {'phases': phases((4, '2ba'))}, 'bag_size is 1 but the checkpoint was trained with 2'),
        (5, {'phases': phases((4, '2ba'), (2, '4ba'), (2, '7ba'))}, 'bag_size is 2 but the checkpoint was trained w'),
        (1, {'weighting': 'power_law'}, 'weighting is power_law but the checkpoint was trained with uniform'),
        (3, {'expand': 'batch'}, 'expand is batch but the checkpoint was trained with sequence'),
        (1, {'superpose': 'input'}, 'superpose is input but the checkpoint was trained with both'),
    ],
)
def test_what_was_trained_with_cannot_change(saved: Path, batch: int, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=rf'{message}.*load_ignore_keys: \[state/algorithms\]\.$'):
        resume(saved, batch, **settings)


@pytest.fixture(scope='module')
def one_phase(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a run with bags of 4 until step 2."""
    return train_and_save(tmp_path_factory.mktemp('one'), TokenSuperposition(4, '2ba'))


def test_the_end_of_the_only_phase_is_that_it_was_trained_with(one_phase: Path):
    changed: dict[str, Any] = {'phases': None, 'bag_size': 4, 'duration': '3ba'}
    with pytest.raises(ValueError, match='duration is 3ba but the checkpoint was trained with 2ba: set it back or'):
        resume(one_phase, 1, **changed)
    # At its very end, and later, its end is past: the run is in recovery, whatever is set.
    for batch in (2, 4):
        assert resume(one_phase, batch, **changed) == [1] * (8 - batch)


@pytest.mark.parametrize('batch', [2, 4])
def test_at_a_switch_what_was_trained_with_cannot_change(saved: Path, batch: int):
    for settings in ({'expand': 'batch'}, {'superpose': 'input'}, {'weighting': 'first'}):
        with pytest.raises(ValueError, match=f'{next(iter(settings))} is .* but the checkpoint was trained with'):
            resume(saved, batch, **settings)


@pytest.mark.parametrize(
    ('batch', 'settings', 'sizes'),
    [
        (1, {'phases': phases((4, '2ba'), (3, '5ba'), (2, '6ba'))}, [4, 3, 3, 3, 2, 1, 1]),
        (1, {'phases': phases((4, '2ba'))}, [4, 1, 1, 1, 1, 1, 1]),
        (2, {'phases': phases((4, '2ba'), (3, '3ba'))}, [3, 1, 1, 1, 1, 1]),
        (3, {'phases': phases((4, '1ba'), (2, '4ba'))}, [2, 1, 1, 1, 1]),
        (4, {'phases': phases((4, '2ba'), (2, '4ba'), (2, '6ba'))}, [2, 2, 1, 1]),
        (1, {'phases': phases((4, '2ba'), (2, '64sp'))}, [4, 2, 2, 2, 2, 1, 1]),  # 4 + 4 + 2 + 2 + 2 + 2 batches of 4
        (4, {'phases': phases((4, '2ba'), (2, '4ba'), (2, '48sp'))}, [1, 1, 1, 1]),  # 4 + 4 + 2 + 2 batches of 4
        (5, {'phases': phases((4, '2ba'), (2, '7ba'))}, [1, 1, 1]),
    ],
)
def test_what_is_past_or_to_come_may_change_and_is_logged(
    saved: Path, batch: int, settings: dict[str, Any], sizes: list[int], caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.INFO, logger='composer_tst'):
        assert resume(saved, batch, **settings) == sizes
    assert sum('resumes with other settings' in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize('unit', ['sp', 'tok'])
def test_a_run_as_long_as_its_data_resumes_in_any_phase(unit: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """An end that was a number of samples or tokens is one of batches once it is past."""
    length = {'sp': '160sp', 'tok': f'{160 * 12}tok'}[unit]
    shares = phases((4, '0.2dur'), (2, '0.5dur'))

    def run(**load: Any) -> list[float]:
        trainer, logger = make_trainer(
            llama(), random_loader(192, length=12), TokenSuperposition(phases=shares), length, **load
        )
        trainer.fit()
        trainer.close()
        return logged(logger, 'superposition/bag_size')

    sizes = run(save_folder=str(tmp_path), save_interval='1ba')
    assert set(sizes) == {4, 2, 1}
    with caplog.at_level(logging.INFO, logger='composer_tst'):
        for batch in (1, sizes.index(2) + 1, sizes.index(1) + 1):
            assert run(load_path=str(tmp_path / f'ep0-ba{batch}-rank0.pt')) == sizes[batch:]
    assert not [record for record in caplog.records if 'now ends at' in record.getMessage()]


def test_insisting_goes_on_with_the_new_settings_from_there(saved: Path):
    changed = {'phases': phases((4, '2ba'), (3, '6ba')), 'weighting': 'power_law', 'ignore': ['state/algorithms']}
    assert resume(saved, 3, **changed) == [3, 3, 3, 1, 1]


def test_insisting_goes_on_with_the_data_and_the_counts(saved: Path, caplog: pytest.LogCaptureFixture):
    """After 2 steps of 4 batches and one of 2, each of 48 tokens."""
    read: list[torch.Tensor] = []

    class Reads(Callback):
        def batch_start(self, state: Any, logger: Any) -> None:
            read.append(state.batch['input_ids'][0, :12].clone())

    load = {'load_path': str(saved / 'ep0-ba3-rank0.pt'), 'load_ignore_keys': ['state/algorithms']}
    trainer, logger = make_trainer(
        llama(), random_loader(96), TokenSuperposition(3, '6ba'), '8ba', callbacks=[Reads()], **load
    )
    with caplog.at_level(logging.INFO, logger='composer_tst'):
        trainer.fit()
    rows = Rows(96, 12).ids
    assert [int((rows == first).all(1).nonzero()) // 4 for first in read] == [10, 13, 16, 19, 20]
    assert logged(logger, 'superposition/data_tokens') == [48 * batches for batches in (13, 16, 19, 20, 21)]
    assert logged(logger, 'superposition/s_tokens') == [48 * steps for steps in (4, 5, 6, 7, 8)]
    assert (
        'from step 3 to step 6 of 8: before it 3 steps, 480 data tokens; bags of 3 for 3 steps, 432 data tokens; plain '
        'tokens for 2 steps, 96 data tokens.'
    ) in caplog.text
    assert 'It reads 2.62 times the data of a plain run' in caplog.text


def test_unchanged_settings_are_not_remarked_on(saved: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger='composer_tst'):
        assert resume(saved, 3) == [2, 1, 1, 1, 1]
    assert not [record for record in caplog.records if 'settings' in record.getMessage()]


def test_a_longer_run_moves_the_end_of_a_phase_under_way_but_begins_no_phase_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    shares = phases((4, '0.25dur'), (2, '0.5dur'))
    train_and_save(tmp_path, TokenSuperposition(phases=shares), rows=192)

    def resumed(batch: int) -> list[float]:
        load = {'load_path': str(tmp_path / f'ep0-ba{batch}-rank0.pt')}
        run, logger = make_trainer(llama(), random_loader(192), TokenSuperposition(phases=shares), '16ba', **load)
        with caplog.at_level(logging.INFO, logger='composer_tst'):
            run.fit()
        run.close()
        return logged(logger, 'superposition/bag_size')

    assert resumed(1) == [4] * 3 + [2] * 4 + [1] * 8
    assert 'The phase with bag_size 4 now ends at 4ba, not 2ba: it lasts until 0.25dur of a max_duration of 16ba.' in [
        record.getMessage() for record in caplog.records
    ]
    assert resumed(3) == [2] * 5 + [1] * 8
    caplog.clear()
    assert resumed(5) == [1] * 11
    assert not [record for record in caplog.records if 'now ends at' in record.getMessage()]


def test_a_phase_that_ended_early_does_not_misplace_the_next_in_a_longer_run(tmp_path: Path):
    """0.25dur of 40ba would end after 4ba, where the second phase ends."""
    mixed = phases((4, '0.25dur'), (2, '4ba'))
    train_and_save(tmp_path, TokenSuperposition(phases=mixed), rows=192, interval='3ba')
    load = {'load_path': str(tmp_path / 'ep0-ba3-rank0.pt')}
    run, logger = make_trainer(llama(), random_loader(192), TokenSuperposition(phases=mixed), '40ba', **load)
    run.fit()
    assert logged(logger, 'superposition/bag_size') == [2] + [1] * 36


def test_only_plain_python_types_are_saved():
    algorithm = TokenSuperposition(bag_size=3, duration='2ba', weighting=(1, 0.5, 0.25))
    trainer, _ = make_trainer(llama(), random_loader(), algorithm, '3ba')
    trainer.fit()
    state = algorithm.state_dict()
    assert state['settings']['weighting'] == [1.0, 0.5, 0.25]

    def plain(value: Any) -> bool:
        if type(value) is dict:
            return all(plain(v) for v in value.values())
        if type(value) is list:
            return all(plain(v) for v in value)
        return type(value) in (int, float, str, bool, type(None))

    assert plain(state), state
