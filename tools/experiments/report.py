"""The evidence as a page with pictures."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .settings import (
    BASELINE,
    BASELINES,
    GRID_BAGS,
    GRID_SHARES,
    PUBLISHED,
    RECOMMENDED,
    Experiment,
    Scale,
    Setting,
    experiments,
    one_size,
)
from .training import Job, Result

_SHADES = colormaps['viridis_r']
_BETTER = 'Below the published recipe, one bag size (here s = 4, r = 0.3), by more than two standard deviations:'
_BOLD = """Bold: by more than two standard deviations of the difference. Of settings that are no better or worse, one in
13 is bold at three seeds, one in 90 at five (Student's t)."""
_TERMS = """Losses are next-token validation losses in nats per token. A difference is between runs of the same seed, ±
is the sample standard deviation over seeds. Seconds a step are rough."""
_ISO_LOSS = """How many times the steps the baseline needs for the same final loss; its interval is one standard
deviation of the difference from the baseline to either side:"""
_FRESH = 'A setting that was chosen for its loss at one seed is judged at others.'


@dataclass(frozen=True)
class Runs:
    """All results at a scale."""

    results: dict[Job, Result]
    scale: Scale

    @property
    def lr(self) -> float:
        """The learning rate at which the baseline is best, which everything else is trained at."""
        rates = self.rates()
        return min(rates, key=lambda lr: rates[lr])

    def rates(self) -> dict[float, float]:
        """The baseline's final loss at each learning rate, at the first seed."""
        tuned = {job.lr: job for job in self.results if job.setting == BASELINE and job.seed == self.scale.seeds[0]}
        return {lr: self.results[tuned[lr]].final_loss for lr in sorted(tuned)}

    def get(self, setting: Setting, seed: int) -> Result | None:
        """The result of a setting at a seed, None if it was not run."""
        return self.results.get(Job(setting, seed, self.lr, self.scale))

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


def table(runs: Runs, settings: Sequence[Setting], seeds: Sequence[int], others: Sequence[Runs] = ()) -> str:
    """A row a setting: final losses, and differences from the baseline and the published recipe, seed by seed.

    Of each other scale there is a column with final losses, differences from its baseline, and seconds a step.
    """
    columns = ['setting', 'seeds', 'final validation loss', 'minus baseline', 'minus published recipe', 'data tokens']
    columns += ['s/step', *(f'{other.scale.name}: final loss, minus baseline, s/step' for other in others)]
    lines = [_row(columns), '|---' * len(columns) + '|']
    for setting in settings:
        results = runs.all(setting, seeds)
        if not results:
            continue
        cells = [setting.name, str(len(results)), spread(runs.losses(setting, seeds))]
        cells += [spread(runs.differences(setting, than, seeds), signed=True) for than in (BASELINE, PUBLISHED)]
        cells += [f'{results[0].data_tokens / 1e6:.2f}M', _pace(results)]
        for other in others:
            theirs = other.all(setting, other.scale.seeds)
            loss = spread([result.final_loss for result in theirs])
            difference = spread(other.differences(setting, BASELINE, other.scale.seeds), signed=True)
            cells += [f'{loss}, {difference}, {_pace(theirs)}' if theirs else '']
        lines.append(_row(cells))
    return '\n'.join(lines)


def _row(cells: Sequence[str]) -> str:
    return f'| {" | ".join(cells)} |'


def _pace(results: Sequence[Result]) -> str:
    return spread([result.seconds / result.steps for result in results])


def grid(runs: Runs) -> str:
    """The loss over s and r, minus the baseline's at the same seeds, its means over s and r, and where it is lowest."""
    lines = [_row(['r', *(f's = {s}' for s in GRID_BAGS), 'mean']), '|---' * (len(GRID_BAGS) + 2) + '|']
    means: dict[str, float] = {}
    for share in GRID_SHARES:
        row = [f'{share:g}']
        for bag_size in GRID_BAGS:
            cell = one_size(bag_size, share)
            differences = runs.differences(cell, BASELINE, runs.scale.seeds)
            row += [f'{spread(differences, signed=True)} ({len(differences)})' if differences else 'not run']
            if differences:
                means[cell.name] = statistics.fmean(differences)
        lines.append(_row([*row, _mean(runs, [one_size(bag_size, share) for bag_size in GRID_BAGS])]))
    columns = ([one_size(bag_size, share) for share in GRID_SHARES] for bag_size in GRID_BAGS)
    lines.append(_row(['mean', *(_mean(runs, cells) for cells in columns), '']))
    lowest = min(means, key=lambda name: means[name])
    lines += ['', f'In brackets, the number of seeds. Lowest: {lowest}, at {means[lowest]:+.3f}.']
    return '\n'.join(lines)


def _mean(runs: Runs, cells: Sequence[Setting]) -> str:
    """The mean difference of several settings from the baseline, over the seeds at which all of them were run."""
    seeds = [seed for seed in runs.scale.seeds if all(runs.differences(cell, BASELINE, [seed]) for cell in cells)]
    of_seeds = (statistics.fmean(runs.differences(cell, BASELINE, [seed])[0] for cell in cells) for seed in seeds)
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
    """What beats the published recipe, and how every setting that was run at several seeds compares."""
    seeds: dict[Setting, list[int]] = {}
    for experiment in done:
        for setting in experiment.settings if experiment.form == 'table' else ():
            here = [seed for seed in experiment.seeds if runs.get(setting, seed)]
            if setting.algorithm and len(here) >= max(2, len(seeds.get(setting, ()))):
                # Of several experiments the one with most seeds, of equal ones the last: at other seeds than those
                # that it was chosen at.
                seeds[setting] = here
    better: list[str] = []
    others = {'baseline': BASELINE, 'published recipe': PUBLISHED, 'recommended': RECOMMENDED}
    lines = [_row(['setting', 'seeds', *(f'minus {other}' for other in others)]), '|---' * (2 + len(others)) + '|']
    for setting in seeds:
        cells = [setting.name, str(len(seeds[setting]))]
        for than in others.values():
            differences = runs.differences(setting, than, seeds[setting])
            text = spread(differences, signed=True) if setting != than else ''
            cells.append(f'**{text}**' if _sure(differences) else text)
        if _sure(differences := runs.differences(setting, PUBLISHED, seeds[setting])) < 0:
            better.append(f'{setting.name}, {spread(differences, signed=True)}')
        lines.append(_row(cells))
    return '\n'.join([f'{_BETTER} {"; ".join(better) or "nothing"}.', '', *lines])


def _sure(differences: Sequence[float]) -> float:
    """The mean difference; 0 if it is of one seed, within two standard deviations, or not finite."""
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return 0.0
    mean = statistics.fmean(differences)
    return mean if abs(mean) > 2 * statistics.stdev(differences) else 0.0


def draw_grid(runs: Runs, output: Path) -> None:
    """The grid as curves over s, one for each r, in differences from the baseline."""
    figure = Figure(figsize=(6, 3.6), dpi=140, layout='constrained')
    axes = figure.subplots()
    for i, share in enumerate(GRID_SHARES):
        cells = [(s, runs.differences(one_size(s, share), BASELINE, runs.scale.seeds)) for s in GRID_BAGS]
        means = [(s, statistics.fmean(differences)) for s, differences in cells if differences]
        # One that diverged is not drawn.
        axes.plot(*zip(*means, strict=True), 'o-', color=_SHADES(0.15 + 0.17 * i), label=f'r = {share:g}')
    axes.axhline(0, color='#3c3c3c', ls=(0, (4, 3)), label='baseline')
    axes.set_xscale('log', base=2)
    axes.set_xticks(GRID_BAGS, [str(s) for s in GRID_BAGS])
    axes.set_xlabel('bag size s')
    axes.set_ylabel("final loss minus the baseline's")
    _finish(axes)
    axes.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
    figure.savefig(output)


def draw_settings(runs: Runs, settings: Sequence[Setting], output: Path) -> None:
    """Every setting's difference from the baseline, a dot a seed, the best at the top."""
    seeds = sorted({job.seed for job in runs.results})
    differences = {s: runs.differences(s, BASELINE, seeds) for s in dict.fromkeys(settings) if s != BASELINE}
    finite = {s: [x for x in differences[s] if math.isfinite(x)] for s in differences}
    measured = {s: finite[s] for s in finite if finite[s]}
    order = sorted(measured, key=lambda setting: -statistics.fmean(measured[setting]))
    figure = Figure(figsize=(8, 1 + 0.24 * len(order)), dpi=140, layout='constrained')
    axes = figure.subplots()
    for y, setting in enumerate(order):
        axes.plot(measured[setting], [y] * len(measured[setting]), 'o', ms=4, color='#0072b2', alpha=0.7)
        axes.plot(statistics.fmean(measured[setting]), y, '|', ms=12, color='#0072b2')
    axes.axvline(0, color='#3c3c3c', lw=0.8)
    axes.set_yticks(range(len(order)), [setting.name for setting in order], fontsize=8)
    axes.set_ylim(-1, len(order))
    axes.set_xlabel("final loss minus the baseline's, same seed")
    _finish(axes)
    figure.savefig(output)


def _finish(axes: Axes) -> None:
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(color='#ececec')
    axes.set_axisbelow(True)


def write(output: Path, scales: Sequence[Runs]) -> None:
    """Write the page on the first of the scales, with columns for the others, and its pictures beside it."""
    runs, *others = scales
    planned = experiments(runs.scale, runs.at_first_seed())
    done = _done(runs)
    settings = [setting for experiment in done for setting in experiment.settings]
    draw_settings(runs, settings, output.with_name(f'{output.stem}_settings.png'))
    parts = ['# Evidence', *map(_about, scales), _TERMS, '## What it says', verdict(runs, done), _BOLD]
    for other in others:
        parts += [f'At the scale `{other.scale.name}`:', verdict(other, _done(other))]
    parts += [_FRESH] if runs.scale.fresh_seeds else []
    if missing := [
        each.title for each in planned if not all(runs.get(s, x) for s in each.settings for x in each.seeds)
    ]:
        parts += [f'Not run yet, or not at every seed: {"; ".join(missing)}.']
    parts += [f'![Every setting]({output.stem}_settings.png)']
    for experiment in done:
        parts += [f'## {experiment.title}', experiment.question]
        if experiment.form == 'grid':
            draw_grid(runs, output.with_name(f'{output.stem}_grid.png'))
            parts += ["Final loss minus the baseline's.", grid(runs), f'![The grid]({output.stem}_grid.png)']
        else:
            parts += [table(runs, experiment.settings, experiment.seeds, others)]
        if experiment.form == 'iso-loss':
            parts += [
                _ISO_LOSS,
                '\n'.join(filter(None, (iso_loss(runs, s) for s in experiment.settings if s.algorithm))),
            ]
    output.write_text('\n\n'.join(part for part in parts if part) + '\n')


def _done(runs: Runs) -> list[Experiment]:
    """Experiments with most of their settings run at a seed: they share settings with others."""
    planned = experiments(runs.scale, runs.at_first_seed())
    return [e for e in planned if 2 * len([s for s in e.settings if runs.all(s, e.seeds)]) > len(e.settings)]


def _about(runs: Runs) -> str:
    """What was run at a scale, where, and how long it took."""
    scale, results = runs.scale, list(runs.results.values())
    rates = runs.rates()
    hours = sum(result.seconds for result in results) / scale.workers / 3600
    tuned = f"""is the one at which the baseline is best: its
final losses at seed {scale.seeds[0]} are {', '.join(f'{lr:g}: {rates[lr]:.3f}' for lr in rates)}; all that follows is
at {runs.lr:g}"""
    return f"""Scale `{scale.name}`: {scale.about} {results[0].parameters / 1e6:.2f}M parameters, {scale.steps:,} steps,
{scale.warmup} of warmup, decay over the last tenth. The learning rate {tuned if len(rates) > 1 else f'is {runs.lr:g}'}.
{len(results)} runs, {scale.workers} at a time, {hours:.1f} hours of training on
{'; '.join(dict.fromkeys(result.machine for result in results))}. Command: `make evidence SCALE={scale.name}`."""
