"""What the evidence asks, in order: which runs are wanted, given those there are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tools.experiments.record import SEEDS, Job, Record
from tools.experiments.scales import (
    BY_SIZE,
    MPT_64,
    MPT_256,
    PROSE_5,
    PROSE_20,
    PYTHON_1,
    PYTHON_5,
    PYTHON_20,
    PYTHON_20_LARGE,
    PYTHON_40,
    PYTHON_40_LARGER,
    PYTHON_80,
    PYTHON_80_LARGER,
    Scale,
)
from tools.experiments.settings import (
    BASELINE,
    LONGER,
    PHASES,
    PHASES_05,
    PHASES_16,
    PHASES_BATCH,
    PHASES_BATCHES,
    PUBLISHED,
    PUBLISHED_BATCH,
    S4,
    S4_BATCH,
    SMALL_BAGS,
    Setting,
    beyond,
    by_batch,
    limited,
    one_size,
    superposed,
    weighted,
)

ALL_SEEDS = (17, 18, 19, 20, 21, 22)
# At 80 tokens per parameter: the size of a step in which plain training ends lowest by its mean at the first seeds, and
# the other one; the setting that ends lowest there; and the seeds that had no say in it.
BEST_80, OTHER_80 = PYTHON_80_LARGER, PYTHON_80
WINNER_80, FRESH = SMALL_BAGS, (20, 21, 22)
RECIPES = (S4, PUBLISHED, S4_BATCH, PUBLISHED_BATCH, PHASES_BATCH)
TUNED = (S4, PUBLISHED, PHASES_BATCH)
SETTINGS = (PUBLISHED, S4, PHASES_BATCH, SMALL_BAGS)  # at 40 and 80
GRID_BAGS, GRID_SHARES = (2, 4, 6, 8), (0.1, 0.2, 0.3, 0.4)
GRID = tuple(one_size(bag_size, share) for share in GRID_SHARES for bag_size in GRID_BAGS)
MPT_BAGS, MPT_SHARES = (2, 3, 4, 6, 8), (0.1, 0.2, 0.3, 0.4, 0.5)
MPT_GRID = tuple(one_size(bag_size, share) for share in MPT_SHARES for bag_size in MPT_BAGS)
# What the grid at 20 tokens per parameter chose at the first seed, and the seeds that had no say in it.
CHOSEN, CHOSEN_SEEDS = (one_size(4, 0.2), SMALL_BAGS), (18, 19, 20)
# And a map of the MPT.
MPT_CHOSEN = dict.fromkeys((S4_BATCH, PHASES_BATCH, *PHASES_BATCHES), (18, 19, 20, 21, 22))
MPT_CHOSEN |= dict.fromkeys((PHASES_16, PHASES_05), (20, 21, 22))
NONE = (one_size(4, 0.3, expand='none'), one_size(6, 0.3, expand='none'))
SIDES = (
    superposed('s = 4, r = 0.3, input only', bag_size=4, duration='0.3dur', superpose='input'),
    superposed('s = 4, r = 0.3, output only', bag_size=4, duration='0.3dur', superpose='output', expand='none'),
)


@dataclass(frozen=True)
class Ask:
    """Settings at a scale and some seeds, beside its baseline.

    Each at the learning rate that is best for the baseline; with ``tuned`` at that which is best for itself.
    """

    scale: Scale
    settings: Sequence[Setting]
    seeds: Sequence[int] = SEEDS
    tuned: bool = False

    def jobs(self, record: Record) -> list[Job]:
        """All its runs that are known to be wanted, by seed: a rate is known once it has been tuned."""
        wanted = tuning(record, self.scale, BASELINE)
        if not all(job.key in record.rows for job in wanted):
            return wanted
        plain = record.tuned(self.scale, BASELINE)
        wanted += [Job(self.scale, BASELINE, seed, plain) for seed in self.seeds]
        for setting in self.settings:
            tries = tuning(record, self.scale, setting) if self.tuned else []
            wanted += tries
            if all(job.key in record.rows for job in tries):
                rate = record.tuned(self.scale, setting) if self.tuned else plain
                wanted += [Job(self.scale, setting, seed, rate) for seed in self.seeds]
        return sorted(wanted, key=lambda job: job.seed)

    def lacks(self, record: Record) -> list[Job]:
        """Those that have no row, each once."""
        return list({job.key: job for job in self.jobs(record) if job.key not in record.rows}.values())


def tuning(record: Record, scale: Scale, setting: Setting) -> list[Job]:
    """Learning rates at the first seed, until the best of them has been tried between half and twice of it.

    A baseline's begin with those of its scale, another setting's with that of the baseline and its neighbors. A scale
    with a single rate is not tuned.
    """
    if setting == BASELINE:
        rates = set(scale.rates)
    else:
        plain = record.tuned(scale, BASELINE)
        rates = {plain / 2, plain, plain * 2}
    tried = record.tried(scale, setting)
    while len(scale.rates) > 1 and rates <= tried.keys():
        best = min(rates, key=lambda rate: tried[rate])
        if {best / 2, best * 2} <= rates:
            break
        rates |= {best / 2, best * 2}
    return [Job(scale, setting, SEEDS[0], rate) for rate in sorted(rates)]


def asked() -> Iterator[Ask]:
    """Every question, in order."""
    for scale in (PYTHON_1, PYTHON_5, PYTHON_20_LARGE, PROSE_5):
        yield Ask(scale, (*RECIPES, SMALL_BAGS))
        yield Ask(scale, TUNED, tuned=True)
    yield Ask(PROSE_20, (*RECIPES, SMALL_BAGS))
    yield Ask(PYTHON_20, RECIPES, (*SEEDS, 20))
    yield Ask(PYTHON_20, TUNED, tuned=True)
    yield Ask(PYTHON_20, GRID, SEEDS[:1])
    yield Ask(PYTHON_20, (*NONE, limited(BASELINE), limited(S4), limited(PUBLISHED)))
    yield Ask(PYTHON_20, CHOSEN, CHOSEN_SEEDS)
    yield from _mpt()
    yield Ask(PYTHON_40, SETTINGS, tuned=True)
    for scale in (PYTHON_40_LARGER, PYTHON_80_LARGER, PYTHON_80):
        yield Ask(scale, (), tuned=True)
    yield Ask(BEST_80, SETTINGS, tuned=True)
    yield Ask(BEST_80, (WINNER_80, PUBLISHED), FRESH, tuned=True)
    yield Ask(OTHER_80, (PUBLISHED,), tuned=True)


def _mpt() -> Iterator[Ask]:
    recipes = (S4, PUBLISHED, PHASES, PHASES_BATCH)
    yield Ask(MPT_64, (*LONGER, *recipes, *MPT_GRID, *SIDES, *weighted(4), one_size(12, 0.3), *weighted(12)))
    yield Ask(MPT_64, (*beyond(), *by_batch()), SEEDS[:1])
    yield Ask(MPT_64, (S4, S4_BATCH, PHASES, PHASES_BATCH, *PHASES_BATCHES), ALL_SEEDS)
    yield Ask(MPT_64, (PHASES_16, PHASES_05), FRESH)
    yield Ask(MPT_256, (LONGER[0], *recipes))


def at_40_and_80(record: Record) -> list[Job]:
    """The runs at 40 and 80 tokens per parameter that there are, each setting at the rate it is judged at."""
    return [
        Job(scale, setting, seed, record.rate(scale, setting))
        for scale in (*BY_SIZE[40], *BY_SIZE[80])
        for setting in (BASELINE, *SETTINGS)
        for seed in record.judged(scale, setting, ALL_SEEDS)
    ]


def missing(record: Record, scale: str = '') -> list[Job]:
    """What all questions lack, of one scale alone or of all, in order."""
    lacking = (ask.lacks(record) for ask in asked() if scale in ('', ask.scale.name))
    return list({job.key: job for jobs in lacking for job in jobs}.values())
