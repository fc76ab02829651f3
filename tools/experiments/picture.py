"""The picture of docs/evidence.md: the gain over the number of steps."""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tools.experiments.judge import known, over_plain
from tools.experiments.record import Record
from tools.experiments.scales import PROSE, PYTHON, Scale
from tools.experiments.settings import PUBLISHED, SMALL_BAGS, Setting
from tools.experiments.tables import LLAMAS

COLORS = {1: '#8c8c8c', 5: '#56b4e9', 20: '#0072b2', 40: '#e69f00', 80: '#d55e00'}  # tokens per parameter
MARKERS = {1_024: 'o', 4_096: 's', 16_384: 'D'}  # tokens per step
SETTINGS = {PUBLISHED: 'published recipe', SMALL_BAGS: 'bags of 2 for 40 %'}  # filled, hollow
QUIET = '#6b6b6b'
# Label, steps and gain of the published pairs of equal steps (paper, sections 4 and 5) and of the reproduction.
ELSEWHERE = (
    ('270M, 600M', 20_000, 0.070),
    ('', 20_000, 0.075),
    ('270M', 100_000, 0.044),
    ('3B', 20_000, 0.132),
    ('345M, reproduced', 20_000, 0.038),
)
LOWEST = -0.26  # below, a point is at the edge, with its number beside


def draw(path: Path, record: Record) -> None:
    """A panel a text, color for the budget, marker for the size of a step; up is better."""
    figure = Figure(figsize=(9, 4.6), dpi=120, layout='constrained')
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, text in zip(panels, (PYTHON, PROSE), strict=True):
        for scale in LLAMAS:
            for number, setting in enumerate(SETTINGS):
                found = over_plain(record, scale, setting) if scale.text == text else []
                if known(found):
                    _point(axes, scale, setting, 1.05 ** (2 * number - 1), found)
        for name, steps, gain in ELSEWHERE:
            axes.plot(steps, gain, 'x', color=QUIET, ms=6)
            side: dict[str, Any] = {'xytext': (4, -13)} if 'reproduced' in name else {'xytext': (6, -3)}
            axes.annotate(name, (steps, gain), **side, textcoords='offset points', color=QUIET, fontsize=8)
        axes.axhline(0, color='#3c3c3c', lw=1)
        axes.set_xscale('log')
        axes.set_xlim(120, 500_000)
        axes.xaxis.set_major_formatter('{x:,.0f}')
        axes.set_ylim(bottom=LOWEST - 0.02)
        axes.set_title(text, fontsize=10)
        axes.set_xlabel('training steps')
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(color='#ececec')
        axes.set_axisbelow(True)
    panels[0].set_ylabel('gain over plain training in the same steps, nats\n(up is better)')
    run = [scale for scale in LLAMAS if known(over_plain(record, scale, PUBLISHED))]
    grey: dict[str, Any] = {'color': QUIET, 'ls': ''}
    budgets = sorted({round(scale.tokens_per_parameter) for scale in run})
    sizes = sorted({scale.tokens_per_step for scale in run})
    dot: dict[str, Any] = {'marker': '.', 'ms': 12, 'ls': ''}
    handles = [
        *(
            Line2D([], [], color=COLORS[each], label=f'{each} token{"s" * (each > 1)} per parameter', **dot)
            for each in budgets
        ),
        *(Line2D([], [], marker=MARKERS[each], label=f'{each:,} tokens a step', **grey) for each in sizes),
        *(
            Line2D([], [], marker='o', mfc='white' if number else QUIET, label=name, **grey)
            for number, name in enumerate(SETTINGS.values())
        ),
        Line2D([], [], marker='x', label='published recipe, by others', **grey),
    ]
    figure.legend(handles=handles, loc='outside lower center', ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)


def _point(axes: Axes, scale: Scale, setting: Setting, beside: float, found: list[float]) -> None:
    """One cell, with a standard deviation; at the edge, with its number, if it is below."""
    gain, color = -statistics.fmean(found), COLORS[round(scale.tokens_per_parameter)]
    style: dict[str, Any] = {'color': color, 'marker': MARKERS[scale.tokens_per_step], 'ms': 6, 'capsize': 3, 'lw': 1.2}
    style |= {'mfc': 'white'} if setting != PUBLISHED else {}
    steps = scale.steps * beside
    if gain < LOWEST:
        axes.plot(steps, LOWEST, **{key: value for key, value in style.items() if key != 'capsize'})
        side = (8, 2) if beside > 1 else (-8, 2)
        axes.annotate(f'worse\n{-gain:.2f}', (steps, LOWEST), xytext=side, textcoords='offset points', color=color,
                      fontsize=8, ha='left' if beside > 1 else 'right')  # fmt: skip
    else:
        axes.errorbar(steps, gain, statistics.stdev(found), **style)
