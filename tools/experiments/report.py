"""The evidence in numbers: differences, speed-ups, and the tables of them."""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tools.experiments.scales import (
    BASELINE,
    BASELINES,
    PHASES_BATCH,
    PUBLISHED,
    S4,
    Experiment,
    Scale,
    Setting,
    one_size,
)
from tools.experiments.train import Job, Result

# What settings are compared with, as tables call it.
OTHERS = {'baseline': BASELINE, 'the published s = 6': PUBLISHED, 's = 4': S4}


@dataclass(frozen=True)
class Runs:
    """All results at a scale."""

    results: dict[Job, Result]
    scale: Scale

    @property
    def lr(self) -> float:
        """The learning rate at which the baseline is best, which everything else is trained at."""
        return self.best_rate(BASELINE)

    def best_rate(self, setting: Setting) -> float:
        """The learning rate at which a setting is best, of those that were tried at the first seed."""
        rates = self.rates(setting)
        return min(rates, key=lambda lr: rates[lr])

    def rates(self, setting: Setting = BASELINE) -> dict[float, float]:
        """The final loss of a setting at each learning rate that was tried, at the first seed."""
        tuned = {job.lr: job for job in self.results if job.setting == setting and job.seed == self.scale.seeds[0]}
        return {lr: self.results[tuned[lr]].final_loss for lr in sorted(tuned)}

    def get(self, setting: Setting, seed: int) -> Result | None:
        """The result of a setting at a seed, None if it was not run."""
        return self.results.get(Job(setting, seed, self.lr, self.scale))

    def at_own_rates(self, setting: Setting, seeds: Sequence[int]) -> list[float]:
        """Final losses minus the baseline's, each at the learning rate that is best for it."""
        jobs = [Job(setting, seed, self.best_rate(setting), self.scale) for seed in seeds if self.rates(setting)]
        pairs = [(self.results.get(job), self.get(BASELINE, job.seed)) for job in jobs]
        return [a.final_loss - b.final_loss for a, b in pairs if a and b]

    def all(self, setting: Setting, seeds: Sequence[int]) -> list[Result]:
        """The results of a setting, of the seeds at which it was run."""
        return [result for seed in seeds if (result := self.get(setting, seed))]

    def losses(self, setting: Setting, seeds: Sequence[int]) -> list[float]:
        """Final losses, by seed."""
        return [result.final_loss for result in self.all(setting, seeds)]

    def differences(self, setting: Setting, other: Setting, seeds: Sequence[int]) -> list[float]:
        """Final losses minus another setting's, where both were run; infinite or NaN if one diverged."""
        pairs = [(self.get(setting, seed), self.get(other, seed)) for seed in seeds]
        return [a.final_loss - b.final_loss for a, b in pairs if a and b]

    def at_first_seed(self) -> dict[Setting, float]:
        """Final losses at the first seed."""
        here = [job for job in self.results if job.seed == self.scale.seeds[0] and job.lr == self.lr]
        return {job.setting: self.results[job].final_loss for job in here}


def spread(values: Sequence[float], digits: int = 3, signed: bool = False) -> str:
    """Mean and sample deviation; the deviation is left out of a single value."""
    if not values:
        return ''
    if not all(map(math.isfinite, values)):
        return 'diverged'
    text = f'{statistics.fmean(values):{"+" if signed else ""}.{digits}f}'
    return text if len(values) == 1 else f'{text} ± {statistics.stdev(values):.{digits}f}'


def table(
    runs: Runs,
    settings: Sequence[Setting],
    seeds: Sequence[int],
    others: Sequence[Runs] = (),
    against: Mapping[str, Setting] = OTHERS,
) -> str:
    """A row a setting: final losses, differences from what it is set against, seed by seed, and costs if they differ.

    Of each other scale there is a column with final losses, and differences from its baseline.
    """
    columns = ['setting', 'seeds', 'final validation loss', *(f'minus {other}' for other in against), 'data tokens']
    costs = any(setting.cost != 1 for setting in settings)
    columns += ['cost'] * costs + [f'{other.scale.name}: final loss, minus baseline' for other in others]
    lines = head(columns)
    for setting in settings:
        results = runs.all(setting, seeds)
        if not results:
            continue
        cells = [setting.name, _seeds(runs, setting, seeds), spread(runs.losses(setting, seeds))]
        cells += [_difference(runs, setting, than, seeds) for than in against.values()]
        cells += [f'{results[0].data_tokens / 1e6:.2f}M', *[f'{setting.cost:.3g}'] * costs]
        for other in others:
            loss = spread(other.losses(setting, other.scale.seeds))
            difference = spread(other.differences(setting, BASELINE, other.scale.seeds), signed=True)
            cells += [f'{loss}, {difference}' if loss else '']
        lines.append(row(cells))
    return '\n'.join(lines)


