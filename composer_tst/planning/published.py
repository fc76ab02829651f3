"""Which change of the final loss to expect: by the published grids, or by measured runs where these are nearer."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from .config import Run
from .measured import Measured
from .model import Model
from .units import si

# Published grids: file, parameters, tokens and steps of the baseline, weighting.
GRIDS = (
    ('final_loss_270m_20k.csv', 267e6, 42e9, 20_000, 'uniform'),
    ('final_loss_270m_100k.csv', 267e6, 209e9, 100_000, 'uniform'),
    ('final_loss_600m_20k.csv', 600e6, 42e9, 20_000, 'uniform'),
    ('final_loss_600m_20k_power_law.csv', 600e6, 42e9, 20_000, 'power_law'),
)
# Within this factor of a known size or budget, that counts as the same scale.
SAME_SCALE = 1.5


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
class _Known:
    """A change of the final loss, and the run it is of; ``who`` found it."""

    who: str
    source: str
    change: float
    parameters: float
    tokens: float
    steps: int


def read_grid(name: str) -> dict[tuple[float, int], float]:
    """Change of the final loss against the baseline of the same grid, by share of steps and bag size."""
    with (resources.files('composer_tst') / 'published' / name).open() as file:
        losses = {
            (float(line['step_ratio']), int(line['bag_size'])): float(line['final_loss'])
            for line in csv.DictReader(file)
        }
    return {key: loss - losses[0.0, 1] for key, loss in losses.items()}


def interpolate(grid: dict[tuple[float, int], float], share: float, bag: float) -> float | None:
    """Bilinear, from no change at a share of 0 and at bags of 1; None where the grid has no such point."""
    shares = sorted({key[0] for key in grid})
    bags = sorted({key[1] for key in grid})
    total = 0.0
    for share_at, share_weight in _neighbours(shares, share):
        for bag_at, bag_weight in _neighbours(bags, bag):
            weight = share_weight * bag_weight
            if weight == 0 or share_at == 0 or bag_at == 1:
                continue
            if (share_at, bag_at) not in grid:
                return None
            total += weight * grid[share_at, bag_at]
    return total if shares[0] <= share <= shares[-1] and bags[0] <= bag <= bags[-1] else None


def _neighbours(points: list, at: float) -> list[tuple[Any, float]]:
    low = max((point for point in points if point <= at), default=points[0])
    high = min((point for point in points if point >= at), default=points[-1])
    share = 0.0 if high == low else (at - low) / (high - low)
    return [(low, 1 - share), (high, share)]


def expect(
    run: Run, model: Model, tokens: float, steps: int, share: float, bag: float, measured: Sequence[Measured] = ()
) -> Expected | None:
    """Take the change of the final loss from what is known nearest in size, tokens and steps; None if nothing is.

    Args:
        run: The run.
        model: Its model.
        tokens: Of the plain run of equal cost.
        steps: Of the run.
        share: Of steps that are superposed.
        bag: The bag size, or over several phases its mean.
        measured: What the same bags changed in runs that were measured.
    """
    weighting = 'power_law' if run.weighting == 'power_law' else 'uniform'
    read = [
        _Known('published', name.removesuffix('.csv'), change, parameters, budget, its_steps)
        for name, parameters, budget, its_steps, weighted in GRIDS
        if weighted == weighting and (change := interpolate(read_grid(name), share, bag)) is not None
    ]
    ran = {_known(each): each for each in measured}

    def distance(known: _Known) -> float:
        pairs = ((model.parameters, known.parameters), (tokens, known.tokens), (steps, known.steps))
        return math.hypot(*(math.log(a / b) for a, b in pairs))

    if not (known := [*read, *ran]):
        return None
    nearest = min(known, key=distance)
    why = []
    if _differ(model.parameters, nearest.parameters):
        why.append(f'the nearest {nearest.who} model has {si(nearest.parameters)} parameters')
    if _differ(tokens, nearest.tokens):
        why.append(f'the nearest {nearest.who} budget is {si(nearest.tokens)} tokens')
    if _differ(steps, nearest.steps):
        why.append(f'the nearest {nearest.who} run has {nearest.steps:,} steps')
    if nearest in ran:
        change, deviation = nearest.change, ran[nearest].deviation
        span = change - deviation, change + deviation, f'a standard deviation over {ran[nearest].seeds} seeds'
    else:
        why += _other_than_grids(run, bag)
        span = min(each.change for each in read), max(each.change for each in read), 'over published scales'
    there = nearest.tokens / nearest.parameters, nearest.steps
    return Expected(nearest.change, *span, nearest.source, *there, '; '.join(why))


def _known(measured: Measured) -> _Known:
    source = f'a Llama of {si(measured.parameters)} parameters on {measured.text}'
    tokens = measured.tokens_per_parameter * measured.parameters
    return _Known('measured', source, measured.change, measured.parameters, tokens, measured.steps)


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
