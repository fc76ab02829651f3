"""The tables of the README and of docs/evidence.md, each between two markers of its own; pages say what they mean."""

import itertools
import math
import re
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from tools.experiments.judge import best_plain, has_baseline, is_fresh, known, over_best, over_plain, seeds_of, sure
from tools.experiments.questions import (
    ALL_SEEDS,
    GRID_BAGS,
    GRID_SHARES,
    NONE,
    SETTINGS,
    SIDES,
    at_40_and_80,
)
from tools.experiments.record import COPYING, SEEDS, Record, differences, read_copying
from tools.experiments.scales import BY_SIZE, MPT_64, MPT_256, PYTHON_20, SCALES, Scale
from tools.experiments.settings import (
    BASELINE,
    LIMITED,
    LONGER,
    PHASES,
    PHASES_BATCH,
    PUBLISHED,
    PUBLISHED_BATCH,
    S4,
    S4_BATCH,
    Setting,
    limited,
    one_size,
    weighted,
)

NOT_YET = 'not at three seeds yet'
LLAMAS = tuple(scale for scale in SCALES.values() if scale not in (MPT_64, MPT_256))


def shown(changes: Iterable[float]) -> str:
    """A change of the loss as all pages show it; the number of seeds in brackets where that is not three."""
    changes = list(changes)
    if not changes:
        return ''
    if not all(map(math.isfinite, changes)):
        return 'diverged'
    mean = statistics.fmean(changes)
    text = f'{"better" if mean < 0 else "worse"} {abs(mean):.3f}'
    if len(changes) > 1:
        text += f' ± {statistics.stdev(changes):.3f}'
    if known(changes) and not sure(changes):
        text = f'level ({text})'
    elif sure(changes) and mean < 0:
        text = f'**{text}**'
    return text if len(changes) == len(SEEDS) else f'{text} ({len(changes)})'


def loss(record: Record, scale: Scale, setting: Setting, seeds: Sequence[int]) -> str:
    """Mean and deviation of the final loss, at the rate a setting is judged at; empty if it was not run."""
    return mean_of(record.judged(scale, setting, seeds).values())


def mean_of(losses: Collection[float]) -> str:
    """Mean and deviation of some losses; their number in brackets where that is not three."""
    if not losses:
        return ''
    if not all(map(math.isfinite, losses)):
        return 'diverged'
    deviation = f' ± {statistics.stdev(losses):.3f}' if len(losses) > 1 else ''
    number = f' ({len(losses)})' if len(losses) != len(SEEDS) else ''
    return f'{statistics.fmean(losses):.3f}{deviation}{number}'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ['---'] * len(columns), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _budget(scale: Scale) -> str:
    return f'{scale.tokens_per_parameter:.2g}'


def _of(scale: Scale) -> list[str]:
    text = f'{scale.text}, rows of {scale.seq_len}' if scale == MPT_256 else scale.text
    return [text, _budget(scale), f'{scale.steps:,}', f'{scale.tokens_per_step:,}']


def over_best_plain(record: Record) -> str:
    """Where plain training was run in steps of two sizes: the recipe and the chosen setting over the best of these."""
    rows = []
    for sizes in BY_SIZE.values():
        if not all(has_baseline(record, scale) for scale in sizes):
            rows.append([_budget(sizes[0]), NOT_YET, *[''] * 5])
            continue
        best = best_plain(record, sizes[0])
        plain = [_steps(best), loss(record, best, BASELINE, SEEDS)]
        rows.append([_budget(best), *plain, _recipe(record, best, sizes), *_chosen(record, sizes)])
    columns = ['tokens per parameter', 'best plain run', 'ends at', f'{PUBLISHED.name} over it']
    return table([*columns, 'chosen setting', 'over the best plain run', 'chosen by these seeds'], rows)


def recipe(record: Record) -> str:
    """The published recipe over plain training in steps of its own size and of the best, where both sizes were run."""
    rows = [
        [_budget(scale), _steps(scale), shown(changes), shown(over_best(record, scale, PUBLISHED))]
        for sizes in BY_SIZE.values()
        if all(has_baseline(record, each) for each in sizes)
        for scale in sizes
        if known(changes := over_plain(record, scale, PUBLISHED))
    ]
    columns = ['tokens per parameter', 'steps', 'over plain training in the same steps', 'over the best plain run']
    return table(columns, rows)


