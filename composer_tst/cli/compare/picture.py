"""The comparison as a picture: did it help, and by how much."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from composer_tst.cli.compare.events import Series
from composer_tst.cli.compare.fairness import MARK, is_marked, remarks_on_all
from composer_tst.cli.compare.runs import Run
from composer_tst.cli.compare.speedup import iso_loss_speedup
from composer_tst.cli.compare.table import ONE_SEED, change

BASELINE_COLOR = '#3c3c3c'
# Told apart by colour-blind readers; each kind of dash and marker has all of them once.
COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')
DASHES = ('-', (0, (6, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ('o', 's', '^', 'D')
QUIET = '#6b6b6b'
REMARKS_SHOWN = 4
LONGEST_NAME, LONGEST_AT_END = 24, 16  # letters of a run's name: in title and legend, and beside its curve
AT_EQUAL_DATA = 'At equal data a plain run has taken more steps:\na step on bags reads more.'
STYLE: dict = {
    'axes.axisbelow': True,
    'font.size': 10,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.edgecolor': '#9a9a9a',
    'axes.grid': True,
    'grid.color': '#ececec',
    'xtick.color': QUIET,
    'ytick.color': QUIET,
    'axes.labelcolor': QUIET,
}


@dataclass(frozen=True)
class Look:
    """How a run is drawn."""

    color: str
    dash: str | tuple
    marker: str


def look_of(index: int) -> Look:
    """The look of the run at a place in the list, the baseline's at 0."""
    if index == 0:
        return Look(BASELINE_COLOR, DASHES[0], MARKERS[0])
    again, color = divmod(index - 1, len(COLORS))
    return Look(COLORS[color], DASHES[again % len(DASHES)], MARKERS[again % len(MARKERS)])


