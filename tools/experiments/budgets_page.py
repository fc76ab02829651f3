"""The evidence over budgets as a page and a picture."""

import csv
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tools.experiments.budgets import (
    CHECKED,
    CODE,
    DATA,
    GRID_BAGS,
    GRID_SHARES,
    LARGE_STEPS,
    LARGEST,
    PARAMETERS,
    PROSE,
    PUBLISHED_BATCH,
    RECIPES,
    RECORDED,
    SEEDS,
    SMALL_BAGS,
    TUNED,
    checks,
    of_budget,
    read_twice,
    seeds_of,
)
from tools.experiments.page import BOLD, FRESH, TERMS, about
from tools.experiments.pictures import QUIET, finish
from tools.experiments.report import OTHERS, Runs, grid, head, row, shown, spread, table, tokens_per_parameter, verdict
from tools.experiments.scales import BASELINE, PHASES_BATCH, PUBLISHED, S4, S4_BATCH, Experiment, Setting, limited

# Tokens per parameter and gain of the published pairs (paper, tables of its sections 4 and 5).
PUBLISHED_POINTS = (
    ('270M', 157, 0.070),
    ('270M', 783, 0.044),
    ('600M', 70, 0.076),
    ('3B', 14, 0.132),
    ('10B-A1B, in 39 % of the GPU hours', 105, 0.016),
)
# Of what is drawn color and line, and the marker of each kind of run.
DRAWN = {
    S4: ('#0072b2', '-'),
    S4_BATCH: ('#0072b2', ':'),
    PUBLISHED: ('#d55e00', '-'),
    PUBLISHED_BATCH: ('#d55e00', ':'),
    PHASES_BATCH: ('#009e73', '-'),
    SMALL_BAGS: ('#7b3294', '-'),
}
MARKERS = {CODE: 'o', 'larger steps': 'D', PROSE: 's'}
INTRODUCTION = """How much lower superposition ends than plain training of as many steps, by budget: a Llama of 362,816
parameters (262,144 of them embedding and head) through `hf_causal_lm`, AdamW with betas 0.9 and 0.95 and a
decoupled weight decay of 2e-4 a step (torch's of 0.1 at a rate of 2e-3), gradients clipped at 1.0,
warmup-stable-decay, the learning rate that is best for the baseline. Tokens per parameter are positions of
the baseline by all parameters; by those that are neither embedding nor head they are 3.6 times as many.
`make evidence` trains all of it, and goes on from [the record](evidence_tokens.json)."""
ABOUT_DATA = """The Python source is that of every package that `make install` brings and of the standard library, each
file once (`make data/tokens/stats.json`; versions in [evidence_versions.txt](evidence_versions.txt)):
43,089 files, 220.9M tokens, of which 209.0M to train on (1,632,923 rows). No run but those on limited
data reads a row twice: the longest reads 215,840. Losses are of the first 4,096 of 9,550 rows that no run
trains on. Another set of packages gives other text of the kind; 3,042 of the files are of packages that
the interpreter itself had, whose versions are not recorded: they are left out where the text is made anew.
Seven cells were trained again on a clean checkout, on such text (192.1M tokens): at 0.99 tokens per
parameter the baseline's of seed 18, s = 4 of 17 and s = 6 of 19 ended at 3.989, 4.926 and 4.999, at 5.1
s = 4 of 18 and s = 6 of 19 at 2.797 and 2.773, at 20 the baseline's and s = 4 of 18 at 2.190 and 2.089, which is
up to two deviations from those below.
The prose is dictionaries and manuals that Debian 12 packages (dict-gcide 0.48.5+nmu2, dict-wn 3.0-37,
dict-foldoc 20230119-1, dict-jargon 4.4.7-3.1, linux-doc-6.1 6.1.192-3): 13,896 documents, 41.6M tokens of
a tokenizer of their own, of which 40.7M to train on (318,120 rows); losses are of the first 4,096 of 6,875
others. Every seed is judged on the same rows: a deviation is that of training alone. The commands:

```bash
mkdir -p data/debian && cd data/debian
apt-get download dict-gcide dict-wn dict-foldoc dict-jargon linux-doc-6.1
for package in *.deb; do dpkg-deb -x "$package" .; done && cd ../..
.venv/bin/python -m tools.experiments.corpus data/corpus/prose.jsonl data/debian
.venv/bin/composer-tst prepare-data data/corpus/prose.jsonl --output data/prose --seq-len 128 --train-tokenizer 2048 \\
    --skip-bad --split train=0.98,val=0.02
```

`python -m tools.experiments.run --scale tokens --data FOLDER --docs ELSEWHERE` asks the same of any folder that
`prepare-data` wrote in rows of 128 with a vocabulary of at most 2,048; without a split `limited` of as
many rows as a baseline reads, that question is left out, and the command says so."""
OTHER_MODELS = """Bars: one standard deviation of the difference over seeds, of which there are three, or as many as the
table has in brackets; points of a budget are drawn side by side. Hollow points are at a rate of their own, where the
baseline's is not the best for them (second table). Published points are of other models, data and schedules, and of
the bag sizes of their runs."""
SMALL = """s = 2 with r = 0.4 was chosen by the grid at 20 tokens per parameter in 7,100 steps of Python: there it is of
seeds that did not choose it."""
STEPS = """The same 7.27M tokens in steps of 1,024 and of 4,096, each at the learning rate that is best for its
baseline, at seeds 17 to 19, the first of which chose s = 2 with r = 0.4. What size is best was not searched. The last
column says what a gain in the smaller steps is worth beside plain training in larger ones, at as many operations:"""
OWN_RATES = """The same, each at the learning rate that is best for it at seed 17, which is in square brackets where it
is not the baseline's. Seed 17 is among the seeds, so that a rate that chance made best there flatters a little. On
prose at 20, and of the settings that are not here, no other rate was tried:"""
RATES = """The first table is of runs at the rate that is best for the baseline, the second at each setting's own. Final
losses at one seed. What is chosen there, a rate or the settings of the last table, is often chosen by less than the
noise: if that seed is trained again on other text, another may be, and its runs are then added."""