def _recipe(record: Record, best: Scale, sizes: Sequence[Scale]) -> str:
    """The published recipe in steps of plain training's best size, or of the other if it was not run in these."""
    for scale in sorted(sizes, key=lambda scale: scale != best):
        if known(found := over_best(record, scale, PUBLISHED)):
            return f'{shown(found)}; {_steps(scale)}'
    return NOT_YET


def _chosen(record: Record, sizes: Sequence[Scale]) -> list[str]:
    cells = [(scale, setting) for scale in sizes for setting in SETTINGS]
    ends = {cell: losses for cell in cells if known(losses := record.judged(*cell, SEEDS).values())}
    if not ends:
        return [NOT_YET, '', '']
    # One that was run again at seeds that did not choose it stays, whatever others end at.
    fresh = [cell for cell in ends if cell[1] != PUBLISHED and is_fresh(record, *cell)]
    scale, setting = min(fresh or ends, key=lambda cell: statistics.fmean(ends[cell]))
    told = shown(over_best(record, scale, setting))
    return [f'{setting.name}; {_steps(scale)}', told, 'no' if fresh else 'yes']


def _steps(scale: Scale) -> str:
    return f'{scale.steps:,} of {scale.tokens_per_step:,}'


def same_steps(record: Record) -> str:
    """At each scale every setting that was asked at all of them, over the baseline in the same steps."""
    rows = [
        [*_of(scale), loss(record, scale, BASELINE, ALL_SEEDS)]
        + [shown(over_plain(record, scale, setting)) for setting in SETTINGS]
        for scale in LLAMAS
        if has_baseline(record, scale) and any(over_plain(record, scale, setting) for setting in SETTINGS)
    ]
    columns = ['text', 'tokens per parameter', 'steps', 'tokens per step', 'plain ends at']
    return table([*columns, *(setting.name for setting in SETTINGS)], rows)


def size_of_steps(record: Record) -> str:
    """The same tokens in steps of two sizes, at the seeds of both."""
    rows = []
    for scales in BY_SIZE.values():
        for setting in (BASELINE, PUBLISHED):
            smaller, larger = (record.judged(each, setting, SEEDS) for each in scales)
            if change := differences(larger, smaller):
                ends = [f'{_steps(each)}: {loss(record, each, setting, SEEDS)}' for each in scales]
                rows.append([_budget(scales[0]), setting.name, *ends, shown(change.values())])
    columns = ['tokens per parameter', 'setting', 'smaller steps end at', 'larger steps end at']
    return table([*columns, 'larger over smaller steps'], rows)


def copying(record: Record) -> str:
    """What runs at 40 and 80 tokens per parameter gain on tokens that repeat, and on others.

    Losses of plain training; of the others the changes from it in the same steps, at the seeds of both.
    """
    found = read_copying(COPYING, record)
    measured = [
        job for job in at_40_and_80(record) if job.key in found and job.seed in seeds_of(record, job.scale, job.setting)
    ]
    rows = []
    for scale, jobs in itertools.groupby(measured, key=lambda job: job.scale):
        plain: dict[int, list[float]] = {}
        of_scale = []
        for setting, runs in itertools.groupby(jobs, key=lambda job: job.setting):
            losses = {job.seed: found[job.key] for job in runs}
            if setting == BASELINE:
                plain = losses
                cells = [mean_of(each) for each in zip(*losses.values(), strict=True)]
            else:
                both = [zip(losses[seed], plain[seed], strict=True) for seed in losses if seed in plain]
                changes = [[here - there for here, there in each] for each in both]
                cells = [shown(each) for each in zip(*changes, strict=True)] or [''] * 3
            of_scale.append([_budget(scale), _steps(scale), setting.name, *cells])
        rows += of_scale if len(of_scale) > 1 else []
    columns = ['tokens per parameter', 'steps', 'setting', 'all tokens', 'that repeat', 'others']
    return table(columns, rows)


def batch(record: Record) -> str:
    """`batch` over `sequence` with the same bags, each at the rate it is judged at."""
    pairs = ((S4, S4_BATCH), (PUBLISHED, PUBLISHED_BATCH), (PHASES, PHASES_BATCH))
    rows = []
    for scale in SCALES.values():
        cells = []
        for here, there in pairs:
            seeds = seeds_of(record, scale, there)
            changes = differences(record.judged(scale, there, seeds), record.judged(scale, here, seeds))
            cells.append(shown(changes.values()))
        if any(cells):
            rows.append([*_of(scale), *cells])
    columns = ['text', 'tokens per parameter', 'steps', 'tokens per step']
    return table([*columns, *(here.name for here, _ in pairs)], rows)


