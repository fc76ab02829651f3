"""The evidence in pictures."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.experiments.report import Runs
from tools.experiments.scales import BASELINE, GRID_BAGS, GRID_SHARES, PHASES_BATCH, PUBLISHED, Setting, one_size

ENOUGH = 3  # seeds of a setting that is drawn
QUIET, BLUE, ORANGE = '#6b6b6b', '#0072b2', '#d55e00'
HIGHLIGHTED = {PUBLISHED: (BLUE, 'published recipe'), PHASES_BATCH: (ORANGE, 'phases with batch')}


def draw_grid(runs: Runs, output: Path) -> None:
    """The grid over r: each bag size faint, and their mean with its deviation over seeds."""
    figure = Figure(figsize=(7, 3.8), dpi=140, layout='constrained')
    axes = figure.subplots()
    seeds = runs.scale.seeds
    for bag_size in GRID_BAGS:
        cells = [(r, runs.differences(one_size(bag_size, r), BASELINE, seeds)) for r in GRID_SHARES]
        means = [(r, statistics.fmean(differences)) for r, differences in cells if differences]
        if means:
            axes.plot(*zip(*means, strict=True), color=QUIET, lw=1, alpha=0.4)
            axes.annotate(
                f's = {bag_size}', means[-1], xytext=(5, 0), textcoords='offset points', color=QUIET, fontsize=8
            )
    points = []
    for r in GRID_SHARES:
        settings = [one_size(bag_size, r) for bag_size in GRID_BAGS]
        of_seeds = [statistics.fmean(each) for seed in seeds if (each := _of_all(runs, settings, seed))]
        if of_seeds:
            points.append((r, statistics.fmean(of_seeds), statistics.stdev(of_seeds) if len(of_seeds) > 1 else 0.0))
    if points:
        x, y, deviations = zip(*points, strict=True)
        axes.errorbar(x, y, deviations, fmt='o-', color=BLUE, capsize=4, label='mean over s, one deviation over seeds')
        axes.legend(frameon=False, loc='upper right')
    axes.axhline(0, color='#3c3c3c', lw=1)
    axes.set_xticks(GRID_SHARES, [f'{r:g}' for r in GRID_SHARES])
    axes.set_xlabel('share of steps that are superposed, r')
    axes.set_ylabel("final loss minus the baseline's")
    finish(axes)
    figure.savefig(output)


def _of_all(runs: Runs, settings: Sequence[Setting], seed: int) -> list[float]:
    """Differences from the baseline of several settings at a seed; none if one of them was not run or diverged."""
    found = [each for setting in settings for each in runs.differences(setting, BASELINE, [seed])]
    return found if len(found) == len(settings) and all(map(math.isfinite, found)) else []


def draw_settings(runs: Runs, settings: Sequence[Setting], output: Path) -> None:
    """Settings run at three seeds or more: mean difference from the baseline, its deviation, and a dot a seed."""
    seeds = sorted({job.seed for job in runs.results})
    found = {s: runs.differences(s, BASELINE, seeds) for s in dict.fromkeys(settings) if s != BASELINE}
    measured = {s: each for s, each in found.items() if len(each) >= ENOUGH and all(map(math.isfinite, each))}
    order = sorted(measured, key=lambda setting: -statistics.fmean(measured[setting]))
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(order)), dpi=140, layout='constrained')
    axes = figure.subplots()
    names = []
    for y, setting in enumerate(order):
        color, called = HIGHLIGHTED.get(setting, (QUIET, ''))
        each = measured[setting]
        axes.plot(each, [y] * len(each), 'o', ms=3.5, color=color, alpha=0.35)
        axes.errorbar(
            statistics.fmean(each),
            y,
            xerr=statistics.stdev(each),
            fmt='D' if called else 'o',
            ms=6,
            color=color,
            capsize=3,
        )
        names.append(f'{called}: {setting.name}' if called else setting.name)
    axes.axvline(0, color='#3c3c3c', lw=1.2)
    axes.annotate('baseline', (0, 1), xycoords=('data', 'axes fraction'), ha='center', va='bottom', fontsize=9)
    axes.set_yticks(range(len(order)), names, fontsize=9)
    for label, setting in zip(axes.get_yticklabels(), order, strict=True):
        if setting in HIGHLIGHTED:
            label.set_color(HIGHLIGHTED[setting][0])
            label.set_fontweight('bold')
    axes.set_ylim(-0.7, max(len(order), 1) - 0.3)
    axes.set_xlabel("final loss minus the baseline's of the same seed\nbars: one standard deviation")
    finish(axes)
    figure.savefig(output)


def finish(axes: Axes) -> None:
    """What all pictures have in common."""
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(color='#ececec')
    axes.set_axisbelow(True)