LIMITED_BASELINE = """The gains are over a baseline on the same few files. Against the baseline on all files, which
also reads no row twice, that one ends """


def write(output: Path, scales: Sequence[Runs]) -> None:
    """Write the page, and its picture beside it."""
    draw_gain(scales, output.with_name(f'{output.stem}_budgets.png'))
    parts = ['# Evidence over budgets, on a small Llama', INTRODUCTION, TERMS]
    parts += ['## The gain over the budget', f'![Gain over tokens per parameter]({output.stem}_budgets.png)']
    parts += [OTHER_MODELS, gain_table(scales), BOLD, SMALL, OWN_RATES, own_rates_table(scales)]
    parts += size_of_steps(scales)
    missing: list[str] = []
    for runs in scales:
        planned = of_budget(runs.scale, runs.at_first_seed())
        found = [part for experiment in planned for part in _experiment(runs, experiment)]
        parts += [*found, verdict(runs, planned), FRESH] if found else []
        for experiment in planned:
            if not all(runs.get(setting, seed) for setting in experiment.settings for seed in experiment.seeds):
                missing.append(f'{experiment.title} (`{runs.scale.name}`)')
        if not set(checks(runs, CHECKED.get(runs.scale.name, ()))) <= runs.results.keys():
            missing.append(f'Learning rates (`{runs.scale.name}`)')
    if missing:
        parts += [f'Not run yet, or not at every seed: {"; ".join(missing)}.']
    parts += ['## Learning rates', RATES, *map(rates, scales)]
    parts += ['## Data', about_data(scales), '## Scales', *map(about, scales)]
    parts += ['## Every run', *map(every_run, scales)]
    output.write_text('\n\n'.join(part for part in parts if part) + '\n')