def _over(record: Record, scale: Scale, setting: Setting, other: Setting) -> list[float]:
    """Final losses minus another setting's, both at the rate of the baseline, at the seeds the setting is judged at."""
    if not has_baseline(record, scale):
        return []
    plain, seeds = record.tuned(scale, BASELINE), seeds_of(record, scale, setting)
    return list(differences(*(record.losses(scale, each, plain, seeds) for each in (setting, other))).values())


def grid(record: Record) -> str:
    """Share by bag size at 20 tokens per parameter, one seed; and the means of rows and columns."""
    if not has_baseline(record, PYTHON_20):
        return ''
    plain = record.tuned(PYTHON_20, BASELINE)
    base = record.losses(PYTHON_20, BASELINE, plain, SEEDS[:1])

    def mean(shares: Sequence[float], sizes: Sequence[int]) -> str:
        losses = [record.losses(PYTHON_20, one_size(s, r), plain, SEEDS[:1]) for s in sizes for r in shares]
        found = [change for each in losses for change in differences(each, base).values()]
        return shown([statistics.fmean(found)] if found else []).removesuffix(' (1)')

    rows = [
        [f'{share:g}', *(mean([share], [size]) for size in GRID_BAGS), mean([share], GRID_BAGS)]
        for share in GRID_SHARES
    ]
    rows.append(['mean', *(mean(GRID_SHARES, [size]) for size in GRID_BAGS), ''])
    return table(['r', *(f's = {size}' for size in GRID_BAGS), 'mean'], rows)


def others(record: Record) -> str:
    """What reads no more data, and what reads little data more than once, over plain training on the same text."""
    rows = []
    for setting in (*NONE, limited(S4), limited(PUBLISHED)):
        plain = limited(BASELINE) if LIMITED in setting.name else BASELINE
        rows.append([setting.name, shown(_over(record, PYTHON_20, setting, plain))])
    return table(['setting', 'over plain in the same steps'], rows)


def mpt(record: Record) -> str:
    """Every kind of setting on the MPT, over plain training and over one bag size."""
    settings = (
        *(PUBLISHED, S4, S4_BATCH, PHASES, PHASES_BATCH),
        *(*SIDES, *weighted(4), one_size(12, 0.3)),
    )
    rows = []
    for setting in settings:
        cells = [(scale, other) for scale, other in ((MPT_64, BASELINE), (MPT_64, S4), (MPT_256, BASELINE))]
        found = [_over(record, scale, setting, other) if setting != other else [] for scale, other in cells]
        gains = sure(found[0]) and statistics.fmean(found[0]) < 0
        rows.append([setting.name, *map(shown, found), times_the_steps(record, setting) if gains else ''])
    columns = ['setting', 'over plain', f'over {S4.name}', 'over plain, rows of 256']
    return table([*columns, 'plain needs, times the steps'], rows)


def times_the_steps(record: Record, setting: Setting) -> str:
    """How many times the steps plain training needs on the MPT, each length with a schedule of its own.

    And with what a deviation less gains, and a deviation more.
    """
    longer = {each.length: list(record.changes(MPT_64, each, SEEDS).values()) for each in LONGER}
    curve = [(1.0, 0.0), *((length, statistics.fmean(found)) for length, found in longer.items() if found)]
    found = list(record.changes(MPT_64, setting, SEEDS).values())
    if len(found) < len(SEEDS):
        return ''
    mean, deviation = statistics.fmean(found), statistics.stdev(found)
    here, less, more = (speed_up(curve, mean + by) for by in (0, deviation, -deviation))
    return f'{here} ({less} to {more})'


def speed_up(curve: Sequence[tuple[float, float]], change: float) -> str:
    """How many times the steps end as low, between lengths and their changes; the loss is linear in their logarithm."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 <= change <= y0:
            return f'{x0 * (x1 / x0) ** ((y0 - change) / (y0 - y1)):.2f}'
    return f'less than {curve[0][0]:g}' if change > curve[0][1] else f'more than {curve[-1][0]:g}'


TABLES: dict[str, Callable[[Record], str]] = {
    each.__name__: each
    for each in (recipe, over_best_plain, same_steps, size_of_steps, copying, grid, batch, others, mpt)
}
_MARKED = re.compile(r'(<!-- table: (\w+) -->\n).*?(<!-- end -->)', re.DOTALL)


def write_tables(page: Path, record: Record) -> None:
    """Put every table anew between its markers."""
    page.write_text(_MARKED.sub(lambda found: f'{found[1]}{TABLES[found[2]](record)}\n{found[3]}', page.read_text()))
