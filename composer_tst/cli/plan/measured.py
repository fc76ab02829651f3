"""What runs of a small Llama and a small MPT gained: `make evidence`, docs/evidence.md."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from composer_tst.cli.plan.config import Run
from composer_tst.cli.plan.model import Model

# Shares of steps are rounded to whole steps: nearer than this they are the same.
SAME_SHARE = 0.01
SAME_SCALE = 1.5  # within this factor two sizes, budgets or numbers of steps are the same
FAR = 3.0  # times the largest or the smallest that is known
# How many of its deviations a mean change must exceed, by the number of seeds: Student's t, 5 %, two-sided.
DEVIATIONS = {3: 2.48, 4: 1.59, 5: 1.24, 6: 1.05}


def is_sure(change: float, deviation: float, seeds: int) -> bool:
    """Whether a mean change over some seeds, at least three, is told from none at the level of 5 %."""
    return abs(change) > DEVIATIONS[min(seeds, max(DEVIATIONS))] * deviation


@dataclass(frozen=True)
class Measured:
    """A change of the final loss in nats against the baselines of the same seeds, and what was trained.

    ``change_from_best`` is from the best plain run of as many tokens, whatever the size of its steps. It is None if
    plain training was tried in steps of one size alone, or fewer than three seeds tell.
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
    seeds_from_best: int = 0
    family: str = 'a Llama'

    @property
    def is_better(self) -> bool:
        """Whether it surely ended better than plain training in the same steps."""
        return self.change < 0 and is_sure(self.change, self.deviation, self.seeds)

    @property
    def is_worse(self) -> bool:
        """Whether it surely ended worse."""
        return self.change > 0 and is_sure(self.change, self.deviation, self.seeds)

    @property
    def beats_best_plain(self) -> bool:
        """Whether it surely gained over the best plain run of as many tokens."""
        if self.change_from_best is None or self.deviation_from_best is None:
            return False
        return self.change_from_best < 0 and is_sure(
            self.change_from_best, self.deviation_from_best, self.seeds_from_best
        )


def read_measured(model: Model) -> list[tuple[list[int], list[float], str, Measured]]:
    """Bag sizes, shares of the steps at which they end, `expand`, and what was measured; by setting and budget.

    Of the MPT if ``model`` is one of about that size, else of the Llama. Only of settings that cost as much as a plain
    run and are no more than these.
    """
    with (resources.files('composer_tst') / 'cli' / 'plan' / 'losses' / 'evidence.csv').open() as file:
        lines = [line for line in csv.DictReader(file) if line['bag_sizes']]
        of_llama = [line for line in lines if not line['scale'].startswith('mpt')]
        of_mpt = [line for line in lines if line['scale'] == 'mpt']
        near = [line for line in of_mpt if model.mpt and 1 / FAR < model.parameters / int(line['parameters']) < FAR]
        return [
            (
                [int(bag) for bag in line['bag_sizes'].split()],
                [float(end) for end in line['ends'].split()],
                line['expand'],
                Measured(
                    *(float(line['change']), float(line['deviation']), int(line['seeds'])),
                    "the quickstart's text" if line['text'] == 'quickstart' else line['text'],
                    *(int(line['parameters']), float(line['tokens_per_parameter']), int(line['steps'])),
                    int(line['tokens_per_step']),
                    *(
                        float(line[name]) if line[name] else None
                        for name in ('change_from_best', 'deviation_from_best')
                    ),
                    seeds_from_best=int(line['seeds_from_best'] or 0),
                    family='an MPT' if near else 'a Llama',
                ),
            )
            for line in near or of_llama
        ]


def same_bags(run: Run, model: Model, shares: Sequence[float]) -> list[Measured]:
    """What the same bags changed at each budget, of fewest steps first; empty if they were not run.

    Args:
        run: The run.
        model: Its model.
        shares: The share of its steps after which each phase has ended.
    """
    if run.superpose != 'both' or run.weighting != 'uniform':
        return []
    bags = [phase.bag_size for phase in run.phases]
    same = [
        found
        for bag_sizes, ends, expand, found in read_measured(model)
        if bag_sizes == bags
        and expand == run.expand
        and all(abs(a - b) < SAME_SHARE for a, b in zip(ends, shares, strict=True))
    ]
    return sorted(same, key=lambda each: (each.steps, each.tokens_per_parameter, each.text))
