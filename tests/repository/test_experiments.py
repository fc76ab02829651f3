"""tools/experiments/run.py: its sums against sums by hand, its plan against its record, and real runs of it, tiny."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import typer
from common import REPO, SEQ_LEN, VOCAB_SIZE, runs
from transformers import LlamaConfig, LlamaForCausalLM

from composer_tst.cli.plan.measured import read_measured
from composer_tst.cli.plan.model import Model
from tools.experiments import copying, judge, questions, run, scales, summary, tables, train
from tools.experiments.judge import best_plain
from tools.experiments.questions import Ask, asked, missing, tuning
from tools.experiments.record import RUNS, SEEDS, Job, Record, Row, add, read, read_copying, write
from tools.experiments.scales import PYTHON_1, PYTHON_5, PYTHON_20, PYTHON_20_LARGE, PYTHON_80, PYTHON_80_LARGER, Scale
from tools.experiments.settings import (
    BASELINE,
    PHASES_BATCH,
    PUBLISHED,
    S4,
    SMALL_BAGS,
    Setting,
    bags,
    limited,
    one_size,
    phases,
)

pytestmark = pytest.mark.streaming

assert runs  # its server has imported what a run needs


def row_of(scale: Scale, setting: Setting, seed: int, rate: float, loss: float) -> Row:
    """A row with this final loss."""
    return Row(scale.name, scale.text, setting.name, seed, rate, 100, 1_024, loss, 1.0, 'torch==2.7.0')


def rows_of(scale: Scale, losses: dict[Setting, list[float]], rate: float = 0.002) -> list[Row]:
    """Rows at seeds 17, 18, ... with these final losses, by setting."""
    return [row_of(scale, setting, 17 + i, rate, loss) for setting in losses for i, loss in enumerate(losses[setting])]


def copy_pages(folder: Path) -> None:
    """What is made of a record, as it is now, for another one to be made of it."""
    for page in (*run.PAGES, summary.SUMMARY):
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).write_text((REPO / page).read_text())


@pytest.fixture(scope='module')
def record() -> Record:
    """The record of the repository."""
    return read(REPO / RUNS)


def test_the_plan_asks_for_every_row_of_the_record(record: Record):
    wanted = {job.key for ask in asked() for job in ask.jobs(record)}
    assert not record.rows.keys() - wanted
    for row in record.rows.values():
        scale = scales.SCALES[row.scale]
        assert (row.text, row.tokens_per_step) == (scale.text, scale.tokens_per_step)
    # Of one budget all have read the same text, but for the rows more that the page tells.
    (more,) = re.findall(r'the last runs at 80 read (\d+) rows\s+more', (REPO / run.PAGES[1]).read_text())
    for budget, rows in (('python-40-', 0), ('python-80-', int(more))):
        texts = {int(row.versions.split('text==')[1]) for row in record.rows.values() if row.scale.startswith(budget)}
        assert len(texts) == 1 + (rows > 0)
        assert max(texts) - min(texts) == rows * 128


def test_a_row_that_is_deleted_is_missing(record: Record):
    for key in random.Random(17).sample(sorted(record.rows), 20):
        less = Record(row for row in record.rows.values() if row.key != key)
        assert key in {job.key for job in missing(less)}, key


def test_pages_are_made_of_whatever_rows_there_are(record: Record, tmp_path: Path):
    chance = random.Random(17)
    for share in (0.0, 0.1, 0.5, 0.9):
        some = Record(row for row in record.rows.values() if chance.random() < share)
        copy_pages(tmp_path)
        run.write(some, tmp_path)
        assert (tmp_path / run.PICTURE).stat().st_size > 1000


def test_page_and_summary_say_what_the_record_says(record: Record, tmp_path: Path):
    copy_pages(tmp_path)
    shown = []
    for page in run.PAGES:
        tables.write_tables(tmp_path / page, record)
        assert (tmp_path / page).read_text() == (REPO / page).read_text(), 'make evidence SCALE=mpt writes it anew'
        shown += re.findall(r'<!-- table: (\w+) -->', (REPO / page).read_text())
    assert sorted(shown) == sorted(tables.TABLES)
    summary.write_summary(tmp_path / 'evidence.csv', record)
    assert (tmp_path / 'evidence.csv').read_text() == (REPO / summary.SUMMARY).read_text()


def test_a_cell_of_the_summary_is_the_mean_of_its_rows(record: Record):
    with (REPO / summary.SUMMARY).open() as file:
        cells = list(csv.DictReader(file))
    of_recipe = next(c for c in cells if (c['scale'], c['setting']) == ('python-5-1024', PUBLISHED.name))
    with (REPO / RUNS).open() as file:
        lines = [line for line in csv.DictReader(file) if line['scale'] == 'python-5-1024']

    def mean(setting: Setting, rate: str) -> float:
        found = [float(each['final_loss']) for each in lines if (each['setting'], each['rate']) == (setting.name, rate)]
        assert len(found) == 3
        return sum(found) / 3

    assert of_recipe['rate'] == '0.002'
    assert float(of_recipe['change']) == pytest.approx(mean(PUBLISHED, '0.002') - mean(BASELINE, '0.004'), abs=1e-4)
    read_back = read_measured(Model(1, 1, 1, 1))
    assert len(read_back) == len([c for c in cells if c['bag_sizes'] and c['scale'][:3] != 'mpt'])
    (found,) = [
        each for sizes, _, expand, each in read_back
        if (sizes, expand, each.steps, each.text) == ([6], 'sequence', 1_800, 'Python source')
    ]  # fmt: skip
    assert found.change == float(of_recipe['change'])


def test_rows_are_written_as_they_are_read(tmp_path: Path):
    path = tmp_path / 'results' / 'runs.csv'
    first, second = rows_of(PYTHON_1, {PHASES_BATCH: [3.652764081954956, float('inf')]})
    assert read(path).rows == {}
    write(path, Record([second]))
    assert add(path, first).rows == read(path).rows == {first.key: first, second.key: second}
    assert path.read_text().splitlines()[0] == (
        'scale,text,setting,seed,rate,steps,tokens_per_step,final_loss,seconds,versions'
    )


def test_changes_are_told_by_one_sign_and_one_mark():
    assert tables.shown([-0.1, -0.1, -0.12]) == '**better 0.107 ± 0.012**'
    assert tables.shown([0.1, 0.1, 0.12]) == 'worse 0.107 ± 0.012'
    assert tables.shown([-0.2, 0.0, 0.13]) == 'level (better 0.023 ± 0.166)'
    assert tables.shown([-0.1, -0.1]) == 'better 0.100 ± 0.000 (2)'
    assert tables.shown([-0.1]) == 'better 0.100 (1)'
    assert tables.shown([-0.1, -0.1, -0.1, -0.12]) == '**better 0.105 ± 0.010** (4)'
    assert tables.shown([-0.1, -0.2, -0.3]) == 'level (better 0.200 ± 0.100)'
    assert tables.shown([-0.1, -0.2, -0.3, -0.2]) == '**better 0.200 ± 0.082** (4)'
    assert tables.shown([0.1, float('inf'), 0.1]) == 'diverged'
    assert tables.shown([]) == ''


def test_the_best_plain_run_is_that_of_any_size_of_a_step():
    small = rows_of(PYTHON_20, {BASELINE: [3.0, 3.1, 3.2], S4: [2.9, 3.0, 3.1], SMALL_BAGS: [9.0, 2.8, 2.9, 2.7]})
    large = rows_of(PYTHON_20_LARGE, {BASELINE: [2.8, 2.9, 3.1], S4: [2.9, 2.9, 2.9]})
    found = Record([*small, *large])
    assert best_plain(found, PYTHON_20) == PYTHON_20_LARGE
    assert judge.over_best(found, PYTHON_20, S4) == pytest.approx([0.1, 0.1, 0.0])
    assert judge.over_plain(found, PYTHON_20, S4) == pytest.approx([-0.1, -0.1, -0.1])
    # Chosen at seed 17: judged at the others.
    assert judge.over_plain(found, PYTHON_20, SMALL_BAGS) == pytest.approx([-0.3, -0.3])
    found = Record([*found.rows.values(), *rows_of(PYTHON_20, {PUBLISHED: [2.9, 3.0, 3.2]})])
    lines = tables.over_best_plain(found).splitlines()
    assert '| 80 | not at three seeds yet |  |  |  |  |  |' in lines
    assert lines[2] == (
        '| 20 | 1,775 of 4,096 | 2.933 ± 0.153 | worse 0.100 ± 0.000; 7,100 of 1,024 | '
        's = 4, r = 0.3; 1,775 of 4,096 | level (better 0.033 ± 0.153) | yes |'
    )
    both = Record([*found.rows.values(), *rows_of(PYTHON_20_LARGE, {PUBLISHED: [2.9, 2.9, 2.9]})])
    lines = tables.size_of_steps(both).splitlines()[2:]
    assert lines == [
        '| 20 | baseline | 7,100 of 1,024: 3.100 ± 0.100 | 1,775 of 4,096: 2.933 ± 0.153 | **better 0.167 ± 0.058** |',
        '| 20 | s = 6, r = 0.3 | 7,100 of 1,024: 3.033 ± 0.153 | 1,775 of 4,096: 2.900 ± 0.000 | '
        'level (better 0.133 ± 0.153) |',
    ]
    # Before the baseline has been run at all seeds it is not the best.
    fewer = Record(row for row in found.rows.values() if row.key[:3] != (PYTHON_20_LARGE.name, BASELINE.name, 19))
    assert best_plain(fewer, PYTHON_20) == PYTHON_20


def test_tables_judge_what_was_chosen_at_80_by_seeds_that_did_not_choose_it(record: Record):
    losses = {
        BASELINE: [2.0] * 6,
        S4: [1.9, 1.9, 1.9, 1.98, 1.97, 1.96],
        PUBLISHED: [1.95, 1.94, 1.93, 1.97, 1.96, 1.9],
    }
    found = Record([*rows_of(PYTHON_80, losses), *rows_of(PYTHON_80_LARGER, {BASELINE: [2.1, 2.1, 2.1]})])
    assert tables.over_best_plain(found).splitlines()[-1] == (
        '| 80 | 7,100 of 4,096 | 2.000 ± 0.000 | **better 0.058 ± 0.025** (6); 7,100 of 4,096 | '
        's = 4, r = 0.3; 7,100 of 4,096 | **better 0.030 ± 0.010** | no |'
    )
    # The recipe was not chosen, and all its seeds tell.
    assert judge.over_plain(found, PYTHON_80, S4) == pytest.approx([-0.02, -0.03, -0.04])
    assert judge.over_plain(found, PYTHON_80, PUBLISHED) == pytest.approx([-0.05, -0.06, -0.07, -0.03, -0.04, -0.1])
    # Before all of these seeds are run, the first ones tell.
    fewer = Record(row for row in found.rows.values() if row.key[2] != 22)
    assert judge.over_plain(fewer, PYTHON_80, S4) == pytest.approx([-0.1] * 3)
    assert judge.over_plain(fewer, PYTHON_80, PUBLISHED) == pytest.approx([-0.05, -0.06, -0.07])
    assert tables.over_best_plain(fewer).splitlines()[-1].endswith('| **better 0.100 ± 0.000** | yes |')
    # What was chosen and run again stays, also if the recipe then ends lower in the other size.
    lower = rows_of(PYTHON_80_LARGER, {PUBLISHED: [1.0, 1.0, 1.0]})
    assert '| s = 4, r = 0.3; 7,100 of 4,096 |' in tables.over_best_plain(Record([*found.rows.values(), *lower]))
    # The size of the headline and its winner are written down, and are those that the record says.
    assert best_plain(record, questions.OTHER_80) == questions.BEST_80
    ends = {each: [*record.judged(questions.BEST_80, each, SEEDS).values()] for each in questions.SETTINGS}
    known = {each: sum(losses) for each, losses in ends.items() if len(losses) == len(SEEDS)}
    assert questions.WINNER_80 not in known or min(known, key=lambda each: known[each]) == questions.WINNER_80


def test_a_baseline_that_diverged_at_a_seed_is_told(tmp_path: Path):
    losses = {BASELINE: [2.0, float('inf'), 2.1], S4: [1.9, 1.9, 2.0]}
    found = Record([*rows_of(PYTHON_20, losses), *rows_of(PYTHON_20_LARGE, {BASELINE: [2.2] * 3})])
    copy_pages(tmp_path)
    run.write(found, tmp_path)
    assert (
        '\n| Python source | 20 | 7,100 | 1,024 | diverged |  | diverged |  |  |\n'
        in (tmp_path / run.PAGES[1]).read_text()
    )
    assert 's = 4' not in (tmp_path / summary.SUMMARY).read_text()


def test_a_setting_is_judged_at_the_rate_of_its_lowest_mean():
    found = Record(
        [
            *rows_of(PYTHON_5, {BASELINE: [3.0, 3.1, 3.2], S4: [3.3, 3.3, 3.3], PUBLISHED: [3.1]}),
            *rows_of(PYTHON_5, {S4: [2.9, 3.0, 3.2], PUBLISHED: [3.2]}, rate=0.004),
            row_of(PYTHON_5, S4, 17, 0.008, 1.0),  # lowest where it was tuned, but at one seed
        ]
    )
    assert found.rate(PYTHON_5, S4) == 0.004
    assert found.tuned(PYTHON_5, S4) == 0.008
    assert list(found.changes(PYTHON_5, S4, SEEDS).values()) == pytest.approx([-0.1, -0.1, 0.0])
    assert found.rate(PYTHON_5, PUBLISHED) == 0.002


def test_the_speed_up_is_read_between_baselines_with_schedules_of_their_own():
    curve = [(1.0, 0.0), (1.5, -0.1), (2.0, -0.2)]
    # Half way in the logarithm, so that x / 1 = 1.5 / x; above and below all of them.
    assert tables.speed_up(curve, -0.05) == '1.22'
    assert tables.speed_up(curve, -0.1) == '1.50'
    assert tables.speed_up(curve, 0.02) == 'less than 1'
    assert tables.speed_up(curve, -0.3) == 'more than 2'


def test_a_rate_is_tuned_until_its_lowest_loss_is_at_no_edge():
    base = {0.001: 2.9, 0.002: 2.8, 0.004: 2.6, 0.008: 2.7}

    def asks(losses: dict[float, float], setting: Setting = S4) -> set[tuple[int, float]]:
        """Seeds and rates that are still to be run of a setting, given its losses at seed 17."""
        rows = [row_of(PYTHON_5, BASELINE, 17, rate, loss) for rate, loss in base.items() if setting != BASELINE]
        rows += [row_of(PYTHON_5, setting, 17, rate, loss) for rate, loss in losses.items()]
        lacking = Ask(PYTHON_5, (S4,), tuned=True).lacks(Record(rows))
        return {(job.seed, job.rate) for job in lacking if job.setting == setting}

    beside = {0.002: 2.9, 0.004: 2.8, 0.008: 2.85}
    assert asks({}) == {(17, 0.002), (17, 0.004), (17, 0.008)}
    assert asks(beside) == {(18, 0.004), (19, 0.004)}
    assert asks(beside | {0.002: 2.7}) == {(17, 0.001)}
    assert asks(beside | {0.002: 2.7, 0.001: 2.75}) == {(18, 0.002), (19, 0.002)}
    assert asks(beside | {0.002: 2.7, 0.001: 2.65}) == {(17, 0.0005)}
    assert asks(beside | {0.002: float('inf')}) == {(18, 0.004), (19, 0.004)}
    # The baseline, from the rates of its scale on.
    assert asks({}, BASELINE) == {(17, rate) for rate in PYTHON_5.rates}
    assert asks(base | {0.008: 2.5}, BASELINE) == {(17, 0.016)}
    # Those on the way to the best are asked for too, so that one is trained again if its row is deleted.
    risen = base | {0.008: 2.5, 0.016: 2.4, 0.032: 2.3, 0.064: 2.4}
    found = Record([row_of(PYTHON_5, BASELINE, 17, rate, loss) for rate, loss in risen.items()])
    assert [job.rate for job in tuning(found, PYTHON_5, BASELINE)] == [*risen]
    # A scale with one rate is not tuned.
    assert [job.rate for job in tuning(Record(), scales.MPT_256, BASELINE)] == [0.002]


def test_the_harness_asks_for_what_was_chosen_at_80_at_other_seeds(record: Record):
    best, other, chosen = questions.BEST_80, questions.OTHER_80, questions.WINNER_80
    found = Record(row for row in record.rows.values() if '-80-' not in row.scale)
    for scale in (best, other):
        for row in [row_of(scale, BASELINE, 17, rate, 2.9) for rate in scale.rates]:
            found.rows[row.key] = row
        for row in rows_of(scale, {BASELINE: [1.8, 1.8, 1.8]}, rate=0.008):
            found.rows[row.key] = row
    # The headline before all else: three rates of each setting.
    first = missing(found)[:12]
    assert {(job.scale, job.setting) for job in first} == {(best, setting) for setting in questions.SETTINGS}
    assert {(job.seed, job.rate) for job in first} == {(17, rate) for rate in (0.004, 0.008, 0.016)}
    for setting in questions.SETTINGS:
        for row in [row_of(best, setting, 17, rate, 3.0) for rate in (0.004, 0.016)]:
            found.rows[row.key] = row
        for row in rows_of(best, {setting: [1.7] * 3}, rate=0.008):
            found.rows[row.key] = row
    # The winner and the recipe at seeds that did not choose them; then the recipe in the other size.
    lacking = missing(found)
    fresh = [job for job in lacking if job.scale == best]
    assert lacking[: len(fresh)] == fresh
    assert {(job.setting, job.seed) for job in fresh} == {
        (setting, seed) for setting in (BASELINE, chosen, PUBLISHED) for seed in questions.FRESH
    }
    assert {(job.scale, job.setting) for job in lacking[len(fresh) :]} == {(other, PUBLISHED)}


def test_a_budget_is_what_it_says():
    for scale in tables.LLAMAS:
        budget, tokens = scale.name.split('-')[1:]
        assert (round(scale.tokens_per_parameter), scale.tokens_per_step) == (int(budget), int(tokens))
        assert f'global_train_batch_size={scale.tokens_per_step // scale.seq_len}' in scale.overrides
    config = json.loads((REPO / 'yamls' / 'evidence' / 'llama' / 'config.json').read_text())
    model = LlamaForCausalLM(LlamaConfig(**config))
    assert sum(weight.numel() for weight in model.parameters()) == scales.LLAMA


def test_a_setting_is_told_by_its_bags_or_is_not():
    assert bags(S4) == ('4', '0.3', 'sequence')
    assert bags(PHASES_BATCH) == ('8 4 2', '0.1 0.2 0.3', 'batch')
    others = [BASELINE, limited(S4), one_size(4, 0.3, expand='none'), one_size(4, 0.3, weighting='first')]
    assert [bags(setting) for setting in [*others, *questions.LONGER]] == [None] * 6


def tiny(dataset: Path, steps: int) -> Scale:
    """A scale of a few steps on the session's data."""
    return replace(
        scales.MPT_64,
        overrides=(
            *(f'max_seq_len={SEQ_LEN}', f'model.vocab_size={VOCAB_SIZE}', 'model.d_model=16'),
            *('global_train_batch_size=4', 'device_train_microbatch_size=4', 'eval_subset_num_batches=1'),
        ),
        steps=steps,
        rates=(1e-3,),
        data=str(dataset),
    )