def draw(runs: Sequence[Run], output: Path) -> None:
    """Draw validation and train loss against steps and data tokens; ``runs[0]`` is the baseline.

    Args:
        runs: The baseline, then the runs to compare with it.
        output: The picture; its suffix is its format, its folder is made where missing.
    """
    superposed = [run for run in runs if run.superposed]
    with mpl.rc_context(STYLE):
        # Figure, not pyplot: no display, no global state, and savefig takes the Agg canvas by itself
        strip = 0.16 * len(superposed) + 0.1
        figure = Figure(figsize=(9, 7.2 + strip + 0.25 * (len(runs) // 3)), dpi=150, layout='constrained')
        axes = figure.subplots(3, 2, sharex='col', sharey='row', height_ratios=[strip, 3, 3])
        for column, by_tokens in enumerate((False, True)):
            _draw_phases(axes[0, column], runs, by_tokens)
            for index, run in enumerate(runs):
                _draw_validation(axes[1, column], run, by_tokens, look_of(index))
                _draw_train(axes[2, column], run, by_tokens, look_of(index))
        _label(axes, runs)
        _name_ends(axes[1, 0], runs)
        _draw_legend(figure, runs)
        if said := remarks_on_all(runs):
            shown = [*said[:REMARKS_SHOWN], *(['...'] if len(said) > REMARKS_SHOWN else [])]
            figure.supxlabel('\n'.join(shown), x=0.01, ha='left', fontsize=8.5, color='#b00020')
        _save(figure, output)


def title(runs: Sequence[Run]) -> str:
    """Whether it helped, and by how much."""
    baseline, *others = runs
    best = min(others, key=lambda run: run.final_loss)
    than, *by = change(baseline, best, 3).split()
    against = f'{by[0]} nats per token {than} than' if by else f'{than} with'
    against += f' {_plain(baseline.name)}'
    of_several = f'Of {len(others)} runs ' if len(others) > 1 else ''
    marked = f' {MARK}' if any(is_marked(runs, run) for run in runs) else ''
    return f'{of_several}{_plain(best.name)} ends {"lowest, " if of_several else ""}{against}{marked}'


def _plain(name: str, longest: int = LONGEST_NAME) -> str:
    """A run's name, of a long one its end: where names differ."""
    name = name if len(name) <= longest else f'…{name[1 - longest :]}'
    return name.replace('$', r'\$')  # else mathematics


def _draw_legend(figure: Figure, runs: Sequence[Run]) -> None:
    handles = []
    for index, run in enumerate(runs):
        look = look_of(index)
        label = f'{_plain(run.name)} ends at {run.final_loss:.3f}'
        if index:
            label += f' ({change(runs[0], run, 3)}'
            ratio = iso_loss_speedup(runs[0].validation, run.validation)
            label += ')' if ratio is None else f'; iso-loss {ratio:.2f}x)'
        label += f' {MARK}' if is_marked(runs, run) else ''
        handles.append(Line2D([], [], color=look.color, ls=look.dash, marker=look.marker, ms=5, lw=2, label=label))
    # the title is the legend's, for the layout makes room for the one or the other
    figure.legend(
        handles=handles,
        loc='outside upper left',
        ncols=min(len(handles), 2),
        frameon=False,
        title=title(runs),
        title_fontproperties={'size': 13, 'weight': 'bold'},
        alignment='left',
        handlelength=3.2,
    )


def _x(run: Run, steps: NDArray[np.int64] | Sequence[int], by_tokens: bool) -> NDArray:
    return run.tokens_at(steps) if by_tokens else np.asarray(steps)


def _draw_phases(axes: Axes, runs: Sequence[Run], by_tokens: bool) -> None:
    """A bar for each superposed run, cut where its bag size changes, with the bag sizes in it."""
    furthest = max(float(_x(run, [run.final_step], by_tokens)[0]) for run in runs)
    row = 0
    for index, run in enumerate(runs):
        if not run.superposed:
            continue
        for bag_size, start, end in run.phases:
            left, right = _x(run, [start, end], by_tokens)
            color = look_of(index).color
            axes.barh(
                -row, right - left, 0.8, left, color=color, alpha=0.75 if bag_size > 1 else 0.15, edgecolor='white'
            )
            if right - left > 0.03 * furthest:
                text = str(bag_size) if bag_size > 1 else 'plain tokens' if right - left > 0.2 * furthest else '1'
                ink = 'white' if bag_size > 1 else QUIET
                axes.text((left + right) / 2, -row, text, ha='center', va='center', color=ink, fontsize=8)
        row += 1
    axes.set_ylim(0.5 - max(row, 1), 0.5)
    axes.grid(False)
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    for side in ('left', 'bottom'):
        axes.spines[side].set_visible(False)


def _draw_validation(axes: Axes, run: Run, by_tokens: bool, look: Look) -> None:
    steps = run.validation.steps
    x = _x(run, steps, by_tokens)
    # more than 40 marks in a curve hide it
    axes.plot(
        x, run.validation.values, color=look.color, ls=look.dash, lw=1.6, marker=look.marker, ms=4,
        markevery=max(1, len(steps) // 40),
    )  # fmt: skip
    axes.plot(x[-1], run.final_loss, look.marker, color=look.color, ms=6, clip_on=False, zorder=3)


def _name_ends(axes: Axes, runs: Sequence[Run]) -> None:
    """Name each curve at its end, apart from the next by a line's height."""
    low, high = axes.get_ylim()
    height, lowest = 0.055 * (high - low), low
    for index, run in sorted(enumerate(runs), key=lambda each: each[1].final_loss):
        y = lowest = max(run.final_loss, lowest)
        lowest += height
        axes.annotate(
            _plain(run.name, LONGEST_AT_END), (run.final_step, y), (6, 0), textcoords='offset points', va='center',
            color=look_of(index).color, fontsize=8.5, annotation_clip=False,
        )  # fmt: skip


def _draw_train(axes: Axes, run: Run, by_tokens: bool, look: Look) -> None:
    # phase by phase, so that neither a line nor the smoothing runs across a switch
    edges = np.searchsorted(run.train.steps, run.switches)
    for part in np.split(np.arange(len(run.train.steps)), edges):
        if not len(part):
            continue
        curve = _smooth(run, part)
        x = _x(run, curve.steps, by_tokens)
        if run.superposed_at(curve.steps)[0]:
            axes.plot(x, curve.values, color=look.color, lw=1.3, ls=(0, (1, 1)), alpha=0.5)
        else:
            axes.plot(x, curve.values, color=look.color, lw=1.3, ls=look.dash)


def smooth(series: Series, width: int) -> Series:
    """Centred moving average over ``width`` points, over fewer at the ends; steps stay."""
    if not len(series.steps):
        return series
    window = np.ones(max(1, min(width, len(series.steps))))
    total = np.convolve(series.values, window, mode='same')
    return Series(series.steps, total / np.convolve(np.ones_like(series.values), window, mode='same'))


def _width(run: Run) -> int:
    """Points that the train loss is averaged over: a hundredth of the whole run, or of a short one ten."""
    return max(1, len(run.train.steps) // 100, min(10, len(run.train.steps) // 10))


def _smooth(run: Run, part: NDArray) -> Series:
    """A part of the train loss, given by mask or indices, averaged."""
    return smooth(Series(run.train.steps[part], run.train.values[part]), _width(run))


def _limits(curves: Sequence[tuple[Series, int]]) -> tuple[float, float]:
    """Lower and upper limit of the y axis that leave the end of every curve readable.

    From the lowest value to the highest of the last two thirds of any run, but for the few points of a spike.
    """
    late = [series.values[series.steps >= steps / 3] for series, steps in curves]
    late = [values[np.isfinite(values)] for values in late]
    late = [values for values in late if len(values)]
    low = min(float(values.min()) for values in late)
    high = max(float(np.percentile(values, 97)) for values in late)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def _train_limits(runs: Sequence[Run]) -> tuple[float, float]:
    """Limits for the train loss: of its next-token part, raised to show the jump and half of a superposed phase."""
    pairs = [(run, run.superposed_at(run.train.steps)) for run in runs]
    # Where no run has had a plain step yet, all there is.
    plain = [(run, ~mask) for run, mask in pairs if not mask.all()] or [(run, mask) for run, mask in pairs]
    low, high = _limits([(_smooth(run, shown), run.final_step) for run, shown in plain])
    for run, mask in pairs:
        if mask.any() and not mask.all():
            high = max(high, float(np.nanmedian(run.train.values[mask])), 1.01 * float(_smooth(run, ~mask).values[0]))
    return low, high


def _label(axes: NDArray, runs: Sequence[Run]) -> None:
    limits = _limits([(run.validation, run.final_step) for run in runs]), _train_limits(runs)
    highest = max(np.nanmax(run.validation.values) for run in runs), max(np.nanmax(run.train.values) for run in runs)
    for row, name, (low, high), top in zip((1, 2), ('validation', 'train'), limits, highest, strict=True):
        axes[row, 0].set_ylim(low, high)
        axes[row, 0].set_ylabel(f'{name} loss, nats per token')
        if top > high:
            axes[row, 0].annotate(
                f'cut at {high:.2g}; losses reach {top:.2g}', xy=(1, 1), xycoords='axes fraction', ha='right', va='top',
                color=QUIET, fontsize=8,
            )  # fmt: skip
    seed = ONE_SEED.replace(': ', ':\n') if len(runs) == 2 else ''
    columns = ('At equal compute', 'steps', seed), ('At equal data', 'data tokens', AT_EQUAL_DATA)
    for column, (heading, label, note) in enumerate(columns):
        axes[0, column].set_title(heading, loc='left', fontweight='bold', fontsize=11)
        axes[2, column].set_xlabel(f'{label}\n{note}', linespacing=1.3)
        axes[2, column].set_xlim(left=0)
        axes[2, column].xaxis.set_major_formatter(EngFormatter(sep=''))
        axes[2, column].xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if any(run.superposed for run in runs):
        axes[0, 0].set_ylabel('bag size', rotation=0, ha='right', va='center', fontsize=8)
    widths = sorted({_width(run) for run in runs})
    over = f'{widths[0]}' if len(widths) == 1 else f'{widths[0]} to {widths[-1]}'
    note = f'averaged over {over} steps' if widths[-1] > 1 else 'not averaged'
    if any(run.superposed for run in runs):
        note += '; faint dots: loss of a bag, another quantity than the next-token loss'
    axes[2, 0].set_title(f'Train loss {note}', loc='left', fontsize=9, color=QUIET).set_in_layout(False)


def _save(figure: Figure, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix.lower() != '.png':
        figure.savefig(output, format=output.suffix.removeprefix('.'))
        return
    picture = io.BytesIO()
    figure.savefig(picture, format='png')
    # a palette is plenty for lines and text, and a third of the size
    Image.open(picture).convert('RGB').quantize(256).save(output, format='png', optimize=True)