def head(columns: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [row(columns), '|---' * len(columns) + '|']


def row(cells: Iterable[str]) -> str:
    """A line of a table."""
    return f'| {" | ".join(cells)} |'


def _seeds(runs: Runs, setting: Setting, seeds: Sequence[int]) -> str:
    """The seeds at which a setting was run, as `17-19, 22`."""
    run = [str(seed) for seed in sorted(seeds) if runs.get(setting, seed)]
    spans = [[run[0], run[0]]] if run else []
    for seed in run[1:]:
        if int(seed) == int(spans[-1][1]) + 1:
            spans[-1][1] = seed
        else:
            spans.append([seed, seed])
    return ', '.join(first if first == last else f'{first}-{last}' for first, last in spans)


def grid(runs: Runs, bags: Sequence[int], shares: Sequence[float], seeds: Sequence[int]) -> str:
    """The loss over s and r, minus the baseline's at the same seeds, its means over s and r, and where it is lowest."""
    lines = head(['r', *(f's = {s}' for s in bags), 'mean'])
    means: dict[str, float] = {}
    for share in shares:
        found = [f'{share:g}']
        for bag_size in bags:
            cell = one_size(bag_size, share)
            differences = runs.differences(cell, BASELINE, seeds)
            found += [f'{spread(differences, signed=True)} ({len(differences)})' if differences else 'not run']
            if differences:
                means[cell.name] = statistics.fmean(differences)
        lines.append(row([*found, _mean(runs, [one_size(bag_size, share) for bag_size in bags], seeds)]))
    columns = ([one_size(bag_size, share) for share in shares] for bag_size in bags)
    lines.append(row(['mean', *(_mean(runs, cells, seeds) for cells in columns), '']))
    lowest = min(means, key=lambda name: means[name])
    lines += ['', f'In brackets, the number of seeds. Lowest: {lowest}, at {means[lowest]:+.3f}.']
    return '\n'.join(lines)


def _mean(runs: Runs, cells: Sequence[Setting], seeds: Sequence[int]) -> str:
    """The mean difference of several settings from the baseline, over the seeds at which all of them were run."""
    complete = [seed for seed in seeds if all(runs.differences(cell, BASELINE, [seed]) for cell in cells)]
    of_seeds = (statistics.fmean(runs.differences(cell, BASELINE, [seed])[0] for cell in cells) for seed in complete)
    return spread(list(of_seeds), signed=True)


def speed_up(runs: Runs, difference: float) -> tuple[str, float]:
    """Iso-loss speed-up: how many times the steps a baseline needs to end lower by `-difference` than the baseline.

    Between baselines of several lengths, each with a schedule of its own, the mean loss is linear in the logarithm of
    the steps. The text is ``less than `` or ``more than `` where the baselines do not span the loss; the number is then
    the nearest length.
    """
    seeds = runs.scale.seeds
    curve = [(b.length, statistics.fmean(of)) for b in BASELINES if (of := runs.differences(b, BASELINE, seeds))]
    if difference >= curve[0][1]:
        return 'less than ' if difference > curve[0][1] else '', curve[0][0]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 <= difference:
            return '', x0 * (x1 / x0) ** ((y0 - difference) / (y0 - y1))
    return 'more than ', curve[-1][0]


def iso_loss(runs: Runs, setting: Setting) -> str:
    """The speed-up of a setting as a sentence, with its interval; nothing if it was not run or diverged."""
    differences = runs.differences(setting, BASELINE, runs.scale.seeds)
    if not differences or not all(map(math.isfinite, differences)):
        return ''
    mean = statistics.fmean(differences)
    text = f'- {setting.name}: {_times(runs, mean)}'
    if len(differences) > 1:
        deviation = statistics.stdev(differences)
        text += f', from {_times(runs, mean + deviation)} to {_times(runs, mean - deviation)}'
    return f'{text} times.'


def _times(runs: Runs, difference: float) -> str:
    beyond, ratio = speed_up(runs, difference)
    return f'{beyond}{ratio:.2f}'


def verdict(runs: Runs, done: Sequence[Experiment]) -> str:
    """What beats one bag size, and how every setting that was run at several seeds compares."""
    seeds: dict[Setting, list[int]] = {}
    for experiment in done:
        for setting in experiment.settings if experiment.form == 'table' else ():
            here = [seed for seed in experiment.seeds if runs.get(setting, seed)]
            if setting.algorithm and len(here) >= max(2, len(seeds.get(setting, ()))):
                # Of several experiments the one with most seeds, of equal ones the last: at other seeds than those
                # that it was chosen at.
                seeds[setting] = here
    better: dict[str, list[str]] = {name: [] for name, other in OTHERS.items() if other.algorithm}
    others = OTHERS | {'phases, batch': PHASES_BATCH}
    lines = head(['setting', 'seeds', *(f'minus {other}' for other in others)])
    for setting in seeds:
        cells = [setting.name, _seeds(runs, setting, seeds[setting])]
        for name, than in others.items():
            cells.append(text := _difference(runs, setting, than, seeds[setting]))
            if name in better and sure(runs.differences(setting, than, seeds[setting])) < 0:
                better[name].append(f'{setting.name}, {text.replace("**", "")}')
        lines.append(row(cells))
    says = [
        f'Below {name} with r = 0.3, by more than two standard deviations: {"; ".join(found) or "nothing"}.'
        for name, found in better.items()
    ]
    return '\n'.join(['\n\n'.join(says), '', *lines])


def _difference(runs: Runs, setting: Setting, than: Setting, seeds: Sequence[int]) -> str:
    """A difference as tables show it, with the number of seeds where the other was run at fewer."""
    if setting == than:
        return ''
    differences = runs.differences(setting, than, seeds)
    fewer = f' ({len(differences)})' if 0 < len(differences) < len(runs.all(setting, seeds)) else ''
    return shown(differences) + fewer


def shown(differences: Sequence[float]) -> str:
    """Mean and deviation, bold where that is sure."""
    text = spread(differences, signed=True)
    return f'**{text}**' if sure(differences) else text


def tokens_per_parameter(scale: Scale) -> str:
    """A budget in words."""
    assert scale.tokens_per_parameter is not None
    return f'{scale.tokens_per_parameter:.2g} tokens per parameter'


def sure(differences: Sequence[float]) -> float:
    """The mean difference; 0 if it is of fewer than three seeds, within two standard deviations, or not finite."""
    if len(differences) < 3 or not all(map(math.isfinite, differences)):
        return 0.0
    mean = statistics.fmean(differences)
    return mean if abs(mean) > 2 * statistics.stdev(differences) else 0.0
