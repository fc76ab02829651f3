"""`composer-tst compare` on event files whose curves, and so whose answers, are known."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from composer.loggers.logger import format_log_data_value
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from typer.testing import CliRunner

from composer_tst.cli.compare import picture
from composer_tst.cli.compare.command import app
from composer_tst.cli.compare.events import Series
from composer_tst.cli.compare.runs import Run, read_run
from composer_tst.cli.compare.speedup import first_crossing, iso_loss_speedup
from composer_tst.cli.main import CommandError

Command = Callable[..., tuple[int, str, str]]


def write(
    folder: Path,
    validation: dict[int, float],
    steps: range = range(100),
    phases: dict[int, int] | None = None,
    train: float = 3.0,
    label: str = 'eval',
    name: str = 'run',
    shorter: int = 1,
    attended: int = 10,
    rate: float | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """One event file, placed as Composer does; 10 tokens a step, ``phases`` the bag size from each step on.

    Of the tokens some may be padding, which Composer does not count. A superposed step works on as many positions as a
    plain one, or on one of ``shorter``.
    """
    with SummaryWriter(str(folder / 'tensorboard' / name)) as writer:
        bag, tokens, positions = 1, 0, 0
        for step in range(steps.stop):
            bag = (phases or {}).get(step, bag)
            if step in steps:
                writer.add_scalar('time/token', tokens, step)
                writer.add_scalar('loss/train/total', train, step)
                if rate is not None:
                    writer.add_scalar('lr-AdamW/group0', rate * min(step, 10), step)
            tokens += attended * bag
            positions += 10 // (shorter if bag > 1 else 1)
            if phases and step in steps:
                writer.add_scalar('superposition/bag_size', bag, step + 1)
                writer.add_scalar('superposition/data_tokens', tokens, step + 1)
                writer.add_scalar('superposition/s_tokens', positions, step + 1)
        writer.add_scalar('time/token', tokens, steps.stop)
        for step, loss in validation.items():
            writer.add_scalar(f'metrics/{label}/LanguageCrossEntropy', loss, step)
        writer.add_scalar('metrics/train/LanguageCrossEntropy', 1.0, steps.stop)
        if settings is not None:
            text = {key: format_log_data_value(item) for key, item in settings.items()}
            writer.add_hparams(text, {'hparams/loss/train/total': 1.0}, run_name=name)
    return folder


def series(points: dict[int, float]):
    return Series(np.array(list(points), np.int64), np.array(list(points.values())))


@pytest.fixture
def command() -> Command:
    """The command line, called in this process: arguments in; exit code, stdout and stderr out."""

    def call(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, result.stdout, result.stderr

    return call


BASELINE = {25: 5.0, 50: 4.0, 75: 3.5, 100: 3.0}


@pytest.mark.parametrize(
    ('run', 'ratio'),
    [
        ({50: 3.75}, 62.5 / 50),  # half way between the baseline's evaluations at 50 and 75
        ({50: 9.0, 100: 3.5}, 75 / 100),  # a run that loses
        ({100: 3.0}, 1.0),
        ({80: 2.9}, None),  # below all the baseline reached
        ({10: 6.0}, 25 / 10),  # above the first evaluation: read off there
    ],
)
def test_speedup_is_baseline_steps_at_the_runs_final_loss_over_its_steps(run: dict[int, float], ratio: float | None):
    assert iso_loss_speedup(series(BASELINE), series(run)) == (ratio if ratio is None else pytest.approx(ratio))


def test_speedup_counts_the_first_crossing_of_a_curve_that_rises_again():
    assert first_crossing(series({10: 4.0, 20: 3.0, 30: 5.0, 40: 2.0}), 3.5) == 15.0


def test_run_is_read_with_its_switches_and_tokens(tmp_path):
    run = read_run(write(tmp_path / 'tst', {50: 4.0, 100: 3.0}, phases={0: 4, 20: 2, 30: 1}))
    assert run.name == 'tst'
    assert run.switches == [20, 30]
    assert (run.final_loss, run.final_step) == (3.0, 100)
    assert run.tokens_at([100])[0] == 10 * (20 * 4 + 10 * 2 + 70)
    np.testing.assert_array_equal(run.superposed_at(np.array([0, 19, 29, 30, 99])), [1, 1, 1, 0, 0])


def test_baseline_takes_tokens_from_the_timestamp(tmp_path):
    run = read_run(write(tmp_path, BASELINE))
    assert run.switches == []
    assert not run.superposed_at(run.train.steps).any()
    np.testing.assert_array_equal(run.tokens_at([0, 50, 100]), [0, 500, 1000])


def test_resumed_run_counts_repeated_steps_once_as_trained_last(tmp_path):
    write(tmp_path, {25: 5.0, 50: 4.5, 60: 4.4}, steps=range(70), train=3.0, phases={0: 2, 65: 1})
    write(tmp_path, {50: 4.0, 75: 3.5, 100: 3.25}, steps=range(40, 100), train=2.0, phases={0: 2, 80: 1})
    run = read_run(tmp_path)
    # the evaluation at 60 belongs to the part of the first attempt that was thrown away
    assert run.validation.steps.tolist() == [25, 50, 75, 100]
    assert run.validation.values.tolist() == [5.0, 4.0, 3.5, 3.25]
    assert run.train.steps.tolist() == list(range(100))
    assert run.train.values.tolist() == [3.0] * 40 + [2.0] * 60
    assert run.switches == [80]


def test_an_evaluation_under_another_label_is_found(tmp_path):
    assert read_run(write(tmp_path, BASELINE, label='c4')).final_loss == 3.0


def test_one_of_several_eval_loaders_is_named(tmp_path: Path, command: Command):
    """As llm-foundry logs them if `eval_loader` is a list."""
    folders = [two_evaluations(tmp_path / name, 'eval/') for name in ('baseline', 'run')]
    code, _, error = command(*folders)
    assert code == 1
    assert 'logged the validation losses of c4, pile: name one of them, as --eval c4' in error
    code, out, _ = command(*folders, '--eval', 'pile')
    assert code == 0
    assert '2.5000' in out
    code, _, error = command(*folders, '--eval', 'code')
    assert code == 1
    assert f'--eval code: {folders[0]} logged c4, pile' in error


def test_command_prints_the_table_and_draws_a_small_picture(tmp_path, command):
    baseline = write(tmp_path / 'baseline', BASELINE)
    wins = write(tmp_path / 'wins', {50: 6.0, 100: 2.75}, phases={0: 4, 30: 1}, train=2.5)
    loses = write(tmp_path / 'loses', {50: 6.0, 100: 3.5}, phases={0: 2, 30: 1})
    path = tmp_path / 'new' / 'comparison.png'
    code, out, _ = command(baseline, wins, loses, '--output', path)
    assert code == 0
    _, *rows = [re.split('  +', line) for line in out.splitlines()[:4]]
    assert rows == [
        ['baseline', '3.0000', '-', '100', '1,000', '-'],
        ['wins', '2.7500', 'better 0.2500', '100', '1,900', 'better than the baseline ever was'],
        ['loses', '3.5000', 'worse 0.5000', '100', '1,300', '0.75x'],
    ]
    assert '(!)' not in out
    # Without a picture the same is said.
    code, short, _ = command(baseline, wins, loses)
    assert (code, out) == (0, f'{short}\ncurves: {path}\n')
    content = path.read_bytes()
    assert content.startswith(b'\x89PNG\r\n\x1a\n')
    assert 10_000 < len(content) < 300_000


@pytest.mark.parametrize(('suffix', 'begins'), [('.svg', b'<?xml'), ('.pdf', b'%PDF')])
def test_the_suffix_of_the_output_is_its_format(tmp_path: Path, command: Command, suffix: str, begins: bytes):
    path = tmp_path / f'comparison{suffix}'
    assert command(write(tmp_path / 'a', BASELINE), write(tmp_path / 'b', BASELINE), '--output', path)[0] == 0
    assert path.read_bytes().startswith(begins)


def test_another_suffix_is_refused_before_anything_is_read(tmp_path: Path, command: Command):
    code, _, error = command(tmp_path / 'nowhere', tmp_path / 'nowhere', '--output', tmp_path / 'comparison.jpg')
    assert (code, error.count('\n')) == (1, 1)
    assert f'{tmp_path}/comparison.jpg: its suffix is its format, give .png, .svg, .pdf' in error


def test_a_folder_of_several_runs_is_refused_with_their_names(tmp_path: Path, command: Command):
    write(tmp_path / 'runs', BASELINE, name='baseline')
    write(tmp_path / 'runs', BASELINE, name='tst')
    code, _, error = command(tmp_path / 'runs', tmp_path / 'runs', '--output', tmp_path / 'x.png')
    assert (code, error.count('\n')) == (1, 1)
    assert f'{tmp_path}/runs holds 2 runs (tensorboard/baseline, tensorboard/tst): give the folder of one' in error


TST = {0: 4, 30: 1}


@pytest.mark.parametrize(
    ('baseline', 'run', 'sentence', 'marked'),
    [
        ({}, {'steps': range(80), 'validation': {50: 4.0, 80: 3.4}}, 'at step 80 and baseline at 100', 'run'),
        ({}, {'label': 'c4'}, 'run was evaluated on c4 and baseline on eval: losses on different data', 'run'),
        ({}, {'phases': None}, 'run has no bags: it is a plain run', 'run'),
        ({}, {'shorter': 4}, 'positions a step and baseline on 10: equal steps are not equal compute', 'run'),
        ({'phases': TST}, {}, 'baseline is given as the baseline and has bags: give a plain run first', 'baseline'),
    ],
)  # fmt: skip
def test_what_may_not_be_compared_is_said_and_marked(
    tmp_path: Path, command: Command, baseline: dict, run: dict, sentence: str, marked: str
):
    first = write(tmp_path / 'baseline', BASELINE, **baseline)
    second = write(tmp_path / 'run', **({'validation': BASELINE, 'phases': TST} | run))
    code, out, _ = command(first, second, '--output', tmp_path / 'x.svg')
    assert code == 0
    assert any(line.startswith('(!) ') and sentence in line for line in out.splitlines()), out
    assert any(line.startswith(f'{marked} (!)') for line in out.splitlines()), out
    runs = [read_run(first), read_run(second)]
    assert picture.title(runs).endswith(' (!)')
    plain = [read_run(write(tmp_path / 'x', BASELINE)), read_run(write(tmp_path / 'y', BASELINE, phases=TST))]
    assert '(!)' not in picture.title(plain)


@pytest.mark.parametrize(('shorter', 'marked'), [(1, False), (4, True)])
def test_padding_does_not_make_steps_unequal(tmp_path: Path, command: Command, shorter: int, marked: bool):
    first = write(tmp_path / 'baseline', BASELINE, attended=7)
    second = write(tmp_path / 'run', BASELINE, phases=TST, attended=7, shorter=shorter)
    code, out, _ = command(first, second, '--output', tmp_path / 'x.svg')
    assert code == 0
    assert ('not equal compute' in out) == marked, out


def test_a_file_that_is_cut_short_is_named(tmp_path: Path, command: Command):
    run = write(tmp_path / 'run', BASELINE, phases=TST)
    (path,) = run.rglob('*tfevents*')
    path.write_bytes(path.read_bytes()[:-5])  # in the middle of the train metric, which nothing here reads
    code, out, _ = command(write(tmp_path / 'baseline', BASELINE), run, '--output', tmp_path / 'x.png')
    assert code == 0
    assert f'{path} ends in the middle of a record' in out
    path.write_bytes(path.read_bytes()[:200] + bytes(200) + path.read_bytes()[400:])
    with pytest.raises(CommandError, match=str(path)):
        read_run(run)


def test_a_pair_is_said_to_be_one_seed(tmp_path: Path, command: Command):
    folders = [
        write(tmp_path / name, BASELINE, phases=phases) for name, phases in (('a', None), ('b', TST), ('c', TST))
    ]
    assert 'One pair of runs is one seed: a small difference may be chance.' in command(*folders[:2])[1]
    assert 'one seed' not in command(*folders)[1]


LOADER: dict[str, Any] = {'name': 'text', 'dataset': {'local': 'a', 'split': 'train'}, 'num_workers': 8}
SETTINGS: dict[str, Any] = {
    'train_loader': LOADER,
    'eval_loader': LOADER | {'dataset': {'local': 'a', 'split': 'val'}},
    'optimizer': {'lr': 0.002},
    'seed': 17,
}
TOLD = {'rate': 0.002, 'settings': SETTINGS}
UNLOGGED = {'settings': SETTINGS}


def of(name: str, loader: str, **dataset: str) -> dict[str, Any]:
    """What a run tells if its loader reads something else."""
    return TOLD | {'settings': SETTINGS | {loader: LOADER | {'num_workers': 1, 'dataset': {'local': name, **dataset}}}}


@pytest.mark.parametrize(
    ('baseline', 'run', 'known', 'sentence'),
    [
        ({}, {}, 'the same: batch; not known: data, learning rate, eval set', ''),
        (TOLD, {}, 'the same: batch; not known: data, learning rate, eval set', ''),
        (TOLD, TOLD, 'the same: data, batch, learning rate, eval set', ''),
        # How many workers read the rows does not matter, nor where a cache is.
        (of('a', 'train_loader', remote='s3://a'), of('b', 'train_loader', remote='s3://a'), 'the same: data, ', ''),
        (TOLD, of('b', 'train_loader'), '; other: data', 'run and baseline were trained on other data, by train_load'),
        (TOLD, of('b', 'eval_loader'), '; other: eval set', 'run and baseline were evaluated on other data, by eval_'),
        (
            TOLD, TOLD | {'settings': SETTINGS | {'eval_subset_num_batches': 5}}, '; other: eval set',
            'run and baseline were evaluated on other data',
        ),
        (
            {'settings': {'eval_loaders': [SETTINGS['eval_loader']]}}, {'settings': {'eval_loaders': [LOADER]}},
            'other: eval set', 'run and baseline were evaluated on other data, by eval_loader',
        ),
        ({}, {'label': 'c4'}, 'other: eval set', 'run was evaluated on c4 and baseline on eval: losses on different'),
        (TOLD, {'rate': 0.001}, 'other: learning rate; not', 'other learning rates, first at step 1, 0.001 and 0.002'),
        # The settings of a rate that was not logged have four digits: they tell another one, but not the same.
        (UNLOGGED, UNLOGGED, 'the same: data, batch, eval set; not known: learning rate', ''),
        (
            UNLOGGED, {'settings': SETTINGS | {'optimizer': {'lr': 0.001}}}, '; other: learning rate',
            'run and baseline had other learning rates, by optimizer, scheduler and max_duration',
        ),
        ({}, {'shorter': 4}, 'other: batch', 'positions a step and baseline on 10: equal steps are not equal compute'),
    ],
)  # fmt: skip
def test_circumstances_are_the_same_only_if_both_runs_tell(
    tmp_path: Path, command: Command, baseline: dict, run: dict, known: str, sentence: str
):
    first = write(tmp_path / 'baseline', BASELINE, **baseline)
    second = write(tmp_path / 'run', BASELINE, **{'phases': TST, **run})
    code, out, _ = command(first, second)
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith('run beside baseline: ')]
    assert known in line
    assert ('lr_monitor in callbacks' in out) == ('not known' in line)
    marked = [line for line in out.splitlines() if line.startswith('(!) ')]
    assert len(marked) == bool(sentence)
    assert all(sentence in line for line in marked)


def test_the_title_says_whether_it_helped_and_by_how_much(tmp_path: Path):
    baseline = read_run(write(tmp_path / 'baseline', BASELINE))
    level = read_run(write(tmp_path / 'as-low', BASELINE, phases=TST))
    assert picture.title([baseline, level]) == 'as-low ends level with baseline'
    wins = read_run(write(tmp_path / 'wins', {50: 6.0, 100: 2.75}, phases=TST))
    loses = read_run(write(tmp_path / 'loses', {50: 6.0, 100: 3.5}, phases=TST))
    assert picture.title([baseline, wins]) == 'wins ends 0.250 nats per token better than baseline'
    assert picture.title([baseline, loses]) == 'loses ends 0.500 nats per token worse than baseline'
    assert (
        picture.title([baseline, loses, wins])
        == 'Of 2 runs wins ends lowest, 0.250 nats per token better than baseline'
    )


def test_runs_stay_distinct_past_eight():
    looks = [picture.look_of(index) for index in range(25)]
    assert len(set(looks)) == 25


def test_the_train_axis_shows_the_jump_at_the_switch(tmp_path: Path):
    run = read_run(write(tmp_path / 'run', BASELINE, phases=TST))
    jump = Series(run.train.steps, np.where(run.train.steps < 30, 3.0, np.where(run.train.steps < 40, 5.0, 3.0)))
    jumped = Run(**{**vars(run), 'train': jump})
    _, high = picture._train_limits([read_run(write(tmp_path / 'baseline', BASELINE)), jumped])
    assert high > 5.0


def test_runs_in_folders_of_one_name_are_told_apart_by_their_paths(tmp_path, command):
    folders = [write(tmp_path / side / 'run', BASELINE) for side in ('a', 'b')]
    _, out, _ = command(*folders, '--output', tmp_path / 'x.png')
    assert [line.split()[0] for line in out.splitlines()[1:3]] == [str(folder) for folder in folders]


def test_curves_are_cut_at_a_switch_and_the_superposed_part_is_dashed(tmp_path):
    run = read_run(write(tmp_path, BASELINE, phases={0: 4, 30: 1}))
    axes = Figure().subplots()
    picture._draw_train(axes, run, by_tokens=False, look=picture.look_of(1))
    superposed, recovery = axes.lines
    assert np.asarray(superposed.get_xdata()).tolist() == list(range(30))
    assert np.asarray(recovery.get_xdata()).tolist() == list(range(30, 100))
    assert superposed.is_dashed()
    assert not recovery.is_dashed()


def test_curves_are_named_at_their_ends_and_names_do_not_cover_each_other(tmp_path: Path):
    runs = [read_run(write(tmp_path / name, BASELINE)) for name in ('baseline', 'a-run-of-a-very-long-name')]
    axes = Figure().subplots()
    axes.set_ylim(0, 10)
    picture._name_ends(axes, runs)
    assert [text.get_text() for text in axes.texts] == ['baseline', '…-very-long-name']
    first, second = (text.xy[1] for text in axes.texts)  # pyright: ignore[reportAttributeAccessIssue]
    assert first == runs[0].final_loss
    assert second - first == pytest.approx(0.55)


@pytest.mark.parametrize(('steps', 'width'), [(5, 1), (40, 4), (100, 10), (600, 10), (3000, 30)])
def test_short_runs_are_smoothed_too(tmp_path: Path, steps: int, width: int):
    assert picture._width(read_run(write(tmp_path, {steps: 3.0}, steps=range(steps)))) == width


def test_smoothing_averages_around_each_point():
    smoothed = picture.smooth(series({0: 0.0, 1: 3.0, 2: 6.0, 3: 0.0}), 3)
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


def two_evaluations(tmp_path: Path, prefix: str = '') -> Path:
    write(tmp_path / 'two', BASELINE, label=f'{prefix}c4')
    # As if one file had both: the second goes on where the first ended.
    return write(tmp_path / 'two', {125: 2.5}, steps=range(100, 125), label=f'{prefix}pile')


def evaluated_first_alone(tmp_path: Path) -> Path:
    return write(tmp_path / 'first', {0: 9.0})


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (missing, 'is not a folder'),
        (empty, 'holds no TensorBoard event file'),
        (never_evaluated, 'logged no validation loss'),
        (diverged, 'its last validation loss is nan'),
        (two_evaluations, 'logged the validation losses of c4, pile: name one'),
        (evaluated_first_alone, 'was evaluated before its first step alone'),
    ],
)
def test_an_unusable_run_gets_one_sentence_and_exit_code_1(tmp_path, command, make, message):
    folder, baseline = make(tmp_path), write(tmp_path / 'baseline', BASELINE)
    code, _, error = command(baseline, folder, '--output', tmp_path / 'x.png')
    assert code == 1
    assert error.count('\n') == 1
    assert str(folder) in error
    assert message in error


def test_a_run_begun_anew_in_a_folder_replaces_what_was_there(tmp_path: Path, command: Command):
    write(tmp_path / 'base', BASELINE)
    again = write(tmp_path / 'again', {100: 2.0}, phases={0: 4, 30: 1})
    for path in sorted(again.rglob('*tfevents*')):
        path.rename(path.with_name('events.out.tfevents.0000000000.first'))
    write(again, {100: 3.0})
    code, table, _ = command(tmp_path / 'base', again, '--output', tmp_path / 'x.png')
    assert code == 0
    assert '(!) again has no bags: it is a plain run' in table
    run = read_run(again)
    assert run.final_loss == 3.0
    assert run.tokens.values[-1] == 1000


def test_a_run_is_given_once(tmp_path: Path, command: Command):
    write(tmp_path / 'base', BASELINE)
    code, _, error = command(tmp_path / 'base', tmp_path / 'base' / '.', '--output', tmp_path / 'x.png')
    assert code == 1
    assert 'is given more than once: give each run once' in error


def test_an_unfinished_run_is_marked(tmp_path: Path, command: Command):
    write(tmp_path / 'base', BASELINE)
    write(tmp_path / 'killed', {50: 3.5}, steps=range(74), phases={0: 4, 30: 1})
    write(tmp_path / 'bags', {100: 5.0}, phases={0: 4})
    _, table, _ = command(tmp_path / 'base', tmp_path / 'killed', tmp_path / 'bags', '--output', tmp_path / 'x.png')
    assert '(!) killed was trained until step 74 and last evaluated at 50: its loss is not that of a finished' in table
    assert '(!) bags was last evaluated while superposed: it has had no recovery.' in table


def test_runs_that_are_superposed_still_are_drawn(tmp_path: Path, command: Command):
    first, second = (write(tmp_path / name, {100: 5.0}, phases={0: 4}) for name in ('first', 'second'))
    code, table, _ = command(first, second, '--output', tmp_path / 'x.png')
    assert code == 0
    assert '(!) second was last evaluated while superposed: it has had no recovery.' in table


def test_padding_is_not_taken_for_work_where_no_recovery_tells_of_it(tmp_path: Path, command: Command):
    """Superposed still, or last evaluated then."""
    write(tmp_path / 'base', BASELINE, attended=5)
    write(tmp_path / 'still', {100: 5.0}, phases={0: 4}, attended=5)
    early = write(tmp_path / 'early', {25: 5.0, 50: 5.0}, phases={0: 4, 60: 1}, attended=5)
    runs = (tmp_path / name for name in ('base', 'still', 'early'))
    code, table, _ = command(*runs, '--output', tmp_path / 'x.png')
    assert code == 0
    assert 'positions a step' not in table
    assert read_run(early).phases == [(4, 0, 60), (1, 60, 100)]


def test_a_file_cut_before_its_evaluations_is_named(tmp_path: Path, command: Command):
    write(tmp_path / 'base', BASELINE)
    (path,) = write(tmp_path / 'cut', BASELINE).rglob('*tfevents*')
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    code, _, error = command(tmp_path / 'base', tmp_path / 'cut', '--output', tmp_path / 'x.PNG')
    assert code == 1
    assert 'logged no validation loss' in error
    assert f'{path} ends in the middle of a record' in error
