"""Whether a run is likely to gain: what the nearest runs that are known, published or measured, say of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from composer_tst.cli.plan.config import Run
from composer_tst.cli.plan.expected import Known, distance, from_measured, published
from composer_tst.cli.plan.keys import RECIPE
from composer_tst.cli.plan.measured import FAR, SAME_SCALE, Measured, read_measured
from composer_tst.cli.plan.model import Model
from composer_tst.cli.plan.published import GRIDS, PAIRS
from composer_tst.cli.plan.units import si, times

GAINS, UNKNOWN, WORSE = 'likely gains', 'not known', 'likely worse than plain training'
REFUSED = 'training refuses it'
PUBLISHED_STEPS, PUBLISHED_TOKENS = 20_000, 12  # the fewest of published runs, the latter per parameter
FEW_STEPS, MANY_TOKENS = 2_000, 40  # in fewer steps, on fewer tokens per parameter, nothing gained here
MIXTURES = (
    'Of mixtures of experts one pair is published, with 10B parameters: after 50,000 steps it ended better by 0.016 '
    'than the plain run after 125,000.'
)


@dataclass(frozen=True)
class Verdict:
    """What to expect, why, and the nearest run that is known, with how far it is."""

    verdict: str
    why: str
    nearest: str
    distance: str
    advice: str


def judge(
    run: Run, model: Model, tokens: float, steps: int, share: float, bag: float, measured: Sequence[Measured]
) -> Verdict:
    """Judge a run by what is known; the arguments are those of ``expect``."""
    budget = tokens / model.parameters, steps
    grids, rows = published(run, share, bag), [from_measured(each) for each in measured]
    others = [from_measured(each) for *_, each in read_measured(model)]

    def nearest(known: Sequence[Known]) -> Known:
        return min(known, key=lambda each: distance(each, model, tokens, steps))

    if is_published(model, *budget):
        if not grids or (run.superpose, run.expand) != ('both', 'sequence'):
            verdict, why, row = UNKNOWN, 'These settings are not published.', nearest([*grids, *rows, *others])
        else:
            row = nearest(grids)
            verdict, how = (GAINS, 'gained') if row.change < 0 else (WORSE, 'ended worse')
            why = f'The nearest published run with these bags {how}.'
    else:
        verdict, why, near = _by_budgets(measured, model, *budget)
        row = nearest([*grids, *rows, *others] if verdict == UNKNOWN else [from_measured(each) for each in near])
        if row.who == 'published':
            why = MIXTURES if model.active < model.parameters else 'No run that is known is near this one.'
    advised = advice(model, *budget, other=(bag, round(share, 2)) != (6, 0.3))
    return Verdict(verdict, why, _row(row, row not in [*grids, *rows]), _distance(row, model, *budget), advised)


def but_for(config: DictConfig, verdict: Verdict) -> Verdict:
    """The verdict, but for a run that is refused, or that only looks like pre-training from random weights."""

    def setting(key: str, otherwise: Any = None) -> Any:
        found = OmegaConf.select(config, key)
        return otherwise if found is None else found

    if setting('train_loader.name') == 'finetuning':
        why = 'Superposition is for pre-training, and the loader is one of finetuning.'
        return replace(verdict, verdict=REFUSED, why=why, nearest='', advice='Finetune plainly.')
    if setting('model.peft_config'):
        why = 'Superposition trains all weights, and model.peft_config a few.'
        return replace(verdict, verdict=REFUSED, why=why, nearest='', advice='Train plainly.')
    weights = 'load_path' if setting('load_path') else ''
    if setting('model.name') == 'hf_causal_lm' and setting('model.pretrained', True):
        weights = 'model.pretrained (true if it is not given)'
    if weights and verdict.verdict == GAINS:
        why = f'Runs that are known began with random weights, and this one begins with those of {weights}.'
        return replace(verdict, verdict=UNKNOWN, why=why)
    return verdict


def is_published(model: Model, tokens_per_parameter: float, steps: int) -> bool:
    """Whether published runs are about as large as this one, or enclose it."""
    sizes = [parameters for _, parameters, *_ in (*GRIDS, *PAIRS)]
    longest = max(steps for *_, steps, _ in GRIDS)
    return (
        PUBLISHED_STEPS <= steps <= FAR * longest
        and tokens_per_parameter >= PUBLISHED_TOKENS
        and min(sizes) / FAR <= model.parameters <= max(sizes) * FAR
    )


def advice(model: Model, tokens_per_parameter: float, steps: int, other: bool = False) -> str:
    """Say what the README recommends for so many tokens and steps; ``other`` if the bags are not the published ones."""
    if steps < FEW_STEPS and tokens_per_parameter < MANY_TOKENS:
        return f'In fewer than {FEW_STEPS:,} steps, on fewer than {MANY_TOKENS} tokens per parameter, train plainly.'
    if is_published(model, tokens_per_parameter, steps):
        return f'Use algorithms: {RECIPE}. --write NEW.yaml writes the YAML, with the scheduler for it.'
    these = 'these bags, or ' if other else ''
    return (
        f'Find the batch size at which plain training is best. Then try {these}algorithms: {RECIPE} beside a plain run '
        'of as many steps.'
    )


def _by_budgets(
    found: Sequence[Measured], model: Model, tokens_per_parameter: float, steps: int
) -> tuple[str, str, list[Measured]]:
    """A verdict by the nearest budgets that were measured, why, and what was measured there.

    Args:
        found: What was measured of the same bags; where they were not run at a budget, all others stand for them.
        model: The run's model.
        tokens_per_parameter: Of the plain run of equal cost.
        steps: Of the run.
    """

    def far(each: Measured) -> float:
        tokens = math.log(each.tokens_per_parameter / tokens_per_parameter)
        return math.hypot(tokens, math.log(each.steps / steps))

    every = sorted((each for *_, each in read_measured(model)), key=far)
    budgets = [every[0]]
    if not _same(steps, every[0].steps):
        # Between budgets of fewer and of more steps, both tell.
        sides = ([each for each in every if (each.steps < steps) == fewer] for fewer in (True, False))
        budgets = sorted((side[0] for side in sides if side), key=far)
    near = []
    for budget in budgets:
        there = [each for each in every if far(each) == far(budget)]
        near += [each for each in found if each in there] or there
    these = all(each in found for each in near)
    who = 'these bags' if these else 'what was tried'
    nearest = ' and '.join(f'{count:,}' for count in sorted({budget.steps for budget in budgets}))
    there = f'In the runs measured nearest, of {nearest} steps'
    if all(each.is_worse for each in near):
        return WORSE if steps < FEW_STEPS else UNKNOWN, f'{there}, {who} ended worse.', near
    if not any(each.is_better for each in near):
        return UNKNOWN, f'{there}, it is not sure that {"these bags" if these else "anything tried"} gained.', near
    if not all(each.is_better for each in near):
        return UNKNOWN, f'{there}, {who} gained in some, and not surely in others.', near
    if not all(each.beats_best_plain for each in near):
        return UNKNOWN, f'{there}, {who} gained, but {_only_here(near)}.', near
    close = _same(steps, every[0].steps) and _same(tokens_per_parameter, every[0].tokens_per_parameter)
    close = close and 1 / FAR < model.parameters / every[0].parameters < FAR
    far_off = '' if close else ', but they are far from this one'
    return GAINS if close else UNKNOWN, f'{there}, {who} gained{far_off}.', near


def _only_here(near: Sequence[Measured]) -> str:
    if all(each.beats_best_plain for each in near if each.change_from_best is not None):
        return 'plain training was not tried there in steps of another size'
    return 'it is not sure that they did over plain training in steps of its best size'


def _same(here: float, there: float) -> bool:
    return 1 / SAME_SCALE < here / there < SAME_SCALE


def _row(row: Known, others: bool) -> str:
    who = f'{row.who}, {si(row.parameters)} parameters' if row.who == 'published' else f'{row.who}, {row.source}'
    tokens = f'{row.tokens / row.parameters:.3g} tokens per parameter'
    told = change(row.change, row.deviation, row.sure)
    return f'{told} nats: {who}{" with other bags" if others else ""}, {tokens}, {row.steps:,} steps'


def _distance(row: Known, model: Model, tokens_per_parameter: float, steps: int) -> str:
    ratios = {
        'parameters': model.parameters / row.parameters,
        'tokens per parameter': tokens_per_parameter / (row.tokens / row.parameters),
        'steps': steps / row.steps,
    }
    return f'this run has {", ".join(times(ratio, what) for what, ratio in ratios.items())}'


def change(nats: float, deviation: float = 0.0, sure: bool = True) -> str:
    """A change of the final loss in words, with its deviation over seeds if it has one."""
    spread = f' ± {deviation:.3f}' if deviation else ''
    told = f'{"better" if nats < 0 else "worse"} {abs(nats):.3f}{spread}' if abs(nats) >= 0.0005 else f'level{spread}'
    return told if sure or told.startswith('level') else f'level ({told})'
