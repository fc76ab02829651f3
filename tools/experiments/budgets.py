"""How the gain depends on the budget: a small Llama at several numbers of tokens per parameter.

A scale for each budget; the widest questions are asked at the largest.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tools.experiments.report import Runs
from tools.experiments.scales import (
    BASELINE,
    PHASES_BATCH,
    PUBLISHED,
    S4,
    S4_BATCH,
    Experiment,
    Scale,
    Setting,
    finals,
    limited,
    one_size,
    phases,
)
from tools.experiments.train import Job

PARAMETERS = 362_816
RATES, HIGHER_RATES = (1e-3, 2e-3, 4e-3, 8e-3), (2e-3, 4e-3, 8e-3, 16e-3)
SEEDS = (17, 18, 19)
FRESH_SEEDS = (18, 19, 20)  # of what is chosen by runs at the first seed
PUBLISHED_BATCH = one_size(6, 0.3, expand='batch')
RECIPES = (BASELINE, S4, PUBLISHED, S4_BATCH, PUBLISHED_BATCH, PHASES_BATCH)
WITH_SEQUENCE = (BASELINE, S4, PUBLISHED)
NONE = (one_size(4, 0.3, expand='none'), one_size(6, 0.3, expand='none'))
# What the map at the largest budget chose: there it is judged at fresh seeds, elsewhere at all.
SMALL_BAGS = one_size(2, 0.4)
TUNED = (S4, PUBLISHED, PHASES_BATCH)
FINALISTS = 2
GRID_BAGS, GRID_SHARES = (2, 4, 6, 8), (0.1, 0.2, 0.3, 0.4)
CHEAPER = """What is level at less cost? `none` reads no more data than the baseline, in fewer operations. `batch` saves
some in attention, here 3 % of a run at most, which the last column leaves out."""
BEYOND = """What is better at equal cost? A share of 0.05 ends with warmup; phases of 6, 4 and 2 are bags of 6 with a
short ramp at the end."""
LIMITED = """The baseline reads its data once; superposed runs read the same again and again, for the split `limited`
holds no more than some 1.5 % that the baseline leaves."""
CODE, PROSE = 'Python source', 'prose'
DATA = {CODE: 'data/tokens', PROSE: 'data/prose'}
RECORDED = {DATA[CODE]: 209_014_144, DATA[PROSE]: 40_719_360}  # tokens to train on, of the record's runs


def _budget(
    name: str,
    text: str,
    steps: int,
    batch: int = 8,
    fresh_seeds: tuple[int, ...] = (),
    rates: tuple[float, ...] = RATES,
) -> Scale:
    """Steps of so many rows of 128."""
    tokens = steps * batch * 128
    return Scale(
        name=name,
        about=f'a Llama on {text}, in rows of 128, {batch * 128:,} s-tokens a step: {tokens / PARAMETERS:.1f} tokens '
        'per parameter.',
        overrides=(f'global_train_batch_size={batch}', f'device_train_microbatch_size={batch}'),
        steps=steps,
        warmup=steps // 20,
        seeds=SEEDS,
        learning_rates=rates,
        workers=2,
        device='cpu',
        yaml='yamls/evidence/llama.yaml',
        fresh_seeds=fresh_seeds,
        data=DATA[text],
        tokens_per_parameter=tokens / PARAMETERS,
    )


LARGEST = _budget('tokens-20', CODE, 7_100, fresh_seeds=FRESH_SEEDS, rates=(*RATES, 16e-3))
LARGE_STEPS = _budget(
    'tokens-20-large', CODE, 1_775, batch=32, rates=HIGHER_RATES
)  # the same tokens in steps four times as large
BUDGETS = (
    _budget('tokens-1', CODE, 350, rates=(5e-4, *RATES, 16e-3, 32e-3)),
    _budget('tokens-5', CODE, 1_800),
    LARGEST,
    LARGE_STEPS,
)
PROSE_BUDGETS = (
    _budget('prose-5', PROSE, 1_800),
    _budget('prose-20', PROSE, 7_100, rates=HIGHER_RATES[:3]),
)


# Where the learning rate is tuned for superposed settings too.
CHECKED: dict[str, Sequence[Setting]] = {scale.name: TUNED for scale in (*BUDGETS, PROSE_BUDGETS[0])}


def seeds_of(setting: Setting, scale: Scale) -> tuple[int, ...]:
    """The seeds at which a setting is judged at a budget: of one that a map there chose, those that had no say."""
    return scale.all_seeds if setting in RECIPES or not scale.fresh_seeds else scale.fresh_seeds


def checks(runs: Runs, settings: Sequence[Setting]) -> list[Job]:
    """Settings at the learning rate that the baseline chose and those beside it, then at those beside the best.

    And at every seed where another is best, once that is at no edge of what was tried.
    """
    scale = runs.scale
    rates, at = scale.learning_rates, scale.learning_rates.index(runs.lr)
    found: list[Job] = []
    for setting in settings:
        tried = runs.rates(setting).keys()
        asked = set(rates[max(at - 1, 0) : at + 2])
        if asked <= tried:
            best = rates.index(runs.best_rate(setting))
            asked |= set(rates[max(best - 1, 0) : best + 2])
            if asked <= tried and best != at:
                found += [Job(setting, seed, rates[best], scale) for seed in scale.seeds]
        found += [Job(setting, scale.seeds[0], lr, scale) for lr in sorted(asked)]
    return found


def of_budget(scale: Scale, losses: Mapping[Setting, float] | None = None) -> list[Experiment]:
    """All experiments at a budget, in the order of the questions.

    Args:
        scale: The budget.
        losses: Final losses at its first seed, from which the best of a map are chosen.
    """
    first, losses = scale.seeds[:1], losses or {}
    gain = Experiment('The gain', 'How much lower does TST end after as many steps?', RECIPES, scale.all_seeds)
    if not scale.fresh_seeds:
        return [replace(gain, settings=[*RECIPES, SMALL_BAGS])]
    grid = [one_size(bag_size, share) for share in GRID_SHARES for bag_size in GRID_BAGS]
    maps = [*grid, *others()]
    return [
        gain,
        Experiment('Share and bag size', 'Which share of steps, which bag size?', [BASELINE, *grid], first, 'grid'),
        Experiment('Cheaper', CHEAPER, [*RECIPES[:-1], *NONE], scale.seeds),
        Experiment('Better', BEYOND, [*WITH_SEQUENCE, *others()], first),
        Experiment('Limited data', LIMITED, [limited(setting) for setting in WITH_SEQUENCE], scale.seeds, 'limited'),
        *finals('The best of both maps, again', maps, losses, WITH_SEQUENCE, scale.fresh_seeds, FINALISTS),
    ]


def others() -> Sequence[Setting]:
    """What the paper left open."""
    return [
        PHASES_BATCH,
        one_size(6, 0.05),
        phases((6, 0.25), (4, 0.275), (2, 0.3)),
        phases((8, 0.1), (4, 0.2), (2, 0.3)),
        *(one_size(8, 0.3, weighting=rule) for rule in ('power_law', 'exponential', 'first')),
    ]


def on(data: Path) -> tuple[Scale, ...]:
    """The budgets on other data than those that `make` prepares."""
    return tuple(replace(scale, about=scale.about.replace(CODE, f'`{data.name}`'), data=str(data)) for scale in BUDGETS)


def too_short(data: Path, scale: Scale) -> str:
    """Why a scale's last question cannot be asked of prepared data, in a sentence; empty if it can."""
    rows, needed = _rows(data, 'limited'), _read(scale)
    if rows >= needed:
        return ''
    has = f'a split `limited` of {rows:,} rows' if rows else 'no split `limited`'
    return f'{data} has {has}, and a baseline reads {needed:,} rows: prepare one as large.'


def read_twice(data: Path) -> str:
    """That the longest run on prepared data reads rows again, in a sentence; empty if none does."""
    rows, needed = _rows(data, 'train'), round(_read(LARGEST) * (1 + max(GRID_SHARES) * (max(GRID_BAGS) - 1)))
    if rows >= needed:
        return ''
    return f'{data} has {rows:,} rows to train on, and the longest run reads {needed:,}, some of them again.'


def _rows(data: Path, split: str) -> int:
    return json.loads((data / 'stats.json').read_text())['splits'].get(split, {}).get('rows', 0)


def _read(scale: Scale) -> int:
    """Rows that a baseline reads."""
    return scale.steps * int(scale.overrides[0].split('=')[1])


def other_text(data: Path) -> str:
    """That prepared data are not those of the record, in a sentence; empty if they are, or are none of ours."""
    there, recorded = data / 'stats.json', RECORDED.get(str(data))
    if not recorded or not there.exists():
        return ''
    found = json.loads(there.read_text())['splits']['train']['tokens']
    if found == recorded:
        return ''
    return f'{data} has {found:,} tokens to train on, that of the record {recorded:,}: new runs are of another text.'
