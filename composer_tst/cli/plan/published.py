"""The published grids of final losses, and what they say between their points."""

from __future__ import annotations

import csv
from importlib import resources
from typing import Any

# Published grids: file, parameters, tokens and steps of the baseline, weighting.
GRIDS = (
    ('final_loss_270m_20k.csv', 267e6, 42e9, 20_000, 'uniform'),
    ('final_loss_270m_100k.csv', 267e6, 209e9, 100_000, 'uniform'),
    ('final_loss_600m_20k.csv', 600e6, 42e9, 20_000, 'uniform'),
    ('final_loss_600m_20k_power_law.csv', 600e6, 42e9, 20_000, 'power_law'),
)

# A pair without a grid: name, parameters, tokens and steps of the baseline, bag size, share of steps, change.
PAIRS = (('the published pair of 3B', 3e9, 42e9, 20_000, 6, 0.3, 2.676 - 2.808),)


def read_grid(name: str) -> dict[tuple[float, int], float]:
    """Change of the final loss against the baseline of the same grid, by share of steps and bag size."""
    with (resources.files('composer_tst') / 'cli' / 'plan' / 'losses' / name).open() as file:
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