def test_what_has_a_row_is_kept_and_what_lost_it_is_trained_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scale = tiny(dataset, 10)
    monkeypatch.setattr(questions, 'asked', lambda: [Ask(scale, (S4, phases((4, 0.2), (2, 0.4))), SEEDS[:2])])
    monkeypatch.setattr(run, 'write', lambda record: None)
    path, folder = tmp_path / 'runs.csv', tmp_path / 'runs'
    run.train('', 2, path, folder)
    trained = read(path).rows
    assert len(trained) == len(list(folder.iterdir())) == 6
    assert {row.steps for row in trained.values()} == {10}
    assert all(re.fullmatch(r'python==\S+ torch==\S+ text==\d+', row.versions) for row in trained.values())

    lost = trained[scale.name, S4.name, 18, 0.001]
    kept = {name: folder.stat().st_mtime_ns for name, folder in ((path.name, path) for path in folder.iterdir())}
    write(path, Record(row for row in trained.values() if row.key != lost.key))
    run.train('', 1, path, folder)
    again = read(path).rows
    assert again.keys() == trained.keys()
    assert {key: row for key, row in again.items() if key != lost.key} == {
        key: row for key, row in trained.items() if key != lost.key
    }
    assert again[lost.key].final_loss == lost.final_loss
    assert len([1 for name in kept if (folder / name).stat().st_mtime_ns != kept[name]]) == 1


