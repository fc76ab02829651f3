"""The published grids: which change of the final loss they suggest, and whether that is an extrapolation."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from importlib import resources
from typing import Any

from .config import Run
from .model import Model

# Published grids: file, parameters, tokens of the baseline, weighting.
GRIDS = (
    ('final_loss_270m_20k.csv', 267e6, 42e9, 'uniform'),
    ('final_loss_270m_100k.csv', 267e6, 209e9, 'uniform'),
    ('final_loss_600m_20k.csv', 600e6, 42e9, 'uniform'),
    ('final_loss_600m_20k_power_law.csv', 600e6, 42e9, 'power_law'),
)
# Within this factor of a published size or budget, that counts as the same scale.
SAME_SCALE = 1.5


@dataclass(frozen=True)
class Expected:
    """A change of the final loss in nats: at the nearest published scale, and the range over all of them."""

    change: float
    low: float
    high: float
    source: str
    tokens_per_parameter: float  # of the baseline there
    extrapolation: str  # why it is one, or empty


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


def expect(run: Run, model: Model, tokens: float, share: float, bag: float) -> Expected | None:
    """Read the expected change of the final loss off the published grids; None if none has the point.

    Args:
        tokens: of the plain run of equal cost.
        share: of steps that are superposed.
        bag: the bag size, or over several phases its mean.
    """
    weighting = 'power_law' if run.weighting == 'power_law' else 'uniform'
    read = []
    for name, parameters, budget, weighted in GRIDS:
        change = interpolate(read_grid(name), share, bag)
        if weighted == weighting and change is not None:
            distance = math.log(model.parameters / parameters) ** 2 + math.log(tokens / budget) ** 2
            read.append((distance, change, name.removesuffix('.csv'), parameters, budget))
    if not read:
        return None
    _, change, name, parameters, budget = min(read)
    why = []
    if max(model.parameters / parameters, parameters / model.parameters) > SAME_SCALE:
        why.append(f'the nearest published model has {parameters / 1e6:.0f}M parameters')
    if max(tokens / budget, budget / tokens) > SAME_SCALE:
        why.append(f'the nearest published budget is {budget / 1e9:.0f}B tokens')
    if (run.superpose, run.expand) != ('both', 'sequence'):
        why.append('the grids are for superpose: both and expand: sequence')
    if len(run.phases) > 1:
        why.append(f'the grids have one phase, and this is read at the mean bag size, {bag:.1f}')
    if run.weighting not in ('uniform', 'power_law'):
        why.append('the grids have uniform and power-law weights')
    changes = [each[1] for each in read]
    return Expected(change, min(changes), max(changes), name, budget / parameters, '; '.join(why))
