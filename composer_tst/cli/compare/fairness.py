"""What keeps the numbers of two runs from being compared, said in sentences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from composer_tst.cli.compare.runs import Run

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
    if run.measured != baseline.measured:
        found.append(
            f'{run.name} was evaluated on {_label(run)} and {baseline.name} on {_label(baseline)}: losses on different '
            'data are no comparison.'
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
    pace, plain = _positions_a_step(run), _positions_a_step(baseline)
    padding = 1.0 if baseline.superposed or not run.superposed else _padding(run)
    if padding is not None and abs(pace - (plain := plain * padding)) > SAME * plain:
        found.append(
            f'{run.name} works on {pace:,.0f} positions a step and {baseline.name} on {plain:,.0f}: equal steps are '
            'not equal compute.'
        )
    return found


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


def _label(run: Run) -> str:
    return run.measured.removeprefix('metrics/').removesuffix('/LanguageCrossEntropy')


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