@pytest.mark.faults
def test_a_killed_command_goes_on(dataset: Path, tmp_path: Path):
    """Killed outright in the midst of a run, and begun again: it ends as if it had not been."""
    script = tmp_path / 'evidence.py'
    script.write_text(
        'import sys\nfrom dataclasses import replace\nfrom pathlib import Path\n'
        'from tools.experiments import questions, run, scales\n'
        'from tools.experiments.settings import S4\n'
        'if __name__ == "__main__":\n'
        f'    scale = replace(scales.MPT_64, overrides={tiny(dataset, 160).overrides!r}, steps=160, rates=(1e-3,), '
        f'data={str(dataset)!r})\n'
        '    questions.asked = lambda: [questions.Ask(scale, (), (17,))]\n'
        '    run.write = lambda record: None\n'
        '    run.train("", 1, Path(sys.argv[1]) / "runs.csv", Path(sys.argv[1]) / "runs")\n'
    )
    environment = {**os.environ, 'PYTHONPATH': str(REPO)}

    def begin(folder: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, str(script), str(tmp_path / folder)], env=environment, cwd=REPO)

    killed = begin('killed')
    deadline = time.monotonic() + 300
    while not list((tmp_path / 'killed').glob('runs/*/checkpoints/ep*-ba40-*')):
        assert killed.poll() is None, 'it ended before it was killed'
        assert time.monotonic() < deadline, 'no checkpoint to go on from'
        time.sleep(0.05)
    trains = psutil.Process(killed.pid).children(recursive=True)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not psutil.wait_procs(trains, timeout=60)[1], 'a run trains on beside the one that takes its place'
    assert not (tmp_path / 'killed' / 'runs.csv').exists()
    for folder in ('killed', 'whole'):
        assert begin(folder).wait(timeout=300) == 0
    (gone_on,), (whole,) = (read(tmp_path / folder / 'runs.csv').rows.values() for folder in ('killed', 'whole'))
    assert gone_on.final_loss == whole.final_loss


