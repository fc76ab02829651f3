"""Compare runs from their TensorBoard files: loss curves as a picture, the iso-loss speed-up as a number.

    python tools/compare_runs.py BASELINE_DIR TST_DIR... --output comparison.png

**Iso-loss speed-up.** How many times as many steps the baseline needs for the same validation loss: the
baseline's steps at the TST run's final validation loss, over the TST run's steps. The baseline's steps are
those of the first point at which its validation curve, linear between evaluations, is at or below that loss.
A run's steps are those of its last evaluation, and its final validation loss is the one measured there.

**Not reached.** Where the TST run ends below everything the baseline measured, the baseline would have had to
train for longer than it did, by an amount its curve does not tell: "more than X", X = the baseline's steps
over the TST run's.

**What the number does not say.** A baseline with a schedule lowers its learning rate only at its own end,
while the TST run's final loss comes after its decay. Before its end the baseline's curve lies above what a
shorter baseline, with a decay of its own, would have reached by that step. So a speed-up read off there is an
upper bound, in TST's favour. Favouring neither: final losses at equal steps (the difference in the table), or
the speed-up over a baseline that ends at the crossing.

The train loss of a superposed phase is the multi-hot cross-entropy over a bag's tokens. It is another
quantity than the next-token loss and cannot be compared with it; it is drawn dashed and faint.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TRAIN_LOSS = 'loss/train/total'
BAG_SIZE = 'superposition/bag_size'
DATA_TOKENS = 'superposition/data_tokens'
TIME_TOKEN = 'time/token'
EVAL_LOSS = 'metrics/eval/LanguageCrossEntropy'
ANY_EVAL_LOSS = re.compile(r'metrics/(?!train/).+/LanguageCrossEntropy')

BASELINE_COLOR = '#3c3c3c'
COLORS = (
    '#0072b2',
    '#d55e00',
    '#009e73',
    '#cc79a7',
    '#e69f00',
    '#56b4e9',
)  # told apart by colour-blind readers
QUIET = '#6b6b6b'


@dataclass(frozen=True)
class Series:
    """A logged scalar: ``values[N]`` at ``steps[N]``, steps strictly increasing.

    A step is Composer's batch counter when the value was logged: train values of the first batch are at 0, an
    evaluation after ``n`` batches is at ``n``.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """What the comparison needs of one run.

    Args:
        name (str): The folder's name.
        validation (Series): Next-token validation loss, in nats per token.
        train (Series): Train loss, in nats; multi-hot cross-entropy wherever the bag size is above 1.
        tokens (Series): Cumulative data tokens.
        bag_size (Series): Bag size; empty for a run without superposition.
    """

    name: str
    validation: Series
    train: Series
    tokens: Series
    bag_size: Series

    @property
    def final_loss(self) -> float:
        """Validation loss at the last evaluation."""
        return float(self.validation.values[-1])

    @property
    def final_step(self) -> int:
        """Steps at the last evaluation."""
        return int(self.validation.steps[-1])

    @property
    def switches(self) -> list[int]:
        """Steps at which the bag size changes: the first step of each new phase."""
        changed = np.flatnonzero(np.diff(self.bag_size.values)) + 1
        return self.bag_size.steps[changed].tolist()

    def tokens_at(self, steps: NDArray[np.int64] | Sequence[int]) -> NDArray[np.float64]:
        """Cumulative data tokens at ``steps[N]``, linear between logged steps."""
        return np.interp(steps, self.tokens.steps, self.tokens.values)

    def superposed_at(self, steps: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each of ``steps[N]`` was trained on bags, judged by the last bag size logged by then."""
        if not len(self.bag_size.steps):
            return np.zeros(len(steps), dtype=bool)
        latest = np.searchsorted(self.bag_size.steps, steps, side='right') - 1
        return self.bag_size.values[np.maximum(latest, 0)] > 1


@dataclass(frozen=True)
class Speedup:
    """Iso-loss speed-up: ``ratio`` if ``reached``, else only known to be more than ``ratio``."""

    ratio: float
    reached: bool

    def __str__(self) -> str:
        return f'{self.ratio:.2f}x' if self.reached else f'not reached (more than {self.ratio:.2f}x)'


def read_run(folder: Path) -> Run:
    """Read a run from all event files anywhere under ``folder``.

    Composer starts a new file at every flush and every resumption. Files are read in the order they were
    begun; from its first step of a scalar on, a file replaces what earlier ones hold of that scalar. So the
    steps that a resumed run trains again count once, as trained last.

    Args:
        folder (Path): The run's folder.

    Returns:
        Run: The run, named by its folder.

    Raises:
        ValueError: If the folder is missing or has no event file, if validation loss, train loss or tokens
            were not logged, if several validation losses were and none is labelled ``eval``, or if the last
            validation loss is not finite.
    """
    scalars = _read_scalars(folder)
    eval_tags = [EVAL_LOSS] if EVAL_LOSS in scalars else sorted(filter(ANY_EVAL_LOSS.fullmatch, scalars))
    if len(eval_tags) > 1:
        raise ValueError(
            f'{folder} logged several validation losses and none labelled eval ({", ".join(eval_tags)}); '
            'label the one to compare eval in the eval loader.'
        )
    if not eval_tags:
        raise ValueError(
            f'{folder} logged no validation loss ({EVAL_LOSS}); give that run an eval loader and an eval interval.'
        )
    tokens_tag = DATA_TOKENS if DATA_TOKENS in scalars else TIME_TOKEN
    for tag in (TRAIN_LOSS, tokens_tag):
        if tag not in scalars:
            raise ValueError(f'{folder} logged no {tag}, which every Composer run on tokens logs.')
    validation = scalars[eval_tags[0]]
    if not np.isfinite(validation.values[-1]):
        raise ValueError(f'{folder} diverged: its last validation loss is {validation.values[-1]}.')
    bag_size = scalars.get(BAG_SIZE, Series(np.empty(0, np.int64), np.empty(0)))
    return Run(
        name=folder.resolve().name,
        validation=validation,
        train=scalars[TRAIN_LOSS],
        tokens=scalars[tokens_tag],
        # Composer logs a step's loss under the steps before it, and what is known at its end under one more.
        bag_size=Series(bag_size.steps - 1, bag_size.values),
    )


def _read_scalars(folder: Path) -> dict[str, Series]:
    """Every scalar that the comparison may use, by tag, merged over the event files under ``folder``."""
    if not folder.is_dir():
        raise ValueError(f'{folder} is not a folder; give the one that holds a run and its TensorBoard files.')
    wanted = {TRAIN_LOSS, BAG_SIZE, DATA_TOKENS, TIME_TOKEN}
    files = []
    paths = sorted(path for path in folder.rglob('*tfevents*') if path.is_file())
    for path in paths:
        events = EventAccumulator(str(path), size_guidance={'scalars': 0}, purge_orphaned_data=False).Reload()
        tags = [tag for tag in events.Tags()['scalars'] if tag in wanted or ANY_EVAL_LOSS.fullmatch(tag)]
        if tags:  # a killed run leaves files with nothing in them, which have no first timestamp either
            begun = events.FirstEventTimestamp()
            files.append((begun, path.name, {tag: _last_of_each_step(events.Scalars(tag)) for tag in tags}))
    if not paths:
        raise ValueError(f'{folder} holds no TensorBoard event file; add a tensorboard logger to that run.')

    merged: dict[str, Series] = {}
    for _, _, scalars in sorted(files, key=lambda file: file[:2]):
        for tag, later in scalars.items():
            earlier = merged.get(tag, Series(later.steps[:0], later.values[:0]))
            kept = earlier.steps < later.steps[0]
            merged[tag] = Series(
                np.concatenate([earlier.steps[kept], later.steps]),
                np.concatenate([earlier.values[kept], later.values]),
            )
    return merged


def _last_of_each_step(events: Sequence) -> Series:
    """One file's scalar events as a series, the last value where a step was logged twice."""
    by_step = {event.step: event.value for event in events}
    steps = sorted(by_step)
    return Series(np.array(steps, np.int64), np.array([by_step[step] for step in steps], np.float64))


def first_crossing(curve: Series, level: float) -> float | None:
    """The first step at which ``curve``, linear between its points, is at or below ``level``; None if never.

    A curve that starts at or below ``level`` crosses at its first point. Points that are not finite are left out.
    """
    finite = np.isfinite(curve.values)
    curve = Series(curve.steps[finite], curve.values[finite])
    below = np.flatnonzero(curve.values <= level)
    if not len(below):
        return None
    after = int(below[0])
    if after == 0:
        return float(curve.steps[0])
    before = after - 1
    (x0, x1), (y0, y1) = curve.steps[[before, after]], curve.values[[before, after]]
    return float(x0 + (x1 - x0) * (y0 - level) / (y0 - y1))


def iso_loss_speedup(baseline: Series, run: Series) -> Speedup:
    """Iso-loss speed-up of a run over a baseline, as this module's docstring defines it.

    Args:
        baseline (Series): The baseline's validation loss; of one run, or a mean over seeds.
        run (Series): The TST run's validation loss, likewise.

    Returns:
        Speedup: Above 1 where the run needs fewer steps than the baseline.
    """
    crossing = first_crossing(baseline, float(run.values[-1]))
    steps = baseline.steps[-1] if crossing is None else crossing
    return Speedup(ratio=float(steps / run.steps[-1]), reached=crossing is not None)


def table(runs: Sequence[Run]) -> str:
    """The comparison as aligned text, a line a run; ``runs[0]`` is the baseline."""
    baseline = runs[0]
    rows = [('run', 'final val loss', 'vs baseline', 'steps', 'data tokens', 'iso-loss speed-up')]
    for run in runs:
        is_baseline = run is baseline
        rows.append(
            (
                run.name,
                f'{run.final_loss:.4f}',
                '-' if is_baseline else f'{run.final_loss - baseline.final_loss:+.4f}',
                f'{run.final_step:,}',
                f'{run.tokens_at([run.final_step])[0]:,.0f}',
                '-' if is_baseline else str(iso_loss_speedup(baseline.validation, run.validation)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join(
        '  '.join(
            # names to the left, numbers to the right, the last column ragged
            cell.ljust(width) if column == 0 else cell if column == len(row) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def draw(runs: Sequence[Run], output: Path) -> None:
    """Draw validation and train loss against steps and data tokens into a PNG; ``runs[0]`` is the baseline.

    Args:
        runs (Sequence[Run]): The baseline, then the runs to compare with it.
        output (Path): The PNG; its folder is made where missing.
    """
    style: dict = {
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
    with mpl.rc_context(style):
        # Figure, not pyplot: no display, no global state, and savefig takes the Agg canvas by itself
        figure = Figure(figsize=(9, 6.6), dpi=160, layout='constrained')
        axes = figure.subplots(2, 2, sharex='col', sharey='row')
        handles = []
        for index, run in enumerate(runs):
            color = BASELINE_COLOR if index == 0 else COLORS[(index - 1) % len(COLORS)]
            for column, by_tokens in enumerate((False, True)):
                _draw_validation(axes[0, column], run, by_tokens, color)
                _draw_train(axes[1, column], run, by_tokens, color)
                for step in run.switches:
                    at = run.tokens_at([step])[0] if by_tokens else step
                    for row in range(2):
                        axes[row, column].axvline(at, color=color, lw=0.9, ls=(0, (4, 3)), alpha=0.55, zorder=1)
            # a label beginning with an underscore is hidden, and dollars are read as mathematics
            label = f'{run.final_loss:.3f}  {run.name}'.replace('$', r'\$')
            handles.append(Line2D([], [], color=color, lw=2.4, label=label))

        axes[0, 0].set_ylim(*_limits([(run.validation, run.final_step) for run in runs]))
        axes[1, 0].set_ylim(*_train_limits(runs))
        for row in range(2):
            axes[row, 0].set_ylabel('nats per token')
        for column, label in enumerate(('steps', 'data tokens')):
            axes[1, column].set_xlabel(label)
            axes[1, column].set_xlim(left=0)
            axes[1, column].xaxis.set_major_formatter(EngFormatter(sep=''))
            axes[1, column].xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        switched = any(run.switches for run in runs)
        _title(axes[0, 0], 'Validation loss', 'vertical dashes: the bag size changes' if switched else '')
        superposed = any(run.superposed_at(run.train.steps).any() for run in runs)
        note = 'faint dashes: multi-hot loss of the superposed phase, not comparable with next-token loss'
        _title(axes[1, 0], 'Train loss', note if superposed else '')
        legend = figure.legend(
            handles=handles,
            loc='outside upper left',
            ncols=min(len(handles), 3),
            frameon=False,
            title='Final validation loss',
            alignment='left',
        )
        legend.get_title().set_color(QUIET)
        picture = io.BytesIO()
        figure.savefig(picture, format='png')
    output.parent.mkdir(parents=True, exist_ok=True)
    # a palette is plenty for lines and text, and a third of the size
    Image.open(picture).convert('RGB').quantize(256).save(output, format='png', optimize=True)


def smooth(series: Series, width: int) -> Series:
    """Centred moving average over ``width`` points, over fewer at the ends; steps stay."""
    if not len(series.steps):
        return series
    window = np.ones(max(1, min(width, len(series.steps))))
    total = np.convolve(series.values, window, mode='same')
    return Series(series.steps, total / np.convolve(np.ones_like(series.values), window, mode='same'))


def _smooth(run: Run, part: NDArray) -> Series:
    """A part of the train loss, given by mask or indices, averaged over a hundredth of the whole run."""
    return smooth(Series(run.train.steps[part], run.train.values[part]), len(run.train.steps) // 100)


def _draw_validation(axes: Axes, run: Run, by_tokens: bool, color: str) -> None:
    steps = run.validation.steps
    x = run.tokens_at(steps) if by_tokens else steps
    axes.plot(x, run.validation.values, color=color, lw=1.8)
    axes.plot(x[-1], run.final_loss, 'o', color=color, ms=5, clip_on=False, zorder=3)


def _draw_train(axes: Axes, run: Run, by_tokens: bool, color: str) -> None:
    # phase by phase, so that neither a line nor the smoothing runs across a switch
    edges = np.searchsorted(run.train.steps, run.switches)
    for part in np.split(np.arange(len(run.train.steps)), edges):
        if not len(part):
            continue
        curve = _smooth(run, part)
        x = run.tokens_at(curve.steps) if by_tokens else curve.steps
        if run.superposed_at(curve.steps)[0]:
            axes.plot(x, curve.values, color=color, lw=1.3, ls=(0, (2, 1.5)), alpha=0.45)
        else:
            axes.plot(x, curve.values, color=color, lw=1.3)


def _limits(curves: Sequence[tuple[Series, int]]) -> tuple[float, float]:
    """Lower and upper limit of the y axis that leave the end of every curve readable.

    From the lowest value to the highest of the last two thirds of any run, but for the few points of a spike:
    the steep start, which every run shares, is cut.
    """
    late = [series.values[series.steps >= steps / 3] for series, steps in curves]
    late = [values[np.isfinite(values)] for values in late]
    late = [values for values in late if len(values)]
    low = min(float(values.min()) for values in late)
    high = max(float(np.percentile(values, 97)) for values in late)
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def _train_limits(runs: Sequence[Run]) -> tuple[float, float]:
    """Limits for the train loss: those of its next-token part, raised to show half of a superposed phase."""
    pairs = [(run, run.superposed_at(run.train.steps)) for run in runs]
    low, high = _limits([(_smooth(run, ~mask), run.final_step) for run, mask in pairs])
    return low, max([high, *(float(np.nanmedian(run.train.values[mask])) for run, mask in pairs if mask.any())])


def _title(axes: Axes, title: str, note: str) -> None:
    heading = axes.set_title(title, loc='left', fontweight='bold', fontsize=11)
    axes.annotate(
        note,
        xy=(1, 0),
        xycoords=heading,
        xytext=(10, 2.5),
        textcoords='offset points',
        color=QUIET,
        fontsize=9,
        annotation_clip=False,
    ).set_in_layout(False)  # it may run on above the right-hand picture


def main(
    baseline: Annotated[Path, typer.Argument(metavar='BASELINE_DIR', help='Folder of the baseline run.')],
    runs: Annotated[list[Path], typer.Argument(metavar='TST_DIR', help='Folders of the runs to compare.')],
    output: Annotated[Path, typer.Option(metavar='PNG', help='Where to write the picture.')],
) -> None:
    """Draw the loss curves of runs beside a baseline's, and print final losses and iso-loss speed-ups."""
    try:
        folders = [baseline, *runs]
        compared = [read_run(folder) for folder in folders]
        if len({run.name for run in compared}) < len(compared):
            compared = [replace(run, name=str(folder)) for run, folder in zip(compared, folders, strict=True)]
        draw(compared, output)
    except (ValueError, OSError) as error:
        typer.echo(f'compare_runs: {error}', err=True)
        raise typer.Exit(1) from None
    typer.echo(table(compared))
    typer.echo(f'\ncurves: {output}')


if __name__ == '__main__':
    typer.run(main)
