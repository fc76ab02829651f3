"""tools/experiments/run.py: its sums against sums by hand, and a real run of it, tiny."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from common import REPO, SEQ_LEN, VOCAB_SIZE, runs
from common.trainers import logged, make_trainer, mpt, random_loader
from composer.core import Time, Timestamp, TimeUnit
from transformers import LlamaConfig, LlamaForCausalLM

from composer_tst import TokenSuperposition, WarmupStableDecayScheduler
from composer_tst.cli.plan.measured import read_measured
from tools.experiments import budgets, budgets_page, pictures, report
from tools.experiments import run as evidence
from tools.experiments.page import write
from tools.experiments.report import Runs
from tools.experiments.scales import (
    BASELINE,
    BASELINES,
    COARSE_TO_FINE,
    CPU,
    FINALISTS,
    GPU,
    GRID_BAGS,
    GRID_SHARES,
    PHASES_BATCH,
    PUBLISHED,
    S4,
    Experiment,
    Scale,
    beyond,
    experiments,
    limited,
    one_size,
    phases,
)
from tools.experiments.train import Job, Result
from tools.experiments.variants import RateOfItsOwn, WeightsByPhase

pytestmark = pytest.mark.streaming

assert runs  # its server has imported what a run needs


def runs_of(losses: dict, scale: Scale = CPU) -> report.Runs:
    """Runs at seeds 17, 18, ... with these final losses, by setting."""
    results = {
        Job(setting, 17 + i, 0.001, scale): Result(loss, 100, 1000, 10, 1.0, 'a machine')
        for setting, each in losses.items()
        for i, loss in enumerate(each)
    }
    return report.Runs(results, scale)


def test_the_speed_up_is_read_between_baselines_with_schedules_of_their_own():
    one, more, twice = BASELINES
    runs = runs_of({one: [3.0, 3.2], more: [2.9, 3.1], twice: [2.8, 3.0], S4: [2.9, 3.15]})
    # At the second baseline; half way to it in the logarithm, so that x / 1 = 1.5 / x; below all of them; above.
    assert report.speed_up(runs, -0.1) == ('', pytest.approx(1.5))
    assert report.speed_up(runs, -0.05) == ('', pytest.approx(1.5**0.5))
    assert report.speed_up(runs, -0.3) == ('more than ', 2)
    assert report.speed_up(runs, 0.02) == ('less than ', 1)
    # Differences -0.1 and -0.05: mean -0.075, deviation 0.0354; 1.5 ** 0.75, 1.5 ** 0.396 and 1.5 * (4 / 3) ** 0.104.
    assert report.iso_loss(runs, S4) == f'- {S4.name}: 1.36, from 1.17 to 1.55 times.'


def test_a_setting_that_ends_above_the_baseline_has_no_speed_up():
    one, more, twice = BASELINES
    runs = runs_of({one: [3.0], more: [3.05], twice: [2.9], S4: [3.02]})
    assert report.iso_loss(runs, S4) == f'- {S4.name}: less than 1.00 times.'
    assert report.iso_loss(runs, phases((8, 0.1), (4, 0.2))) == ''


def test_a_setting_wins_by_more_than_two_deviations_or_does_not():
    sure, unsure = phases((8, 0.1), (4, 0.2)), phases((4, 0.1), (2, 0.2))
    losses = {BASELINE: [3.0, 3.1, 3.1], S4: [3.0, 3.1, 3.2], sure: [2.9, 3.0, 3.08], unsure: [2.8, 3.1, 3.33]}
    # Differences -0.1, -0.1, -0.12: mean -0.1067, deviation 0.0115; and -0.2, 0, 0.13: mean -0.0233, deviation 0.1662.
    says = report.verdict(runs_of(losses), [Experiment('Some', 'Which?', list(losses), CPU.seeds)])
    assert f'standard deviations: {sure.name}, -0.107 ± 0.012.\n' in says
    # From the baseline -0.1, -0.1, -0.02 and -0.2, 0, 0.23; bags of 4 0, 0, 0.1.
    assert f'| {sure.name} | 17-19 | -0.073 ± 0.046 |  | **-0.107 ± 0.012** |  |\n' in says
    assert f'| {unsure.name} | 17-19 | +0.010 ± 0.215 |  | -0.023 ± 0.166 |  |' in says
    assert f'| {S4.name} | 17-19 | +0.033 ± 0.058 |  |  |  |\n' in says
    # The setting that is recommended, and the same differences from it.
    losses = {BASELINE: [3.5] * 3, PHASES_BATCH: [3.0, 3.1, 3.2], sure: losses[sure]}
    says = report.verdict(runs_of(losses), [Experiment('Some', 'Which?', list(losses), CPU.seeds)])
    assert says.splitlines()[-1].endswith('|  | **-0.107 ± 0.012** |')


def test_a_setting_is_judged_by_most_of_its_seeds():
    runs = runs_of({BASELINE: [3.0] * 6, S4: [2.9, 2.8, 2.9, 2.7, 2.6, 2.7]})
    few, most = (Experiment('Some', 'Which?', [S4], seeds) for seeds in (CPU.seeds, (*CPU.seeds, *CPU.fresh_seeds)))
    for order in ([few, most], [most, few]):
        assert f'| {S4.name} | 17-22 | -0.233 ± 0.121 |' in report.verdict(runs, order)


def test_nothing_is_sure_of_the_published_recipe_at_fewer_than_three_seeds():
    setting = phases((8, 0.1), (4, 0.2))
    losses = {BASELINE: [3.0] * 5, PUBLISHED: [2.9, 2.91], setting: [2.5, 2.5, 2.51, 2.5, 2.49]}
    says = report.verdict(runs_of(losses), [Experiment('Some', 'Which?', [setting], (17, 18, 19, 20, 21))])
    assert f'| {setting.name} | 17-21 | **-0.500 ± 0.007** | -0.405 ± 0.007 (2) |  |  |' in says
    assert 'Below the published s = 6 with r = 0.3, by more than two standard deviations: nothing.' in says
    losses[PUBLISHED] += [2.9]
    says = report.verdict(runs_of(losses), [Experiment('Some', 'Which?', [setting], (17, 18, 19, 20, 21))])
    assert f'two standard deviations: {setting.name}, -0.400 ± 0.010 (3).' in says


def test_only_what_was_run_at_three_seeds_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[str] = []
    monkeypatch.setattr(pictures.Figure, 'savefig', lambda figure, path: drawn.extend(
        label.get_text() for label in figure.axes[0].get_yticklabels()
    ))  # fmt: skip
    losses = {BASELINE: [3.0] * 3, PUBLISHED: [2.9] * 3, S4: [2.8, 2.8], PHASES_BATCH: [2.7, 2.6, 2.7]}
    pictures.draw_settings(runs_of(losses), list(losses), tmp_path / 'x.png')
    assert drawn == [f'published recipe: {PUBLISHED.name}', f'phases with batch: {PHASES_BATCH.name}']


def test_a_setting_that_diverged_at_a_seed_has_not_won():
    setting = phases((8, 0.1), (4, 0.2))
    runs = runs_of({BASELINE: [3.0], S4: [3.0, 3.1, 3.2], setting: [2.9, float('inf'), 3.1]})
    says = report.verdict(runs, [Experiment('Some', 'Which?', [S4, setting], CPU.seeds)])
    assert says.count('by more than two standard deviations: nothing.') == 2
    assert f'| {setting.name} | 17-19 | -0.100 (1) |  | diverged |' in says


def test_the_best_beyond_the_paper_are_judged_at_other_seeds():
    losses = {setting: 3.0 + i / 100 for i, setting in enumerate(reversed(beyond()))}
    assert len(experiments(CPU, dict(list(losses.items())[1:]))) == len(experiments(CPU))
    (best,) = [each for each in experiments(CPU, losses) if each not in experiments(CPU)]
    assert best.settings[:3] == [BASELINE, S4, COARSE_TO_FINE]
    assert len(best.settings) == 3 + FINALISTS
    assert max(losses[setting] for setting in best.settings[3:]) <= min(
        loss
        for setting, loss in losses.items()
        if setting.algorithm and setting not in (*best.settings, COARSE_TO_FINE)
    )
    assert not set(CPU.seeds) & set(best.seeds)
    # What the others say of them: at seeds 17 to 19, better by far; at 20, 21 and 22 no better. Also if judged before.
    chosen = best.settings[3]
    no_better = {S4: [3.0, 3.0, 3.0, 3.0, 3.01, 3.0], chosen: [1.0, 1.0, 1.0, 3.01, 3.0, 3.0]}
    runs = runs_of({BASELINE: [3.0], **no_better})
    before = Experiment('Some', 'Which?', [S4, chosen], CPU.seeds)
    assert f'| {chosen.name} | 20-22 |  |  | +0.000 ± 0.010 |' in report.verdict(runs, [before, best])


def test_the_grid_says_where_it_is_lowest():
    runs = runs_of({BASELINE: [3.0, 3.1], one_size(6, 0.2): [2.9, 3.02], one_size(2, 0.5): [3.2]})
    rows = report.grid(runs, GRID_BAGS, GRID_SHARES, CPU.seeds).splitlines()
    assert '| 0.2 | not run | not run | not run | -0.090 ± 0.014 (2) | not run |  |' in rows
    assert '| 0.5 | +0.200 (1) | not run | not run | not run | not run |  |' in rows
    assert rows[-1].endswith('Lowest: s = 6, r = 0.2, at -0.090.')


def test_the_means_of_the_grid_are_over_seeds_at_which_all_of_it_was_run():
    losses = {one_size(s, 0.2): [3.0 + s / 10, 3.1] for s in GRID_BAGS}
    losses[one_size(2, 0.2)] = [3.2, 3.6, 1.0]
    rows = report.grid(runs_of({BASELINE: [3.0, 3.1, 3.1], **losses}), GRID_BAGS, GRID_SHARES, CPU.seeds).splitlines()
    # 0.2, 0.3, 0.4, 0.6, 0.8 at one seed, mean 0.46; 0.5 and four times 0 at the other, mean 0.1.
    assert any(row.startswith('| 0.2 |') and row.endswith('| +0.280 ± 0.255 |') for row in rows)
    losses = {one_size(3, r): [3.0 + r] for r in GRID_SHARES}
    rows = report.grid(runs_of({BASELINE: [3.0], **losses}), GRID_BAGS, GRID_SHARES, CPU.seeds).splitlines()
    assert '| mean |  | +0.300 |  |  |  |  |' in rows


def test_the_page_of_every_experiment_also_with_a_run_that_diverged(tmp_path: Path):
    planned = experiments(CPU)
    settings = list(dict.fromkeys(setting for experiment in planned for setting in experiment.settings))
    losses = {setting: [3.0 + i / 100, 3.1, 3.2] for i, setting in enumerate(settings)}
    diverged = next(setting for setting in planned[0].settings if setting.algorithm)
    losses[diverged][1] = float('inf')
    page = tmp_path / 'evidence.md'
    (grid,) = [experiment for experiment in planned if experiment.form == 'grid']
    write(page, [runs_of({s: losses[s] for s in settings if s not in grid.settings or s in planned[0].settings})])
    assert (
        'Not run yet, or not at every seed: Coarse to fine; The best of these, again; Coarse to fine, in rows of their '
        f'own; The best of the map, again; {grid.title}.' in page.read_text()
    )
    assert f'## {grid.title}' not in page.read_text()
    at_more_seeds = [e for e in experiments(CPU, runs_of(losses).at_first_seed()) if not set(e.seeds) <= set(CPU.seeds)]
    for setting in {setting for experiment in at_more_seeds for setting in experiment.settings}:
        losses[setting] += [3.0, 3.0, 3.0]
    write(page, [runs_of(losses), runs_of({BASELINE: [2.5, 2.6, 2.7]}, GPU)])
    text = page.read_text()
    assert 'Not run yet' not in text
    listed = [setting for experiment in planned if experiment.form != 'grid' for setting in experiment.settings]
    assert all(f'| {setting.name} |' in text for setting in listed)
    assert f'| {diverged.name} | 17-19 | diverged |' in text
    assert '| gpu: final loss, minus baseline |' in text
    assert '| 2.600 ± 0.100, +0.000 ± 0.000 |' in text
    assert all((tmp_path / f'evidence_{name}.png').stat().st_size > 1000 for name in ('settings', 'grid'))


def test_a_learning_rate_of_its_own_while_superposed():
    given: dict[str, Any] = {'t_warmup': '10ba', 't_decay': '0.1dur'}
    plain = WarmupStableDecayScheduler(**given)
    half, again = RateOfItsOwn(0.3, factor=0.5, **given), RateOfItsOwn(0.3, rewarm=0.05, **given)
    for batch in range(101):
        state: Any = SimpleNamespace(max_duration=Time.from_batch(100), timestamp=Timestamp(batch=batch))
        state.get_elapsed_duration = lambda batch=batch: Time(batch / 100, TimeUnit.DURATION)
        rate = plain(state)
        assert half(state) == rate * (0.5 if batch < 30 else 1)
        assert again(state) == pytest.approx(rate * ((batch - 30) / 5 if 30 <= batch < 35 else 1))


def test_weights_that_change_from_phase_to_phase():
    phases = [{'bag_size': 2, 'until': '2ba'}, {'bag_size': 2, 'until': '4ba'}]
    losses = []
    for algorithm in (
        TokenSuperposition(phases=phases, weighting='first'),
        WeightsByPhase(['first', 'first'], phases=phases),
        WeightsByPhase(['first', 'uniform'], phases=phases),
    ):
        trainer, logger = make_trainer(mpt(), random_loader(), algorithm, '5ba')
        trainer.fit()
        losses.append(logged(logger, 'loss/train/total'))
    plain, same, changed = losses
    assert same == plain
    assert changed[:2] == plain[:2]
    assert changed[2] != plain[2]


def test_every_run_has_a_name_of_its_own(dataset: Path):
    jobs = {Job(s, seed, 0.001, CPU) for e in experiments(CPU) for s in e.settings for seed in CPU.seeds}
    assert len({job.name(dataset) for job in jobs}) == len(jobs)


def test_what_is_finished_is_kept_and_what_changed_is_trained_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tiny = replace(
        CPU,
        overrides=(
            *(f'max_seq_len={SEQ_LEN}', f'model.vocab_size={VOCAB_SIZE}', 'model.d_model=16'),
            *('global_train_batch_size=4', 'device_train_microbatch_size=4', 'eval_subset_num_batches=1'),
        ),
        steps=10,
        warmup=2,
        seeds=(17,),
        learning_rates=(1e-3,),
        fresh_seeds=(),
    )
    monkeypatch.setitem(evidence.GROUPS, 'cpu', replace(evidence.GROUPS['cpu'], scales=(tiny,)))
    page, results = tmp_path / 'docs' / 'evidence_mpt.md', tmp_path / 'runs' / 'cpu'
    evidence.main('cpu', dataset, tmp_path / 'runs', page.parent)
    files = sorted(results.glob('*.json'))
    assert len(files) == 6
    assert len([path for path in results.iterdir() if path.is_dir()]) == 6  # what a training leaves, see the end
    times = [file.stat().st_mtime_ns for file in files]
    # At s = 4, 3 steps of 4 loader batches and 7 of one; a batch has 4 rows.
    (published,) = results.glob('s-4-r-0.3-lr-0.001-seed-17-*.json')
    assert json.loads(published.read_text())['data_tokens'] == 19 * 4 * SEQ_LEN
    assert '| s = 4, r = 0.3 | 17 |' in page.read_text()

    more = replace(tiny, seeds=(17, 18))
    monkeypatch.setitem(evidence.GROUPS, 'cpu', replace(evidence.GROUPS['cpu'], scales=(more,)))
    evidence.main('cpu', dataset, tmp_path / 'runs', page.parent)
    assert len(list(results.glob('*.json'))) == 12
    assert [file.stat().st_mtime_ns for file in files] == times
    assert '| s = 4, r = 0.3 | 17-18 |' in page.read_text()

    capsys.readouterr()
    monkeypatch.setitem(evidence.GROUPS, 'cpu', replace(evidence.GROUPS['cpu'], scales=(tiny,)))
    evidence.main('cpu', dataset, tmp_path / 'runs', page.parent)
    assert 'evidence_cpu.json loses 6 runs, ' in capsys.readouterr().err
    assert (page.parent / 'evidence_mpt_settings.png').stat().st_size > 1000

    baseline = Job(BASELINE, 17, 0.001, tiny)
    assert (results / f'{baseline.name(dataset)}.json').exists()
    assert not (results / f'{replace(baseline, scale=replace(tiny, warmup=3)).name(dataset)}.json').exists()

    # Elsewhere, where the record is all that is known.
    record, text = page.with_name('evidence_cpu.json'), page.read_text()
    elsewhere = tmp_path / 'elsewhere'
    evidence.main('cpu', dataset, elsewhere / 'runs', elsewhere / 'docs', known=record)
    assert (elsewhere / 'docs' / 'evidence_mpt.md').read_text() == text
    assert not [path for path in (elsewhere / 'runs' / 'cpu').iterdir() if path.is_dir()], 'something was trained'


def test_the_page_over_budgets(tmp_path: Path):
    losses = {setting: [3.0 - i / 100, 3.1 - i / 50, 3.2] for i, setting in enumerate(budgets.RECIPES)}
    small, large = budgets.BUDGETS[0], budgets.LARGEST
    grid = next(e for e in budgets.of_budget(large) if e.form == 'grid')
    at_one_seed = {setting: [3.1] for setting in grid.settings if setting not in losses}
    none = one_size(4, 0.3, expand='none')
    limits = {limited(BASELINE): [3.0, 3.1], limited(S4): [3.2, 3.2]}
    scales = [runs_of(losses, small), runs_of({**losses, **at_one_seed, none: [3.0], **limits}, large)]
    checked = Job(S4, 17, 0.004, large)
    scales[1].results[checked] = Result(3.25, 100, 1000, 10, 1.0, 'a machine')
    budgets_page.write(tmp_path / 'evidence.md', scales)
    text = (tmp_path / 'evidence.md').read_text()
    # Differences of the second recipe: -0.01, -0.02, 0.
    assert '| 0.99 | 350 | `tokens-1` | 3.100 ± 0.100 | -0.010 ± 0.010 |' in text
    assert '| 20 | 7,100 | `tokens-20` | 3.100 ± 0.100 | -0.010 ± 0.010 |' in text
    # Of the baseline one rate; at 17 it ends at 3.
    assert f'- {S4.name}: 0.001: 2.990, 0.004: 3.250' in text
    assert '| 0.1 | +0.100 (1) |' in text
    # More than on the data that the baseline reads once; and a share of its operations.
    assert f'| {limited(S4).name} | 17-18 | 3.200 ± 0.000 | +0.150 ± 0.071 |' in text
    assert f'| {none.name} | 17 | 3.000 | +0.000 | +0.020 | +0.010 | 0.00M | 0.775 |' in text
    missing = ['The gain (`tokens-1`)', 'Learning rates (`tokens-1`)']
    missing += ['The gain (`tokens-20`)', 'Cheaper (`tokens-20`)', 'Better (`tokens-20`)']
    missing += ['Limited data (`tokens-20`)', 'Learning rates (`tokens-20`)']
    assert f'Not run yet, or not at every seed: {"; ".join(missing)}.' in text
    assert f'| {S4.name} | 0.001 | 2.990 | 3.080 | 3.200 |' in text
    assert (tmp_path / 'evidence_budgets.png').stat().st_size > 1000


def test_larger_steps_are_compared_at_the_seeds_of_both():
    small = runs_of({BASELINE: [3.0, 3.1, 3.2], S4: [2.9, 3.0, 3.1]}, budgets.LARGEST)
    large = runs_of({BASELINE: [2.8, 2.9, 3.1], S4: [2.9, 2.9]}, budgets.LARGE_STEPS)
    *_, lines = budgets_page.size_of_steps([small, large])
    # The baseline by -0.2, -0.2 and -0.1; s = 4 by 0 and -0.1; against s = 4 in smaller steps -0.1, -0.1 and 0.
    assert lines.splitlines()[2:4] == [
        '| baseline | 3.100 ± 0.100 | 2.933 ± 0.153 | **-0.167 ± 0.058** | **-0.167 ± 0.058** |',
        f'| {S4.name} | 3.000 ± 0.100 | 2.900 ± 0.000 | -0.050 ± 0.071 (2) | -0.067 ± 0.058 |',
    ]
    assert budgets_page.size_of_steps([small]) == []


def test_the_best_of_both_maps_are_judged_at_fresh_seeds():
    maps = [e for e in budgets.of_budget(budgets.LARGEST) if len(e.seeds) == 1]
    losses = {setting: 3.0 for e in maps for setting in e.settings}
    of_grid, of_others = one_size(2, 0.4), one_size(6, 0.05)
    losses |= {S4: 2.0, of_grid: 2.5, of_others: 2.6, budgets.PHASES_BATCH: 2.7}
    final = budgets.of_budget(budgets.LARGEST, losses)[-1]
    # The three recipes beside, and the best two that are none of these.
    assert final.settings == [BASELINE, S4, PUBLISHED, of_grid, of_others]
    assert final.seeds == budgets.FRESH_SEEDS
    del losses[one_size(8, 0.1)]
    assert 'again' not in budgets.of_budget(budgets.LARGEST, losses)[-1].title, 'chosen before all have run'


def test_the_page_over_budgets_shows_a_run_that_diverged(tmp_path: Path):
    runs = runs_of({BASELINE: [3.0, 3.1, 3.2], S4: [3.0, float('inf'), 3.0]}, budgets.BUDGETS[0])
    budgets_page.write(tmp_path / 'evidence.md', [runs])
    assert '| 0.99 | 350 | `tokens-1` | 3.100 ± 0.100 | diverged |' in (tmp_path / 'evidence.md').read_text()


def test_rates_say_what_differs_at_the_best_of_each():
    runs = runs_of({BASELINE: [3.0]}, budgets.BUDGETS[0])
    for setting, lr, loss in ((BASELINE, 0.002, 2.8), (BASELINE, 0.004, 2.9), (S4, 0.002, 2.9), (S4, 0.004, 2.7)):
        runs.results[Job(setting, 17, lr, runs.scale)] = Result(loss, 100, 1000, 10, 1.0, 'a machine')
    assert budgets_page.rates(runs).splitlines()[2:] == [
        '- baseline: 0.001: 3.000, 0.002: 2.800, 0.004: 2.900',
        f'- {S4.name}: 0.002: 2.900, 0.004: 2.700; minus the baseline +0.100 at its best rate, -0.100 each at its own; '
        'lowest at the edge',
    ]


def test_a_rate_is_tuned_until_its_lowest_loss_is_not_at_an_edge():
    scale = budgets.BUDGETS[1]

    def asked(rates: dict[float, float]) -> set[tuple[int, float]]:
        """Seeds and rates that are still to be run of s = 4, given its losses at seed 17."""
        runs = Runs({}, scale)
        for setting, losses in ((BASELINE, {0.001: 2.9, 0.002: 2.8, 0.004: 2.6, 0.008: 2.7}), (S4, rates)):
            for lr, loss in losses.items():
                runs.results[Job(setting, 17, lr, scale)] = Result(loss, 100, 1000, 10, 1.0, 'a machine')
        return {(job.seed, job.lr) for job in set(budgets.checks(runs, (S4,))) - runs.results.keys()}

    beside = {0.002: 2.9, 0.004: 2.8, 0.008: 2.85}
    assert asked({}) == {(17, 0.002), (17, 0.004), (17, 0.008)}
    assert asked(beside) == set()
    assert asked(beside | {0.002: 2.7}) == {(17, 0.001)}
    assert asked(beside | {0.002: 2.7, 0.001: 2.75}) == {(18, 0.002), (19, 0.002)}
    # At the last there is, where nothing is left to try; and a run that diverged is not the lowest.
    assert asked(beside | {0.002: 2.7, 0.001: 2.65}) == {(18, 0.001), (19, 0.001)}
    assert asked(beside | {0.008: 2.7}) == {(18, 0.008), (19, 0.008)}
    assert asked(beside | {0.002: float('inf')}) == set()


def test_the_table_at_own_rates_is_against_the_baseline_at_its_own():
    scale = budgets.BUDGETS[1]
    runs = runs_of({BASELINE: [3.0, 3.1, 3.2], S4: [3.3, 3.3, 3.3], PUBLISHED: [3.1]}, scale)
    for seed, loss in ((17, 2.9), (18, 3.0), (19, 3.2)):
        runs.results[Job(S4, seed, 0.002, scale)] = Result(loss, 100, 1000, 10, 1.0, 'a machine')
    runs.results[Job(BASELINE, 17, 0.002, scale)] = Result(3.05, 100, 1000, 10, 1.0, 'a machine')
    runs.results[Job(PUBLISHED, 17, 0.002, scale)] = Result(3.2, 100, 1000, 10, 1.0, 'a machine')
    # Of s = 4: -0.1, -0.1 and 0 at 0.002. s = 6 is best at the baseline's rate, and was run at one seed.
    assert budgets_page.own_rates_table([runs]).splitlines()[-1] == (
        '| 5.1 | 1,800 | `tokens-5` | -0.067 ± 0.058 [0.002] | +0.100 (1) |  |'
    )


def test_other_data_need_a_page_of_their_own(dataset: Path):
    for docs in (evidence.DOCS, evidence.DOCS.resolve()):
        with pytest.raises(typer.BadParameter, match='give --docs'):
            evidence.main('tokens', dataset, docs=docs)
    scales = budgets.on(Path('some/folder'))
    assert len(scales) == len(budgets.BUDGETS)
    assert all(scale.data == 'some/folder' and '`folder`' in scale.about for scale in scales)


def test_other_text_than_the_records_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stats = {'splits': {'train': {'tokens': 100}, 'limited': {'rows': 56_799}}}
    (tmp_path / 'stats.json').write_text(json.dumps(stats))
    monkeypatch.setitem(budgets.RECORDED, str(tmp_path), 90)
    assert f'{tmp_path} has 100 tokens to train on, that of the record 90' in budgets.other_text(tmp_path)
    monkeypatch.setitem(budgets.RECORDED, str(tmp_path), 100)
    assert budgets.other_text(tmp_path) == budgets.other_text(tmp_path / 'nowhere') == ''
    # 7,100 steps of 8 rows.
    assert 'of 56,799 rows, and a baseline reads 56,800' in budgets.too_short(tmp_path, budgets.LARGEST)
    stats['splits']['limited']['rows'] += 1
    (tmp_path / 'stats.json').write_text(json.dumps(stats))
    assert budgets.too_short(tmp_path, budgets.LARGEST) == ''
    del stats['splits']['limited']
    (tmp_path / 'stats.json').write_text(json.dumps(stats))
    assert 'has no split `limited`, and a baseline reads 56,800 rows' in budgets.too_short(tmp_path, budgets.LARGEST)
    # Bags of 8 for 0.4 read 3.8 times as many.
    stats['splits']['train']['rows'] = 215_839
    (tmp_path / 'stats.json').write_text(json.dumps(stats))
    assert 'has 215,839 rows to train on, and the longest run reads 215,840' in budgets.read_twice(tmp_path)
    stats['splits']['train']['rows'] += 1
    (tmp_path / 'stats.json').write_text(json.dumps(stats))
    assert budgets.read_twice(tmp_path) == ''
    # On the page, of which runs it is.
    scale = budgets.BUDGETS[0]
    runs = runs_of({BASELINE: [3.0, 3.1]}, scale)
    assert 'Of text that was made anew' not in budgets_page.about_data([runs])
    job = Job(BASELINE, 18, runs.lr, scale)
    runs.results[job] = replace(runs.results[job], text=100)
    assert f'baseline, {job.lr:g}, seed 18 (`tokens-1`, 100 tokens)' in budgets_page.about_data([runs])


def test_options_that_name_nothing_are_refused(tmp_path: Path):
    with pytest.raises(typer.BadParameter, match='is no file'):
        evidence.main('tokens', known=tmp_path / 'typo.json')
    with pytest.raises(typer.BadParameter, match='stats.json is missing'):
        evidence.main('tokens', tmp_path / 'nowhere', docs=tmp_path)


def test_a_budget_is_what_it_says():
    assert [round(scale.tokens_per_parameter or 0, 2) for scale in budgets.BUDGETS] == [0.99, 5.08, 20.04, 20.04]
    config = json.loads((REPO / 'yamls' / 'evidence' / 'llama' / 'config.json').read_text())
    model = LlamaForCausalLM(LlamaConfig(**config))
    assert sum(weight.numel() for weight in model.parameters()) == budgets.PARAMETERS


def test_what_was_measured_is_written_for_the_planner(tmp_path: Path):
    losses = {BASELINE: [3.0, 3.1, 3.2], S4: [2.98, 3.09, 3.2], PUBLISHED: [3.0, 3.0]}
    others = [limited(S4), one_size(4, 0.3, expand='none'), one_size(4, 0.3, weighting='first')]
    losses |= {setting: [3.0, 3.0, 3.0] for setting in others} | {budgets.PHASES_BATCH: [2.9, 3.0, 3.1]}
    budgets_page.write_measured(tmp_path / 'measured.csv', [runs_of(losses, budgets.BUDGETS[1])])
    # Not the one that was not run at every seed, nor what more than bags, shares and `expand` tells, or costs less.
    assert (tmp_path / 'measured.csv').read_text().splitlines() == [
        'text,parameters,tokens_per_parameter,steps,bag_sizes,ends,expand,seeds,change,deviation',
        'Python source,362816,5.08,1800,4,0.3,sequence,3,-0.0100,0.0100',
        'Python source,362816,5.08,1800,8 4 2,0.1 0.2 0.3,batch,3,-0.1000,0.0000',
    ]


def test_the_planner_reads_what_the_record_says(tmp_path: Path):
    """The file in the wheel is written with the record, and so must be committed with it."""
    trained = {scale.name: Runs({}, scale) for scale in evidence.GROUPS['tokens'].scales}
    asked = [e for scale in trained for e in budgets.of_budget(trained[scale].scale)]
    settings = {setting.name: setting for e in asked for setting in e.settings}
    for run in json.loads((REPO / 'docs' / 'evidence_tokens.json').read_text()):
        if run['setting'] in settings:
            of = trained[run['scale']]
            of.results[Job(settings[run['setting']], run['seed'], run['lr'], of.scale)] = Result(**run['result'])
    budgets_page.write_measured(tmp_path / 'measured.csv', [runs for runs in trained.values() if runs.rates()])
    written = (REPO / 'composer_tst/cli/plan/losses/small_llama.csv').read_text()
    assert written == (tmp_path / 'measured.csv').read_text()
    assert len(read_measured()) == len(written.splitlines()) - 1
