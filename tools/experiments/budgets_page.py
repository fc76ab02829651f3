"""The evidence over budgets as a page and a picture."""

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .budgets import (
    CODE,
    DATA,
    GRID_BAGS,
    GRID_SHARES,
    LARGEST,
    PARAMETERS,
    PROSE,
    PUBLISHED_BATCH,
    RECIPES,
    SEEDS,
    of_budget,
)
from .page import BOLD, FRESH, TERMS, about
from .pictures import QUIET, finish
from .report import Runs, grid, spread, sure, table, tokens_per_parameter, verdict
from .settings import BASELINE, PUBLISHED, RECOMMENDED, S4, S4_BATCH, Experiment, Setting

# Tokens per parameter and gain of the published pairs (paper, tables of its sections 4 and 5).
PUBLISHED_POINTS = (
    ('270M', 150, 0.070),
    ('270M', 775, 0.044),
    ('600M', 70, 0.076),
    ('3B', 14, 0.132),
    ('10B-A1B', 105, 0.016),
)
COLORS = {S4: '#0072b2', PUBLISHED: '#d55e00', RECOMMENDED: '#009e73'}
# What of a setting `composer-tst plan` compares: bag sizes, where they end, expand.
MEASURED = {
    S4: ('4', '0.3', 'sequence'),
    PUBLISHED: ('6', '0.3', 'sequence'),
    S4_BATCH: ('4', '0.3', 'batch'),
    PUBLISHED_BATCH: ('6', '0.3', 'batch'),
    RECOMMENDED: ('8 4 2', '0.1 0.2 0.3', 'batch'),
}
ABOUT_DATA = """The Python source is that of every package that `make install` brings and of the standard library, each
file once (`make data/tokens/stats.json`; versions in [evidence_versions.txt](evidence_versions.txt)). The prose is
dictionaries and manuals that Debian 12 packages:

```bash
mkdir -p data/debian && cd data/debian
apt-get download dict-gcide dict-wn dict-foldoc dict-jargon linux-doc-6.1
for package in *.deb; do dpkg-deb -x "$package" .; done && cd ../..
python tools/experiments/corpus.py data/corpus/prose.jsonl data/debian
composer-tst prepare-data data/corpus/prose.jsonl --output data/prose --seq-len 128 --train-tokenizer 2048 \\
    --skip-bad --split train=0.98,val=0.02
```"""
OTHER_MODELS = 'The published points are of other models, data and bag sizes.'
RATES = 'Is the learning rate that is best for the baseline near the best for superposed runs? Final losses at seed {}:'


def write(output: Path, scales: Sequence[Runs]) -> None:
    """Write the page, and its picture beside it."""
    draw_gain(scales, output.with_name(f'{output.stem}_budgets.png'))
    parts = ['# Evidence', '\n'.join(f'- {about(runs)}' for runs in scales), ABOUT_DATA, TERMS]
    parts += ['## The gain over the budget', says(scales), gain_table(scales), BOLD]
    parts += [f'![Gain over tokens per parameter]({output.stem}_budgets.png)', OTHER_MODELS]
    missing: list[str] = []
    for runs in scales:
        parts += [f'## `{runs.scale.name}`: {tokens_per_parameter(runs.scale)}', *rates(runs)]
        for experiment in of_budget(runs.scale, runs.at_first_seed()):
            if not all(runs.get(setting, seed) for setting in experiment.settings for seed in experiment.seeds):
                missing.append(f'{experiment.title} ({runs.scale.name})')
            parts += _experiment(runs, experiment)
        if runs.scale == LARGEST:
            parts += [verdict(runs, of_budget(runs.scale, runs.at_first_seed())), FRESH]
    if missing:
        parts += [f'Not run yet, or not at every seed: {"; ".join(missing)}.']
    output.write_text('\n\n'.join(part for part in parts if part) + '\n')


def rates(runs: Runs) -> list[str]:
    """The learning rates that were tried, by setting."""
    found: dict[Setting, dict[float, float]] = {}
    for job, result in runs.results.items():
        if job.seed == SEEDS[0]:
            found.setdefault(job.setting, {})[job.lr] = result.final_loss
    tried = {setting: losses for setting, losses in found.items() if len(losses) > 1}
    lines = [
        f'- {setting.name}: {", ".join(f"{lr:g}: {losses[lr]:.3f}" for lr in sorted(losses))}'
        for setting, losses in tried.items()
    ]
    return [RATES.format(SEEDS[0]), '\n'.join(lines)]