def test_a_run_that_fails_is_told(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scale = replace(tiny(dataset, 10), overrides=('max_seq_len=nothing',))
    monkeypatch.setattr(questions, 'asked', lambda: [Ask(scale, (), (17,))])
    monkeypatch.setattr(run, 'write', lambda record: None)
    with pytest.raises(RuntimeError, match='ended without a result, exit code'):
        run.train('', 1, tmp_path / 'runs.csv', tmp_path / 'runs')


def test_a_scale_that_is_none_is_refused():
    with pytest.raises(typer.BadParameter, match='python-40 is no scale: choose python-1-1024, '):
        run.main('python-40')


def test_which_tokens_repeat():
    rows = torch.randint(0, 5, (20, 12))
    for row, marked in zip(rows.tolist(), copying.repeats(rows).tolist(), strict=True):
        for t in range(1, len(row)):
            earlier = any(row[j - 1 : j + 1] == row[t - 1 : t + 1] for j in range(1, t))
            assert marked[t - 1] == earlier


def test_copying_is_measured_once_of_each_judged_run_whose_checkpoint_is_kept(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    scale = replace(scales.PYTHON_40, data=str(dataset))
    monkeypatch.setattr(questions, 'BY_SIZE', {40: (scale,), 80: ()})
    kept, lost, worse = (Job(scale, BASELINE, *run) for run in ((17, 4e-3), (18, 4e-3), (17, 8e-3)))
    record = Record(row_of(scale, BASELINE, job.seed, job.rate, 3.0 + job.rate) for job in (kept, lost, worse))
    model = LlamaForCausalLM(LlamaConfig(**json.loads((REPO / copying.CONFIG / 'config.json').read_text())))
    for job in (kept, worse):
        checkpoint = tmp_path / train.name(job) / 'checkpoints' / f'ep0-ba{job.steps}-rank0.pt'
        checkpoint.parent.mkdir(parents=True)
        torch.save({'state': {'model': {f'model.{k}': v for k, v in model.state_dict().items()}}}, checkpoint)

    copying.measure(record, tmp_path, tmp_path / 'copying.csv')
    found = read_copying(tmp_path / 'copying.csv', record)
    assert [*found] == [kept.key]
    out = capsys.readouterr().out
    assert ', repeats ' in out
    assert f'{train.name(lost)}/checkpoints/ep0-ba{lost.steps}-rank0.pt is not there' in out
    tokens = copying.read_rows(dataset)
    everything, repeated, others = found[kept.key]
    assert everything == pytest.approx(float(model(input_ids=tokens, labels=tokens).loss), abs=1e-4)
    share = copying.repeats(tokens).float().mean()
    assert everything == pytest.approx(float(share * repeated + (1 - share) * others), abs=2e-4)

    copying.measure(record, tmp_path, tmp_path / 'copying.csv')
    assert ', repeats ' not in capsys.readouterr().out
    # A run that was trained again is another one.
    record.rows[kept.key] = row_of(scale, BASELINE, kept.seed, kept.rate, 2.9)
    assert not read_copying(tmp_path / 'copying.csv', record)
