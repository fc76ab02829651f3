"""tools/evidence.py: its sums against sums by hand, and a real run of it, tiny."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evidence
import pytest
import trainings
from composer.core import Time, Timestamp, TimeUnit
from conftest import SEQ_LEN, VOCAB_SIZE
from experiments import report
from experiments.settings import BASELINE, BASELINES, CPU, FINALISTS, PUBLISHED, Experiment, experiments, finals, phases
from experiments.training import Job, Result
from experiments.variants import RateOfItsOwn, WeightsByPhase
from trainers import logged, make_trainer, mpt, random_loader

from composer_tst import TokenSuperposition, WarmupStableDecayScheduler

assert trainings  # its server has imported what a run needs


def runs_of(losses: dict) -> report.Runs:
    """Runs at seeds 17, 18, ... with these final losses, by setting."""
    results = {
        Job(setting, 17 + i, 0.001, CPU): Result(loss, 100, 1000, 10, 1.0)
        for setting, each in losses.items()
        for i, loss in enumerate(each)
    }
    return report.Runs(results, 0.001, CPU)


def test_the_speed_up_is_read_between_baselines_with_schedules_of_their_own():
    one, more, twice = BASELINES
    runs = runs_of({one: [3.0, 3.0, 3.0], more: [2.9, 2.9, 2.9], twice: [2.8, 2.8, 2.8], PUBLISHED: [2.9, 2.95, 2.7]})
    # At the second baseline; half way to it in the logarithm, so that x / 1 = 1.5 / x; below all of them.
    (first, second, third) = report.speedups(runs, PUBLISHED)
    assert first == ('', pytest.approx(1.5))
    assert second == ('', pytest.approx(1.5**0.5))
    assert third == ('more than ', 2)
    assert '1.50, 1.22, more than 2.00 times at seeds 17, 18, 19.' in report.iso_loss(runs, PUBLISHED)


def test_a_setting_that_ends_above_the_baseline_has_no_speed_up():
    one, more, twice = BASELINES
    runs = runs_of({one: [3.0], more: [3.05], twice: [2.9], PUBLISHED: [3.02]})
    assert report.speedups(runs, PUBLISHED) == [('less than ', 1)]


def test_a_setting_wins_by_more_than_two_deviations_or_does_not():
    sure, unsure = phases((8, 0.1), (4, 0.2)), phases((4, 0.1), (2, 0.2))
    runs = runs_of({PUBLISHED: [3.0, 3.1, 3.2], sure: [2.9, 3.0, 3.08], unsure: [2.8, 3.1, 3.3]})
    # Differences -0.1, -0.1, -0.12: mean -0.1067, deviation 0.0115; and -0.2, 0, 0.1: mean -0.033, deviation 0.153.
    says = report.verdict(runs, [Experiment('Some', 'Which?', [PUBLISHED, sure, unsure], CPU.seeds)])
    assert f'{sure.name} ends 0.107 below the published recipe, by more than two' in says
    assert f'{unsure.name} ends 0.033 below the published recipe, which is within two' in says


def test_a_setting_that_diverged_at_a_seed_has_not_won():
    setting = phases((8, 0.1), (4, 0.2))
    runs = runs_of({PUBLISHED: [3.0, 3.1, 3.2], setting: [2.9, float('inf'), 3.1]})
    says = report.verdict(runs, [Experiment('Some', 'Which?', [PUBLISHED, setting], CPU.seeds)])
    assert says == f'- {setting.name}: a run diverged (seeds 17, 18, 19).'


def test_the_best_at_one_seed_are_judged_at_others():
    settings = [setting for experiment in experiments(CPU) for setting in experiment.settings]
    losses = {setting: 3.0 + i / 100 for i, setting in enumerate(dict.fromkeys(settings))}
    best = finals(CPU, losses)
    assert len(best.settings) == 2 + FINALISTS
    assert max(losses[setting] for setting in best.settings[2:]) <= min(
        loss for setting, loss in losses.items() if setting.algorithm and setting not in best.settings
    )
    assert CPU.seeds[0] not in best.seeds
    # What the others say of them: at seed 17, better by far; at 18 and 19 no better.
    chosen = best.settings[2]
    runs = runs_of({PUBLISHED: [3.0, 3.0, 3.01], chosen: [1.0, 3.01, 3.0]})
    assert 'which is within two' in report.verdict(runs, [best])
    # Also if it was run at three seeds before.
    before = Experiment('Some', 'Which?', [PUBLISHED, chosen], CPU.seeds)
    runs.results[Job(PUBLISHED, 20, 0.001, CPU)] = runs.results[Job(chosen, 20, 0.001, CPU)] = Result(
        3, 100, 1000, 10, 1
    )
    assert f'seeds {", ".join(map(str, CPU.fresh_seeds))})' in report.verdict(runs, [before, best])


def test_the_page_of_every_experiment_also_with_a_run_that_diverged(tmp_path: Path):
    done = experiments(CPU)
    settings = list(dict.fromkeys(setting for experiment in done for setting in experiment.settings))
    runs = runs_of({setting: [3.0 + i / 100, 3.1, 3.2] for i, setting in enumerate(settings)})
    diverged = next(setting for setting in done[0].settings if setting.algorithm)
    runs.results[Job(diverged, 18, 0.001, CPU)] = Result(float('inf'), 100, 1000, 10, 1.0)
    page = tmp_path / 'evidence.md'
    report.write(page, runs, done[:-1], done[-1:])
    assert f'Not run yet: {done[-1].title}.' in page.read_text()
    report.write(page, runs, done)
    text = page.read_text()
    assert 'Not run yet' not in text
    listed = [setting for experiment in done if experiment.form != 'grid' for setting in experiment.settings]
    assert all(f'| {setting.name} |' in text for setting in listed)
    assert f'| {diverged.name} | 3 | diverged |' in text
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
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    monkeypatch.setitem(evidence.SCALES, 'cpu', tiny)
    page, results = tmp_path / 'docs' / 'evidence.md', tmp_path / 'runs' / 'cpu'
    evidence.main(dataset, 'cpu', tmp_path / 'runs', page)
    files = sorted(results.glob('*.json'))
    assert len(files) == 3
    times = [file.stat().st_mtime_ns for file in files]
    # At s = 4, 3 steps of 4 loader batches and 7 of one; a batch has 4 rows.
    (published,) = results.glob('s-4-r-0.3-lr-0.001-seed-17-*.json')
    assert json.loads(published.read_text())['data_tokens'] == 19 * 4 * SEQ_LEN
    assert '| s = 4, r = 0.3 | 1 |' in page.read_text()

    more = replace(tiny, seeds=(17, 18))
    monkeypatch.setitem(evidence.SCALES, 'cpu', more)
    evidence.main(dataset, 'cpu', tmp_path / 'runs', page)
    assert len(list(results.glob('*.json'))) == 6
    assert [file.stat().st_mtime_ns for file in files] == times
    assert '| s = 4, r = 0.3 | 2 |' in page.read_text()
    assert (page.parent / 'evidence_settings.png').stat().st_size > 1000

    baseline = Job(BASELINE, 17, 0.001, tiny)
    assert (results / f'{baseline.name(dataset)}.json').exists()
    assert not (results / f'{replace(baseline, scale=replace(tiny, warmup=3)).name(dataset)}.json').exists()