def size_of_steps(scales: Sequence[Runs]) -> list[str]:
    """The same tokens in steps of two sizes: what larger ones change, and plain training in them against all else."""
    of = {runs.scale.name: runs for runs in scales}
    if not {LARGEST.name, LARGE_STEPS.name} <= of.keys():
        return []
    small, large = of[LARGEST.name], of[LARGE_STEPS.name]

    def change(setting: Setting, than: Setting) -> str:
        """One in larger steps minus another in smaller ones, at the seeds of both."""
        pairs = [(large.get(setting, seed), small.get(than, seed)) for seed in SEEDS]
        differences = [a.final_loss - b.final_loss for a, b in pairs if a and b]
        return shown(differences) + _number(differences)

    columns = ['setting', *(f'{each.scale.steps:,} steps' for each in (small, large)), 'larger minus smaller']
    lines = head([*columns, 'plain in larger minus it in smaller'])
    for setting in (*RECIPES, SMALL_BAGS):
        losses = [spread(each.losses(setting, SEEDS)) for each in (small, large)]
        changes = [change(setting, setting), change(BASELINE, setting)]
        lines.append(row([setting.name, *losses, *changes]))
    return ['## The size of a step, 20 tokens per parameter', STEPS, '\n'.join(lines)]


def about_data(scales: Sequence[Runs]) -> str:
    """What was trained on."""
    others = sorted({runs.scale.data for runs in scales} - {*DATA.values()})
    if others:
        again = [read_twice(data) for data in map(Path, others) if (data / 'stats.json').exists()]
        named = ' and '.join(f'`{data}`' for data in others)
        return ' '.join([f'What `prepare-data` wrote to {named}.', *filter(None, again)])
    anew = [
        f'{job.setting.name}, {job.lr:g}, seed {job.seed} (`{runs.scale.name}`, {result.text:,} tokens)'
        for runs in scales
        for job, result in runs.results.items()
        if result.text not in (0, RECORDED[runs.scale.data])
    ]
    return '\n\n'.join([ABOUT_DATA, *([f'Of text that was made anew: {"; ".join(anew)}.'] if anew else [])])


def rates(runs: Runs) -> str:
    """The learning rates that were tried, by setting, and what differs with the best of each."""
    settings = dict.fromkeys(job.setting for job in runs.results)
    tried = {setting: losses for setting in settings if len(losses := runs.rates(setting)) > 1}
    best = {setting: min(losses.values()) for setting, losses in tried.items()}
    lines = []
    for setting in sorted(tried, key=lambda setting: (setting != BASELINE, setting.name)):
        losses = tried[setting]
        line = f'- {setting.name}: {", ".join(f"{lr:g}: {losses[lr]:.3f}" for lr in sorted(losses))}'
        if setting != BASELINE and BASELINE in best and runs.lr in losses:
            line += f'; minus the baseline {losses[runs.lr] - best[BASELINE]:+.3f} at its best rate, '
            line += f'{best[setting] - best[BASELINE]:+.3f} each at its own'
        lines.append(
            line + ('; lowest at the edge' if best[setting] in (losses[min(losses)], losses[max(losses)]) else '')
        )
    return '\n'.join(
        [f'`{runs.scale.name}`, {tokens_per_parameter(runs.scale)}, seed {runs.scale.seeds[0]}:', '', *lines]
    )


def gain_table(scales: Sequence[Runs]) -> str:
    """Final loss minus the baseline's, a row a budget and a column a setting; first the baseline's own."""
    settings = (*RECIPES, SMALL_BAGS)
    names = [setting.name for setting in settings if setting != BASELINE]
    columns = ['tokens per parameter', 'steps', 'scale', 'baseline', *(f'{name}, minus baseline' for name in names)]
    lines = head(columns)
    for runs in scales:
        cells = [f'{runs.scale.tokens_per_parameter:.2g}', f'{runs.scale.steps:,}', f'`{runs.scale.name}`']
        for setting in settings:
            differences = runs.differences(setting, BASELINE, seeds_of(setting, runs.scale))
            losses = runs.losses(setting, runs.scale.all_seeds)
            cells.append((spread(losses) if setting == BASELINE else shown(differences)) + _number(differences))
        lines.append(row(cells))
    return '\n'.join(lines)


