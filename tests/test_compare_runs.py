"""tools/compare_runs.py on event files whose curves, and so whose answers, are known."""

import sys
from pathlib import Path

import compare_runs
import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

Series = compare_runs.Series


def write(
    folder: Path,
    validation: dict[int, float],
    steps: range = range(100),
    phases: dict[int, int] | None = None,
    train: float = 3.0,
    label: str = 'eval',
) -> Path:
    """One event file, placed as Composer does; 10 tokens a row, ``phases`` the bag size from each step on."""
    with SummaryWriter(str(folder / 'tensorboard' / 'run')) as writer:
        bag, tokens = 1, 0
        for step in range(steps.stop):
            bag = (phases or {}).get(step, bag)
            if step in steps:
                writer.add_scalar('time/token', tokens, step)
                writer.add_scalar('loss/train/total', train, step)
            tokens += 10 * bag
            if phases and step in steps:
                writer.add_scalar('superposition/bag_size', bag, step + 1)
                writer.add_scalar('superposition/data_tokens', tokens, step + 1)
        writer.add_scalar('time/token', tokens, steps.stop)
        for step, loss in validation.items():
            writer.add_scalar(f'metrics/{label}/LanguageCrossEntropy', loss, step)
        writer.add_scalar('metrics/train/LanguageCrossEntropy', 1.0, steps.stop)
    return folder


def series(points: dict[int, float]):
    return Series(np.array(list(points), np.int64), np.array(list(points.values())))


