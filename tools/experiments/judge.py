"""How a setting is judged: at which seeds, against which plain run, and whether the answer is sure."""

import math
import statistics
from collections.abc import Collection, Sequence

from composer_tst.cli.plan.measured import is_sure
from tools.experiments.questions import ALL_SEEDS, CHOSEN, CHOSEN_SEEDS, FRESH, MPT_CHOSEN
from tools.experiments.record import SEEDS, Record, differences
from tools.experiments.scales import BY_SIZE, MPT_64, PYTHON_20, SCALES, Scale
from tools.experiments.settings import BASELINE, PUBLISHED, Setting


def seeds_of(record: Record, scale: Scale, setting: Setting) -> Sequence[int]:
    """The seeds a setting is judged at: if some of them chose it the others, once all of these are run."""
    if scale == PYTHON_20 and setting in CHOSEN:
        return CHOSEN_SEEDS
    if scale in BY_SIZE[80] and setting != BASELINE:
        later = ALL_SEEDS if setting == PUBLISHED else FRESH  # nothing chose the published recipe
        return later if is_fresh(record, scale, setting) else SEEDS
    return MPT_CHOSEN.get(setting, ALL_SEEDS) if scale == MPT_64 else ALL_SEEDS


def is_fresh(record: Record, scale: Scale, setting: Setting) -> bool:
    """Whether a setting has been run, beside plain training, at all seeds that did not choose it."""
    return len(record.changes(scale, setting, FRESH)) == len(FRESH)


def has_baseline(record: Record, scale: Scale) -> bool:
    """Whether plain training has been run at each of the first seeds."""
    return len(record.judged(scale, BASELINE, SEEDS)) == len(SEEDS)


def of_any_size(record: Record, scale: Scale) -> list[Scale]:
    """Those of the same model, text and tokens that have a baseline, whatever the size of a step."""
    alike = (scale.text, scale.seq_len, round(scale.tokens_per_parameter))
    return [
        each
        for each in SCALES.values()
        if (each.text, each.seq_len, round(each.tokens_per_parameter)) == alike and has_baseline(record, each)
    ]


def best_plain(record: Record, scale: Scale) -> Scale:
    """Of these the one at which plain training ends lowest."""

    def plain(each: Scale) -> float:
        return statistics.fmean(record.judged(each, BASELINE, SEEDS).values())

    return min(of_any_size(record, scale), key=plain, default=scale)


def over_plain(record: Record, scale: Scale, setting: Setting) -> list[float]:
    """Final losses minus those of plain training in the same steps, at the seeds a setting is judged at."""
    return list(record.changes(scale, setting, seeds_of(record, scale, setting)).values())


def over_best(record: Record, scale: Scale, setting: Setting) -> list[float]:
    """The same, minus those of plain training in steps of the best size, on as many tokens.

    At 20 tokens per parameter that was run at the first seeds alone, so these judge.
    """
    seeds = seeds_of(record, scale, setting) if scale in BY_SIZE[80] else SEEDS
    plain = record.judged(best_plain(record, scale), BASELINE, seeds)
    return list(differences(record.judged(scale, setting, seeds), plain).values())


def known(changes: Collection[float]) -> bool:
    """Whether a change is of three seeds or more, none of which diverged."""
    return len(changes) >= len(SEEDS) and all(map(math.isfinite, changes))


def sure(changes: Collection[float]) -> bool:
    """Whether a change is known, and told from none at the level of 5 % (Student's t)."""
    return known(changes) and is_sure(statistics.fmean(changes), statistics.stdev(changes), len(changes))