def own_rates_table(scales: Sequence[Runs]) -> str:
    """Final loss minus the baseline's, each at its own best learning rate, where both were tuned."""
    lines = head(['tokens per parameter', 'steps', 'scale', *(setting.name for setting in TUNED)])
    for runs in (runs for runs in scales if runs.scale.name in CHECKED):
        cells = [f'{runs.scale.tokens_per_parameter:.2g}', f'{runs.scale.steps:,}', f'`{runs.scale.name}`']
        for setting in TUNED:
            if len(runs.rates(setting)) < 2:
                cells.append('')
                continue
            best, differences = runs.best_rate(setting), runs.at_own_rates(setting, runs.scale.all_seeds)
            at = '' if best == runs.lr else f' [{best:g}]'
            cells.append(shown(differences) + _number(differences) + at)
        lines.append(row(cells))
    return '\n'.join(lines)


def _number(differences: Sequence[float]) -> str:
    return f' ({len(differences)})' if len(differences) not in (0, len(SEEDS)) else ''


def every_run(runs: Runs) -> str:
    """Final losses by setting, learning rate and seed."""
    seeds = sorted({job.seed for job in runs.results})
    lines = head([f'`{runs.scale.name}`', 'rate', *map(str, seeds)])
    found: dict[tuple[str, float], dict[int, float]] = {}
    for job, result in runs.results.items():
        found.setdefault((job.setting.name, job.lr), {})[job.seed] = result.final_loss
    for name, lr in sorted(found, key=lambda key: (key[0] != BASELINE.name, key)):
        losses = found[name, lr]
        cells = (f'{losses[seed]:.3f}' if seed in losses else '' for seed in seeds)
        lines.append(row([name, f'{lr:g}', *cells]))
    return '\n'.join([f'At {tokens_per_parameter(runs.scale)}:', '', *lines])


def write_measured(output: Path, scales: Sequence[Runs]) -> None:
    """The gains again, for `composer-tst plan`: a line a setting and budget at which every seed was run."""
    with output.open('w', newline='') as file:
        lines = csv.writer(file, lineterminator='\n')
        names = ['text', 'parameters', 'tokens_per_parameter', 'steps', 'bag_sizes', 'ends', 'expand']
        lines.writerow([*names, 'seeds', 'change', 'deviation'])
        for runs in scales:
            text = _text(runs)
            settings = sorted({job.setting for job in runs.results} - {*RECIPES}, key=lambda setting: setting.name)
            for setting in (*RECIPES, *settings):
                changes = runs.differences(setting, BASELINE, seeds_of(setting, runs.scale))
                if (bags := _bags(setting)) and len(changes) >= len(SEEDS) and all(map(math.isfinite, changes)):
                    budget = [text, PARAMETERS, f'{runs.scale.tokens_per_parameter:.2f}', runs.scale.steps]
                    change = [len(changes), f'{statistics.fmean(changes):.4f}', f'{statistics.stdev(changes):.4f}']
                    lines.writerow([*budget, *bags, *change])


def _bags(setting: Setting) -> tuple[str, str, str] | None:
    """Bag sizes, where they end and `expand`; None where a setting is not told by these and costs as much as plain."""
    start = 'algorithms.token_superposition.'
    named = (part.removeprefix(start).split('=', 1) for part in setting.algorithm if part.startswith(start))
    given = {name: json.loads(value) for name, value in named}
    told = given.keys() <= {'bag_size', 'duration', 'phases', 'expand'} and len(given) == len(setting.algorithm)
    if not given or not told or setting.cost != 1:
        return None
    phases = given.get('phases') or [{'bag_size': given['bag_size'], 'until': given['duration']}]
    bags, ends = zip(*((str(each['bag_size']), each['until'].removesuffix('dur')) for each in phases), strict=True)
    return ' '.join(bags), ' '.join(ends), given.get('expand', 'sequence')