@pytest.fixture
def command(monkeypatch, capsys):
    """The command line, called in this process: arguments in; exit code, stdout and stderr out."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, 'argv', ['compare_runs.py', *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            compare_runs.typer.run(compare_runs.main)
        return int(stopped.value.code or 0), *capsys.readouterr()

    return call


BASELINE = {25: 5.0, 50: 4.0, 75: 3.5, 100: 3.0}


@pytest.mark.parametrize(
    ('run', 'ratio', 'reached'),
    [
        ({50: 3.75}, 62.5 / 50, True),  # half way between the baseline's evaluations at 50 and 75
        ({50: 9.0, 100: 3.5}, 75 / 100, True),  # a run that loses
        ({100: 3.0}, 1.0, True),
        ({80: 2.9}, 100 / 80, False),  # below all the baseline reached
        ({10: 6.0}, 25 / 10, True),  # above the first evaluation: read off there
    ],
)
def test_speedup_is_baseline_steps_at_the_runs_final_loss_over_its_steps(run, ratio, reached):
    speedup = compare_runs.iso_loss_speedup(series(BASELINE), series(run))
    assert speedup.ratio == pytest.approx(ratio)
    assert speedup.reached is reached


def test_speedup_counts_the_first_crossing_of_a_curve_that_rises_again():
    assert compare_runs.first_crossing(series({10: 4.0, 20: 3.0, 30: 5.0, 40: 2.0}), 3.5) == 15.0


def test_run_is_read_with_its_switches_and_tokens(tmp_path):
    run = compare_runs.read_run(write(tmp_path / 'tst', {50: 4.0, 100: 3.0}, phases={0: 4, 20: 2, 30: 1}))
    assert run.name == 'tst'
    assert run.switches == [20, 30]
    assert (run.final_loss, run.final_step) == (3.0, 100)
    assert run.tokens_at([100])[0] == 10 * (20 * 4 + 10 * 2 + 70)
    np.testing.assert_array_equal(run.superposed_at(np.array([0, 19, 29, 30, 99])), [1, 1, 1, 0, 0])


def test_baseline_takes_tokens_from_the_timestamp(tmp_path):
    run = compare_runs.read_run(write(tmp_path, BASELINE))
    assert run.switches == []
    assert not run.superposed_at(run.train.steps).any()
    np.testing.assert_array_equal(run.tokens_at([0, 50, 100]), [0, 500, 1000])


def test_resumed_run_counts_repeated_steps_once_as_trained_last(tmp_path):
    write(tmp_path, {25: 5.0, 50: 4.5, 60: 4.4}, steps=range(70), train=3.0, phases={0: 2, 65: 1})
    write(tmp_path, {50: 4.0, 75: 3.5, 100: 3.25}, steps=range(40, 100), train=2.0, phases={0: 2, 80: 1})
    run = compare_runs.read_run(tmp_path)
    # the evaluation at 60 belongs to the part of the first attempt that was thrown away
    assert run.validation.steps.tolist() == [25, 50, 75, 100]
    assert run.validation.values.tolist() == [5.0, 4.0, 3.5, 3.25]
    assert run.train.steps.tolist() == list(range(100))
    assert run.train.values.tolist() == [3.0] * 40 + [2.0] * 60
    assert run.switches == [80]


def test_an_evaluation_under_another_label_is_found(tmp_path):
    assert compare_runs.read_run(write(tmp_path, BASELINE, label='c4')).final_loss == 3.0


def test_command_prints_the_table_and_draws_a_small_picture(tmp_path, command):
    baseline = write(tmp_path / 'baseline', BASELINE)
    wins = write(tmp_path / 'wins', {50: 6.0, 100: 2.75}, phases={0: 4, 30: 1}, train=2.5)
    loses = write(tmp_path / 'loses', {50: 6.0, 100: 3.5}, phases={0: 2, 30: 1})
    picture = tmp_path / 'new' / 'comparison.png'
    code, out, _ = command(baseline, wins, loses, '--output', picture)
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert rows['baseline'] == ['3.0000', '-', '100', '1,000', '-']
    assert rows['wins'] == ['2.7500', '-0.2500', '100', '1,900', 'not', 'reached', '(more', 'than', '1.00x)']
    assert rows['loses'] == ['3.5000', '+0.5000', '100', '1,300', '0.75x']
    content = picture.read_bytes()
    assert content.startswith(b'\x89PNG\r\n\x1a\n')
    assert 10_000 < len(content) < 300_000


def test_runs_in_folders_of_one_name_are_told_apart_by_their_paths(tmp_path, command):
    folders = [write(tmp_path / side / 'run', BASELINE) for side in ('a', 'b')]
    _, out, _ = command(*folders, '--output', tmp_path / 'x.png')
    assert [line.split()[0] for line in out.splitlines()[1:3]] == [str(folder) for folder in folders]


def test_curves_are_cut_at_a_switch_and_the_superposed_part_is_dashed(tmp_path):
    from matplotlib.figure import Figure

    run = compare_runs.read_run(write(tmp_path, BASELINE, phases={0: 4, 30: 1}))
    axes = Figure().subplots()
    compare_runs._draw_train(axes, run, by_tokens=False, color='k')
    superposed, recovery = axes.lines
    assert np.asarray(superposed.get_xdata()).tolist() == list(range(30))
    assert np.asarray(recovery.get_xdata()).tolist() == list(range(30, 100))
    assert superposed.is_dashed()
    assert not recovery.is_dashed()


def test_smoothing_averages_around_each_point():
    smoothed = compare_runs.smooth(series({0: 0.0, 1: 3.0, 2: 6.0, 3: 0.0}), 3)
    np.testing.assert_allclose(smoothed.values, [1.5, 3.0, 3.0, 3.0])


def missing(tmp_path: Path) -> Path:
    return tmp_path / 'nowhere'


def empty(tmp_path: Path) -> Path:
    (tmp_path / 'empty').mkdir()
    return tmp_path / 'empty'


def never_evaluated(tmp_path: Path) -> Path:
    return write(tmp_path / 'never_evaluated', {})


def diverged(tmp_path: Path) -> Path:
    return write(tmp_path / 'diverged', {50: 4.0, 100: float('nan')})


def two_evaluations(tmp_path: Path) -> Path:
    write(tmp_path / 'two', BASELINE, label='c4')
    return write(tmp_path / 'two', BASELINE, label='pile')


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (missing, 'is not a folder'),
        (empty, 'holds no TensorBoard event file'),
        (never_evaluated, 'logged no validation loss'),
        (diverged, 'its last validation loss is nan'),
        (two_evaluations, 'several validation losses'),
    ],
)
def test_an_unusable_run_gets_one_sentence_and_exit_code_1(tmp_path, command, make, message):
    folder, baseline = make(tmp_path), write(tmp_path / 'baseline', BASELINE)
    code, _, error = command(baseline, folder, '--output', tmp_path / 'x.png')
    assert code == 1
    assert error.count('\n') == 1
    assert str(folder) in error
    assert message in error
