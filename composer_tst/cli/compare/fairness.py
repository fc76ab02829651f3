"""What keeps the numbers of two runs from being compared, said in sentences."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import numpy as np

from composer_tst.cli.compare.runs import Run, label_of

MARK = '(!)'
# Positions of the model a step: within this share of each other they are the same, for an epoch's last step is smaller.
SAME = 0.02


def remarks(baseline: Run, run: Run) -> list[str]:
    """Why a run's loss may not be set beside the baseline's; nothing where it may."""
    found = []
    if run.final_step != baseline.final_step:
        found.append(
            f'{run.name} was last evaluated at step {run.final_step:,} and {baseline.name} at {baseline.final_step:,}: '
            'the difference is not one at equal steps.'
        )
    for each in (baseline, run):
        if each.trained_steps > each.final_step:
            found.append(
                f'{each.name} was trained until step {each.trained_steps:,} and last evaluated at {each.final_step:,}: '
                'its loss is not that of a finished run.'
            )
    if run.superposed and run.bag_size_at(run.final_step - 1) > 1:
        found.append(f'{run.name} was last evaluated while superposed: it has had no recovery.')
    if not run.superposed:
        found.append(f'{run.name} has no bags: it is a plain run, and says nothing of superposition.')
    return found + [why for is_same, why in _circumstances(baseline, run).values() if is_same is False]


def what_is_known(baseline: Run, run: Run) -> str:
    """Which circumstances of two runs are the same by their event files, and which are not known."""
    parts: dict[str, list[str]] = {'the same': [], 'other': [], 'not known': []}
    for name, (is_same, _) in _circumstances(baseline, run).items():
        parts['not known' if is_same is None else 'the same' if is_same else 'other'].append(name)
    said = '; '.join(f'{how}: {", ".join(names)}' for how, names in parts.items() if names)
    return f'{run.name} beside {baseline.name}: {said}'


def _circumstances(baseline: Run, run: Run) -> dict[str, tuple[bool | None, str]]:
    """Whether data, batch, learning rate and eval set are the same, None if not known; and what to say if not."""
    two = f'{run.name} and {baseline.name}'
    data = _same_setting(baseline, run, 'train_loader')
    rate, where = _same_rate(baseline, run)
    if run.measured != baseline.measured:
        mine, theirs = label_of(run.measured), label_of(baseline.measured)
        evaluated, on = False, f'{run.name} was evaluated on {mine} and {baseline.name} on {theirs}'
    else:
        parts = [each.settings.get('eval_subset_num_batches') for each in (baseline, run)]
        evaluated = _same_setting(baseline, run, 'eval_loaders' if 'eval_loaders' in run.settings else 'eval_loader')
        evaluated = evaluated and parts[0] == parts[1]
        on = f'{two} were evaluated on other data, by eval_loader and eval_subset_num_batches'
    pace, plain = _positions_a_step(run), _positions_a_step(baseline)
    padding = 1.0 if baseline.superposed or not run.superposed else _padding(run)
    plain *= padding or 1.0
    batch = None if padding is None else abs(pace - plain) <= SAME * plain
    return {
        'data': (data, f'{two} were trained on other data, by train_loader: the method is not all that differs.'),
        'batch': (
            batch,
            f'{run.name} works on {pace:,.0f} positions a step and {baseline.name} on {plain:,.0f}: equal steps are '
            'not equal compute.',
        ),
        'learning rate': (rate, f'{two} had other learning rates{where}: the method is not all that differs.'),
        'eval set': (evaluated, f'{on}: losses on different data are no comparison.'),
    }


def _same_setting(baseline: Run, run: Run, name: str) -> bool | None:
    """Whether a hyperparameter is the same; None if either run did not log it."""
    if name not in baseline.settings or name not in run.settings:
        return None
    return _without_caches(baseline.settings[name]) == _without_caches(run.settings[name])


def _without_caches(text: str) -> Any:
    """A setting as Composer writes it, without what says how rows are read and not which."""
    try:
        found = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
    return [_loader(each) for each in found] if isinstance(found, list) else _loader(found)


def _loader(found: Any) -> Any:
    return _dataset(found['dataset']) if isinstance(found, dict) and isinstance(found.get('dataset'), dict) else found


def _dataset(found: dict[str, Any]) -> dict[str, Any]:
    kept = {key: item for key, item in found.items() if key not in ('cache_limit', 'download_retry')}
    if kept.get('remote'):
        kept.pop('local', None)  # a cache
    if isinstance(kept.get('streams'), dict):
        kept['streams'] = {name: _dataset(stream) for name, stream in kept['streams'].items()}
    return kept


def _same_rate(baseline: Run, run: Run) -> tuple[bool | None, str]:
    """Whether the learning rates of the steps that both logged are the same, None if not known; and where they part."""
    steps, mine, theirs = np.intersect1d(run.rate.steps, baseline.rate.steps, return_indices=True)
    if not len(steps):
        # Settings are logged with four digits after the point: where these are the same, rates need not be.
        settings = [_same_setting(baseline, run, name) for name in ('optimizer', 'scheduler', 'max_duration')]
        return (False, ', by optimizer, scheduler and max_duration') if False in settings else (None, '')
    rates = run.rate.values[mine], baseline.rate.values[theirs]
    other = np.flatnonzero(~np.isclose(*rates, rtol=1e-4, atol=0))
    if not len(other):
        return True, ''
    first = other[0]
    return False, f', first at step {steps[first]:,}, {rates[0][first]:.3g} and {rates[1][first]:.3g}'


def remarks_on_all(runs: Sequence[Run]) -> list[str]:
    """Every sentence there is to say; ``runs[0]`` is the baseline."""
    baseline, *others = runs
    found = list(dict.fromkeys(f'{MARK} {sentence}' for run in others for sentence in remarks(baseline, run)))
    if baseline.superposed:
        found.insert(0, f'{MARK} {baseline.name} is given as the baseline and has bags: give a plain run first.')
    return [*found, *(sentence for run in runs for sentence in run.cut)]


def is_marked(runs: Sequence[Run], run: Run) -> bool:
    """Whether a run's numbers carry the mark."""
    baseline = runs[0]
    return baseline.superposed if run is baseline else baseline.superposed or bool(remarks(baseline, run))


def _positions_a_step(run: Run) -> float:
    steps, values = run.positions.steps, run.positions.values
    return float((values[-1] - values[0]) / max(1, steps[-1] - steps[0]))


def _padding(run: Run) -> float | None:
    """Positions of a run's plain steps for each token that Composer counts in them: more than 1 where rows are padded.

    Of a baseline there are these tokens alone. None where a run has had no recovery to tell.
    """
    if run.phases[-1][0] > 1:
        return None
    _, *recovery = run.phases[-1]
    positions = np.interp(recovery, run.positions.steps, run.positions.values)
    tokens = run.tokens_at(recovery)
    return float((positions[1] - positions[0]) / (tokens[1] - tokens[0])) if tokens[1] > tokens[0] else None
