"""Which change of the final loss to expect: that of the nearest run that is known, published or measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from composer_tst.cli.plan.config import Run
from composer_tst.cli.plan.measured import SAME_SCALE, SAME_SHARE, Measured, read_measured
from composer_tst.cli.plan.model import Model
from composer_tst.cli.plan.published import GRIDS, PAIRS, interpolate, read_grid
from composer_tst.cli.plan.units import si


@dataclass(frozen=True)
class Expected:
    """A change of the final loss in nats, at the nearest known scale; ``range`` is what ``low`` and ``high`` span."""

    change: float
    low: float
    high: float
    range: str
    source: str
    tokens_per_parameter: float  # of the baseline there
    steps: int
    extrapolation: str  # why it is one, or empty


@dataclass(frozen=True)
class Known:
    """A change of the final loss, and the run that it is of, published or measured."""

    who: str
    source: str
    change: float
    parameters: float
    tokens: float
    steps: int
    low: float
    high: float
    range: str
    deviation: float = 0.0  # over seeds; 0 if there was one
    sure: bool = True  # that the change is none of chance; one run does not tell


def expect(
    run: Run, model: Model, tokens: float, steps: int, share: float, bag: float, measured: Sequence[Measured] = ()
) -> Expected | None:
    """Take the change of the final loss from what is known nearest in size, tokens and steps.

    None if nothing is known of these bags, or other bags were measured nearer than whatever is.

    Args:
        run: The run.
        model: Its model.
        tokens: Of the plain run of equal cost.
        steps: Of the run.
        share: Of steps that are superposed.
        bag: The bag size, or over several phases its mean.
        measured: What the same bags changed in runs that were measured.
    """

    def far(known: Known) -> float:
        return distance(known, model, tokens, steps)

    if not (known := [*published(run, share, bag), *map(from_measured, measured)]):
        return None
    nearest = min(known, key=far)
    if any(far(from_measured(each)) < far(nearest) for *_, each in read_measured(model)):
        return None
    why = []
    if _differ(model.parameters, nearest.parameters):
        why.append(f'the nearest {nearest.who} model has {si(nearest.parameters)} parameters')
    if _differ(tokens, nearest.tokens):
        why.append(f'the nearest {nearest.who} budget is {si(nearest.tokens)} tokens')
    if _differ(steps, nearest.steps):
        why.append(f'the nearest {nearest.who} run has {nearest.steps:,} steps')
    if nearest.who == 'published':
        why += _other_than_grids(run, bag)
    span = nearest.low, nearest.high, nearest.range
    there = nearest.tokens / nearest.parameters, nearest.steps
    return Expected(nearest.change, *span, nearest.source, *there, '; '.join(why))


def distance(known: Known, model: Model, tokens: float, steps: int) -> float:
    """How far a run is from one that is known, over size, tokens and steps, in factors of e."""
    pairs = ((model.parameters, known.parameters), (tokens, known.tokens), (steps, known.steps))
    return math.hypot(*(math.log(a / b) for a, b in pairs))


def published(run: Run, share: float, bag: float) -> list[Known]:
    """What the grids and pairs say of these bags, at each published scale; empty if nothing."""
    if run.expand == 'none':
        return []  # which reads less than a plain run of equal cost would: nothing like the published runs
    weighting = 'power_law' if run.weighting == 'power_law' else 'uniform'
    read = [
        (change, name.removesuffix('.csv'), parameters, tokens, steps)
        for name, parameters, tokens, steps, weighted in GRIDS
        if weighted == weighting and (change := interpolate(read_grid(name), share, bag)) is not None
    ]
    read += [
        (change, name, parameters, tokens, steps)
        for name, parameters, tokens, steps, bag_size, until, change in PAIRS
        if (weighting, bag_size) == ('uniform', bag) and abs(until - share) < SAME_SHARE
    ]
    changes = [change for change, *_ in read]
    return [
        Known(
            *('published', source, change, parameters, tokens, steps),
            *(min(changes), max(changes), 'over published scales'),
        )
        for change, source, parameters, tokens, steps in read
    ]


def from_measured(found: Measured) -> Known:
    """What was measured, as a run that is known."""
    return Known(
        who='measured',
        source=f'{found.family} of {si(found.parameters)} parameters on {found.text}',
        change=found.change,
        parameters=found.parameters,
        tokens=found.tokens_per_parameter * found.parameters,
        steps=found.steps,
        low=found.change - found.deviation,
        high=found.change + found.deviation,
        range=f'a standard deviation over {found.seeds} seeds',
        deviation=found.deviation,
        sure=found.is_better or found.is_worse,
    )


def _differ(here: float, there: float) -> bool:
    return max(here / there, there / here) > SAME_SCALE


def _other_than_grids(run: Run, bag: float) -> list[str]:
    why = []
    if (run.superpose, run.expand) != ('both', 'sequence'):
        why.append('the grids are for superpose: both and expand: sequence')
    if len(run.phases) > 1:
        why.append(f'the grids have one phase, and this is read at the mean bag size, {bag:.1f}')
    if run.weighting not in ('uniform', 'power_law'):
        why.append('the grids have uniform and power-law weights')
    return why
