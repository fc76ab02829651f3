"""What runs of a small Llama gained, at several budgets: `make evidence`, docs/evidence.md."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from composer_tst.cli.plan.config import Run

# Shares of steps are rounded to whole steps: nearer than this they are the same.
SAME_SHARE = 0.01
PUBLISHED_STEPS, PUBLISHED_TOKENS = 20_000, 14  # the fewest of published runs, the latter per parameter
SAME_SCALE = 1.5  # within this factor of a known size, budget or number of steps, that tells alone


@dataclass(frozen=True)
class Measured:
    """A change of the final loss in nats against the baselines of the same seeds, and what was trained.

    ``change_from_best`` is from the best plain run of as many tokens, whatever the size of its steps. It is None if
    fewer than three seeds tell.
    """

    change: float
    deviation: float
    seeds: int
    text: str
    parameters: int
    tokens_per_parameter: float
    steps: int
    tokens_per_step: int = 0
    change_from_best: float | None = None
    deviation_from_best: float | None = None


def read_measured() -> list[tuple[list[int], list[float], str, Measured]]:
    """Bag sizes, shares of the steps at which they end, `expand`, and what was measured; by setting and budget.

    Of the Llama alone, and of settings that cost as much as a plain run and are no more than these.
    """
    with (resources.files('composer_tst') / 'cli' / 'plan' / 'losses' / 'evidence.csv').open() as file:
        return [
            (
                [int(bag) for bag in line['bag_sizes'].split()],
                [float(end) for end in line['ends'].split()],
                line['expand'],
                Measured(
                    *(float(line['change']), float(line['deviation']), int(line['seeds']), line['text']),
                    *(int(line['parameters']), float(line['tokens_per_parameter']), int(line['steps'])),
                    int(line['tokens_per_step']),
                    *(
                        float(line[name]) if line[name] else None
                        for name in ('change_from_best', 'deviation_from_best')
                    ),
                ),
            )
            for line in csv.DictReader(file)
            if line['bag_sizes'] and not line['scale'].startswith('mpt')
        ]


def same_bags(run: Run, shares: Sequence[float]) -> list[Measured]:
    """What the same bags changed at each budget, of fewest steps first; empty if they were not run.

    Args:
        run: The run.
        shares: The share of its steps after which each phase has ended.
    """
    if run.superpose != 'both' or run.weighting != 'uniform':
        return []
    bags = [phase.bag_size for phase in run.phases]
    same = [
        found
        for bag_sizes, ends, expand, found in read_measured()
        if bag_sizes == bags
        and expand == run.expand
        and all(abs(a - b) < SAME_SHARE for a, b in zip(ends, shares, strict=True))
    ]
    return sorted(same, key=lambda each: (each.steps, each.tokens_per_parameter, each.text))


def warning(found: Sequence[Measured], tokens_per_parameter: float, steps: int) -> str:
    """Why a run of few steps may gain nothing, by the nearest budgets that were measured; else empty.

    Args:
        found: What was measured of the same bags; where they were not run at that budget, all others stand for them.
        tokens_per_parameter: Of the plain run of equal cost.
        steps: Of the run.
    """
    if steps >= PUBLISHED_STEPS and tokens_per_parameter * SAME_SCALE > PUBLISHED_TOKENS:
        return ''

    def distance(each: Measured) -> float:
        tokens = math.log(each.tokens_per_parameter / tokens_per_parameter)
        return math.hypot(tokens, math.log(each.steps / steps))

    every = sorted((each for *_, each in read_measured()), key=distance)
    budgets = [every[0]]
    if not steps / SAME_SCALE < every[0].steps < steps * SAME_SCALE:
        # Between budgets of fewer and of more steps, both tell.
        sides = ([each for each in every if (each.steps < steps) == fewer] for fewer in (True, False))
        budgets = sorted((side[0] for side in sides if side), key=distance)
    for budget in budgets:
        near = [each for each in every if distance(each) == distance(budget)]
        same = [each for each in found if each in near]
        if any(each.change < -2 * each.deviation for each in same or near):
            continue
        worse = all(each.change > 2 * each.deviation for each in same or near)
        who = 'it' if same else 'all that was tried'
        found_there = f'{who} ended worse' if worse else f'no gain of {who} was sure'
        side = '' if budget == every[0] else f' of {"fewer" if budget.steps < steps else "more"} steps'
        return (
            f'At the nearest measured budget{side}, {budget.tokens_per_parameter:.2g} tokens per parameter in '
            f'{budget.steps:,} steps, {found_there}, though a small MPT gained in 2,000 (docs/evidence.md): '
            'compare with a plain run first.'
        )
    return ''