def says(scales: Sequence[Runs]) -> str:
    """What is sure to end below and above the baseline, a line a budget."""
    lines = []
    for runs in scales:
        found = {setting: runs.differences(setting, BASELINE, SEEDS) for setting in RECIPES if setting != BASELINE}
        if not any(found.values()):
            continue
        below, above = (
            '; '.join(
                f'{setting.name}, {spread(of, signed=True)}' for setting, of in found.items() if sign * sure(of) > 0
            )
            for sign in (-1, 1)
        )
        budget = f'`{runs.scale.name}`, {tokens_per_parameter(runs.scale)}, {runs.scale.steps:,} steps'
        lines.append(f'- {budget}. Below the baseline: {below or "nothing"}. Above it: {above or "nothing"}.')
    return '\n'.join(['By more than two standard deviations, at three seeds:', '', *lines])


def gain_table(scales: Sequence[Runs]) -> str:
    """Final loss minus the baseline's, a row a setting and a column a budget; the baseline's own in its row."""
    columns = ['setting', *(f'`{runs.scale.name}`, {tokens_per_parameter(runs.scale)}' for runs in scales)]
    lines = [f'| {" | ".join(columns)} |', '|---' * len(columns) + '|']
    for setting in RECIPES:
        cells = [setting.name]
        for runs in scales:
            differences = runs.differences(setting, BASELINE, SEEDS)
            text = spread(differences, signed=True) if setting != BASELINE else spread(runs.losses(setting, SEEDS))
            fewer = f' ({len(differences)})' if 0 < len(differences) < len(SEEDS) else ''
            cells.append(f'**{text}**' if setting != BASELINE and sure(differences) else f'{text}{fewer}')
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def write_measured(output: Path, scales: Sequence[Runs]) -> None:
    """The gains again, for `composer-tst plan`: a line a setting and budget at which every seed was run."""
    with output.open('w', newline='') as file:
        lines = csv.writer(file, lineterminator='\n')
        names = ['text', 'parameters', 'tokens_per_parameter', 'steps', 'bag_sizes', 'ends', 'expand']
        lines.writerow([*names, 'seeds', 'change', 'deviation'])
        for runs in scales:
            text = PROSE if runs.scale.data == DATA[PROSE] else CODE
            for setting, (bags, ends, expand) in MEASURED.items():
                changes = runs.differences(setting, BASELINE, SEEDS)
                if len(changes) == len(SEEDS) and all(map(math.isfinite, changes)):
                    budget = [text, PARAMETERS, f'{runs.scale.tokens_per_parameter:.2f}', runs.scale.steps]
                    change = [len(changes), f'{statistics.fmean(changes):.4f}', f'{statistics.stdev(changes):.4f}']
                    lines.writerow([*budget, bags, ends, expand, *change])


def _experiment(runs: Runs, experiment: Experiment) -> list[str]:
    if not any(runs.all(setting, experiment.seeds) for setting in experiment.settings if setting.algorithm):
        return []
    heading = [f'### {experiment.title}, {tokens_per_parameter(runs.scale)}', experiment.question]
    if experiment.form == 'grid':
        return [*heading, "Final loss minus the baseline's.", grid(runs, GRID_BAGS, GRID_SHARES, experiment.seeds)]
    return [*heading, table(runs, experiment.settings, experiment.seeds)]


def draw_gain(scales: Sequence[Runs], output: Path) -> None:
    """How much lower TST ends, over tokens per parameter, with its deviation; and the published pairs."""
    figure = Figure(figsize=(8, 4.2), dpi=140, layout='constrained')
    axes = figure.subplots()
    for number, (setting, color) in enumerate(COLORS.items()):
        for prose, marker, line in ((False, 'o', '-'), (True, 's', ':')):
            points = []
            for runs in scales:
                gains = [-each for each in runs.differences(setting, BASELINE, SEEDS)]
                budget = runs.scale.tokens_per_parameter
                if gains and budget and ('prose' in runs.scale.name) == prose and 'large' not in runs.scale.name:
                    deviation = statistics.stdev(gains) if len(gains) > 1 else 0.0
                    points.append((budget * 1.03 ** (number - 1), statistics.fmean(gains), deviation))
            if points:
                x, y, bars = zip(*points, strict=True)
                label = f'{setting.name}, {"prose" if prose else "Python source"}'
                axes.errorbar(x, y, bars, fmt=marker + line, color=color, capsize=3, ms=5, label=label)
    for name, budget, gain in PUBLISHED_POINTS:
        axes.plot(
            budget, gain, 'x', color=QUIET, ms=7, label='published, other models and data' if name == '3B' else None
        )
        axes.annotate(name, (budget, gain), xytext=(6, 3), textcoords='offset points', color=QUIET, fontsize=8)
    axes.axhline(0, color='#3c3c3c', lw=1)
    axes.set_xscale('log')
    axes.set_xlabel('tokens of the baseline per parameter')
    axes.set_ylabel("baseline's final loss minus TST's")
    axes.legend(frameon=False, fontsize=8)
    finish(axes)
    figure.savefig(output)
