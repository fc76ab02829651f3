"""The evidence as a page with pictures."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from bench.machine import machine
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .settings import BASELINE, BASELINES, GRID_BAGS, GRID_SHARES, PUBLISHED, Experiment, Scale, Setting, grid_cell
from .training import Job, Result

_SHADES = colormaps['viridis_r']
_CHANCE = """Of settings that are no better or worse, one in 13 differs by more than two standard deviations at three
seeds (Student's t, 2 degrees of freedom). Not tried: more steps in the time that `batch` saves, which with rows of 64
is one in a hundred."""
_FRESH = 'A setting that was chosen for its loss at one seed is judged at others.'


@dataclass(frozen=True)
class Runs:
    """All results at one learning rate, by setting and seed."""

    results: dict[Job, Result]
    lr: float
    scale: Scale

    def get(self, setting: Setting, seed: int) -> Result | None:
        """The result of a setting at a seed, None if it was not run."""
        return self.results.get(Job(setting, seed, self.lr, self.scale))

    def losses(self, setting: Setting, seeds: Sequence[int]) -> list[float]:
        """Final losses, by seed."""
        return [result.final_loss for seed in seeds if (result := self.get(setting, seed))]

    def differences(self, setting: Setting, other: Setting, seeds: Sequence[int]) -> list[float]:
        """Final losses minus another setting's, where both were run; infinite or NaN if one diverged."""
        pairs = [(self.get(setting, seed), self.get(other, seed)) for seed in seeds]
        return [a.final_loss - b.final_loss for a, b in pairs if a and b]


def spread(values: Sequence[float], digits: int = 3, signed: bool = False) -> str:
    """Mean and sample deviation; the deviation is left out of a single value."""
    if not values:
        return ''
    if not all(map(math.isfinite, values)):
        return 'diverged'
    text = f'{statistics.fmean(values):{"+" if signed else ""}.{digits}f}'
    return text if len(values) == 1 else f'{text} ± {statistics.stdev(values):.{digits}f}'


def table(runs: Runs, settings: Sequence[Setting], seeds: Sequence[int]) -> str:
    """A row a setting: final losses, and differences from the baseline and the published recipe, seed by seed."""
    lines = [
        '| setting | seeds | final validation loss | minus baseline | minus published recipe | data tokens | s/step |',
        '|---|---|---|---|---|---|---|',
    ]
    for setting in settings:
        results = [result for seed in seeds if (result := runs.get(setting, seed))]
        tokens = f'{results[0].data_tokens / 1e6:.2f}M' if results else ''
        pace = spread([result.seconds / result.steps for result in results])
        lines.append(
            f'| {setting.name} | {len(results)} | {spread(runs.losses(setting, seeds))} '
            f'| {spread(runs.differences(setting, BASELINE, seeds), signed=True)} '
            f'| {spread(runs.differences(setting, PUBLISHED, seeds), signed=True)} | {tokens} | {pace} |'
        )
    return '\n'.join(lines)


def grid(runs: Runs) -> str:
    """The loss over s and r, minus the baseline's at the same seed."""
    lines = ['| r | ' + ' | '.join(f's = {s}' for s in GRID_BAGS) + ' |', '|---' * (len(GRID_BAGS) + 1) + '|']
    seed = runs.scale.seeds[0]
    baseline = runs.get(BASELINE, seed)
    for share in GRID_SHARES:
        cells = [runs.get(grid_cell(bag_size, share), seed) for bag_size in GRID_BAGS]
        texts = [f'{cell.final_loss - baseline.final_loss:+.3f}' if cell and baseline else 'not run' for cell in cells]
        lines.append(f'| {share:g} | ' + ' | '.join(texts) + ' |')
    return '\n'.join(lines)


def speedups(runs: Runs, setting: Setting) -> list[tuple[str, float]]:
    """Iso-loss speed-ups, a seed each: the baseline's steps for the setting's final loss over the setting's steps.

    Between baselines of several lengths, each with a schedule of its own, the loss is linear in the logarithm of the
    steps. The text is ``less than `` or ``more than `` where the baselines do not span the loss; the number is then
    the nearest length.
    """
    found = []
    for seed in runs.scale.seeds:
        wanted = runs.get(setting, seed)
        curve = [(b.length, result.final_loss) for b in BASELINES if (result := runs.get(b, seed))]
        if wanted and curve:
            found.append(_steps_at(curve, wanted.final_loss))
    return found


def _steps_at(curve: Sequence[tuple[float, float]], level: float) -> tuple[str, float]:
    if level >= curve[0][1]:
        return 'less than ' if level > curve[0][1] else '', curve[0][0]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 <= level:
            return '', x0 * (x1 / x0) ** ((y0 - level) / (y0 - y1))
    return 'more than ', curve[-1][0]


def iso_loss(runs: Runs, setting: Setting) -> str:
    """The speed-up of a setting as a sentence."""
    found = speedups(runs, setting)
    each = ', '.join(f'{beyond}{ratio:.2f}' for beyond, ratio in found)
    spanned = [ratio for beyond, ratio in found if not beyond]
    mean = f', {spread(spanned, 2)} in the mean' if len(spanned) == len(found) else ''
    return f'{setting.name}: {each} times at seeds {", ".join(map(str, runs.scale.seeds))}{mean}.'


def verdict(runs: Runs, experiments: Sequence[Experiment]) -> str:
    """Which settings beat the published recipe at equal steps by more than two standard deviations."""
    lines = {}
    for experiment in experiments:
        for setting in experiment.settings:
            differences = runs.differences(setting, PUBLISHED, experiment.seeds)
            if setting == PUBLISHED or not setting.algorithm or len(differences) < 2:
                continue
            seeds = ', '.join(map(str, experiment.seeds))
            if not all(map(math.isfinite, differences)):
                lines[setting] = f'- {setting.name}: a run diverged (seeds {seeds}).'
                continue
            mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
            sure = 'by more than' if abs(mean) > 2 * deviation else 'which is within'
            word = 'below' if mean < 0 else 'above'
            # The finals come last: what was chosen at one seed is judged at others.
            lines[setting] = (
                f'- {setting.name} ends {abs(mean):.3f} {word} the published recipe, {sure} two standard deviations '
                f'of the difference ({deviation:.3f}, seeds {seeds}).'
            )
    return '\n'.join(lines.values())


def draw_grid(runs: Runs, output: Path) -> None:
    """The grid as curves over s, one for each r."""
    figure = Figure(figsize=(6, 3.6), dpi=140, layout='constrained')
    axes = figure.subplots()
    seed = runs.scale.seeds[0]
    for i, share in enumerate(GRID_SHARES):
        cells = [(s, result) for s in GRID_BAGS if (result := runs.get(grid_cell(s, share), seed))]
        losses = [result.final_loss for _, result in cells]  # one that diverged is not drawn
        axes.plot([s for s, _ in cells], losses, 'o-', color=_SHADES(0.15 + 0.17 * i), label=f'r = {share:g}')
    if baseline := runs.get(BASELINE, seed):
        axes.axhline(baseline.final_loss, color='#3c3c3c', ls=(0, (4, 3)), label='baseline')
    axes.set_xscale('log', base=2)
    axes.set_xticks(GRID_BAGS, [str(s) for s in GRID_BAGS])
    axes.set_xlabel('bag size s')
    axes.set_ylabel('final validation loss')
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


def write(output: Path, runs: Runs, experiments: Sequence[Experiment], to_come: Sequence[Experiment] = ()) -> None:
    """Write the page on the experiments that are done, and its pictures beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = [setting for experiment in experiments for setting in experiment.settings]
    draw_settings(runs, settings, output.with_name(f'{output.stem}_settings.png'))
    parts = [_head(runs), '## What it says', verdict(runs, experiments), _CHANCE]
    parts += [_FRESH] if runs.scale.fresh_seeds else []
    if to_come:
        parts += [f'Not run yet: {", ".join(experiment.title for experiment in to_come)}.']
    parts += [f'![Every setting]({output.stem}_settings.png)']
    for experiment in experiments:
        parts += [f'## {experiment.title}', experiment.question]
        if experiment.form == 'grid':
            draw_grid(runs, output.with_name(f'{output.stem}_grid.png'))
            parts += [f"Final loss minus the baseline's, seed {runs.scale.seeds[0]}.", grid(runs)]
            parts += [f'![The grid]({output.stem}_grid.png)']
        else:
            parts += [table(runs, experiment.settings, experiment.seeds)]
        if experiment.form == 'iso-loss':
            parts += ['How many times the steps the baseline needs for the same final loss:']
            parts += ['\n'.join(f'- {iso_loss(runs, s)}' for s in experiment.settings if s.algorithm)]
    output.write_text('\n\n'.join(part for part in parts if part) + '\n')


def _head(runs: Runs) -> str:
    """What was run, where, and how long it took."""
    some = next(iter(runs.results.values()))
    rates = ', '.join(
        f'{job.lr:g}: {result.final_loss:.3f}'
        for job, result in runs.results.items()
        if job.setting == BASELINE and job.seed == runs.scale.seeds[0]
    )
    hours = sum(result.seconds for result in runs.results.values()) / runs.scale.workers / 3600
    scale = runs.scale
    return f"""# Evidence

Every run that was trained at the scale `{scale.name}`: {scale.about}
{some.parameters / 1e6:.2f}M parameters, {scale.steps:,} steps, {scale.warmup} of warmup, decay over the last tenth.
The learning rate is the one at which the baseline is best: its final losses at seed {scale.seeds[0]} are {rates};
all that follows is at {runs.lr:g}. Losses are next-token validation losses in nats per token. A difference is between
runs of the same seed, ± is the sample standard deviation over seeds. Seconds a step are rough.

Command: `make evidence SCALE={scale.name}`. {len(runs.results)} runs, {scale.workers} at a time,
{hours:.1f} hours of training on {machine(torch.device(scale.device))}."""