def _experiment(runs: Runs, experiment: Experiment) -> list[str]:
    if len(of_budget(runs.scale)) == 1:  # all of it is in the table over budgets
        return []
    if not any(runs.all(setting, experiment.seeds) for setting in experiment.settings if setting.algorithm):
        return []
    heading = [f'## {experiment.title}, {tokens_per_parameter(runs.scale)}', experiment.question]
    if experiment.form == 'grid':
        return [*heading, "Final loss minus the baseline's.", grid(runs, GRID_BAGS, GRID_SHARES, experiment.seeds)]
    if experiment.form == 'limited':
        against = {f'{name}, limited data': limited(setting) for name, setting in OTHERS.items()}
        above = spread(runs.differences(limited(BASELINE), BASELINE, experiment.seeds), signed=True)
        return [
            *heading,
            table(runs, experiment.settings, experiment.seeds, against=against),
            f'{LIMITED_BASELINE}{above}.',
        ]
    return [*heading, table(runs, experiment.settings, experiment.seeds)]


def draw_gain(scales: Sequence[Runs], output: Path) -> None:
    """How much lower TST ends, over tokens per parameter, with its deviation; and the published pairs."""
    figure = Figure(figsize=(8, 5.2), dpi=140, layout='constrained')
    markers = {text: MARKERS.get(text, 'o') for text in dict.fromkeys(map(_drawn_as, scales))}
    near, far = figure.subplots(2, sharex=True, height_ratios=(2, 1))  # the runs of few steps lose ten times as much
    for number, (setting, (color, line)) in enumerate(DRAWN.items()):
        for own, text in itertools.product((False, True), markers):
            of_text = [runs for runs in scales if _drawn_as(runs) == text]
            points = [point for runs in of_text if (point := _point(runs, setting, own))]
            if points:
                x, y, bars = zip(*points, strict=True)
                x = [tokens * 1.04 ** (number - 2) for tokens in x]  # side by side
                style: dict[str, Any] = {'mfc': 'white', 'ls': ''} if own else {'ls': line}
                for axes in (near, far):
                    axes.errorbar(x, y, bars, color=color, marker=markers[text], capsize=3, ms=5, lw=1.2, **style)
    for name, tokens, gain in PUBLISHED_POINTS:
        near.plot(tokens, gain, 'x', color=QUIET, ms=7)
        near.annotate(name, (tokens, gain), xytext=(6, 3), textcoords='offset points', color=QUIET, fontsize=8)
    for axes in (near, far):
        axes.axhline(0, color='#3c3c3c', lw=1)
        axes.set_xscale('log')
        axes.set_xlim(0.7, 1500)
        axes.xaxis.set_major_formatter('{x:g}')
        finish(axes)
    near.set_ylim(-0.26, 0.16)
    quiet: dict[str, Any] = {'color': QUIET, 'ls': '', 'ms': 5}
    near.legend(
        handles=[
            *(Line2D([], [], color=color, ls=line, label=setting.name) for setting, (color, line) in DRAWN.items()),
            *(Line2D([], [], marker=marker, label=text, **quiet) for text, marker in markers.items()),
            Line2D([], [], marker='o', mfc='white', label='at a learning rate of its own', **quiet),
            Line2D([], [], marker='x', label='published', **quiet),
        ],
        **{'frameon': False, 'fontsize': 7.5, 'loc': 'lower right'},
    )
    far.set_ylim(-1.4, 0.1)
    far.set_xlabel('tokens of the baseline per parameter')
    figure.supylabel("baseline's final loss minus TST's, at equal steps")
    figure.savefig(output)


def _point(runs: Runs, setting: Setting, own: bool) -> tuple[float, float, float] | None:
    """Tokens per parameter, gain and its deviation, at the baseline's learning rate or at another that is its own."""
    if own and (setting not in TUNED or not runs.rates(setting) or runs.best_rate(setting) == runs.lr):
        return None
    seeds = seeds_of(setting, runs.scale)
    changes = runs.at_own_rates(setting, seeds) if own else runs.differences(setting, BASELINE, seeds)
    if len(changes) < len(SEEDS) or not all(map(math.isfinite, changes)):
        return None
    return runs.scale.tokens_per_parameter or 0, -statistics.fmean(changes), statistics.stdev(changes)


def _drawn_as(runs: Runs) -> str:
    if runs.scale.name == LARGE_STEPS.name:
        return 'larger steps'
    return _text(runs)


def _text(runs: Runs) -> str:
    return next((text for text, data in DATA.items() if data == runs.scale.data), Path(runs.scale.data).name)
