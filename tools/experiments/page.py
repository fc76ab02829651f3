"""The evidence as a page."""

from collections.abc import Sequence
from pathlib import Path

from tools.experiments.pictures import draw_grid, draw_settings
from tools.experiments.report import Runs, grid, iso_loss, table, verdict
from tools.experiments.scales import GRID_BAGS, GRID_SHARES, Experiment, experiments

BOLD = """Bold: by more than two standard deviations of the difference. Of settings that are no better or worse, one in
13 is bold at three seeds, one in 36 at four, one in 90 at five (Student's t). In brackets, the number of seeds where it
is not three, or not that of a row that says it."""
TERMS = """Losses are next-token validation losses in nats per token. A difference is between runs of the same seed, ±
is the sample standard deviation over seeds."""
ISO_LOSS = """How many times the steps the baseline needs for the same final loss; its interval is one standard
deviation of the difference from the baseline to either side:"""
FRESH = 'A setting that was chosen for its loss at one seed is judged at others.'


def write(output: Path, scales: Sequence[Runs]) -> None:
    """Write the page on the first of the scales, with columns for the others, and its pictures beside it."""
    runs, *others = scales
    planned = experiments(runs.scale, runs.at_first_seed())
    done = _done(runs)
    compared = [setting for e in done if e.form != 'grid' for setting in e.settings]
    draw_settings(runs, compared, output.with_name(f'{output.stem}_settings.png'))
    parts = [
        '# Evidence on a small MPT, at 0.8 tokens per parameter',
        *map(about, scales),
        TERMS,
        '## What it says',
        verdict(runs, done),
        BOLD,
    ]
    for other in others:
        parts += [f'At the scale `{other.scale.name}`:', verdict(other, _done(other))]
    parts += [FRESH] if runs.scale.fresh_seeds else []
    if missing := [
        each.title for each in planned if not all(runs.get(s, x) for s in each.settings for x in each.seeds)
    ]:
        parts += [f'Not run yet, or not at every seed: {"; ".join(missing)}.']
    parts += [f'![Settings run at three seeds or more, against the baseline]({output.stem}_settings.png)']
    for experiment in done:
        if experiment.form == 'table' and len(experiment.seeds) > 1:
            continue  # its settings are in the table above
        parts += [f'## {experiment.title}, at 0.8 tokens per parameter', experiment.question]
        if experiment.form == 'grid':
            draw_grid(runs, output.with_name(f'{output.stem}_grid.png'))
            parts += [
                "Final loss minus the baseline's.",
                grid(runs, GRID_BAGS, GRID_SHARES, runs.scale.seeds),
                f'![Loss over the share of superposed steps]({output.stem}_grid.png)',
            ]
        else:
            of_others = others if experiment.form == 'iso-loss' else ()
            parts += [table(runs, experiment.settings, experiment.seeds, of_others)]
        if experiment.form == 'iso-loss':
            parts += [
                ISO_LOSS,
                '\n'.join(filter(None, (iso_loss(runs, s) for s in experiment.settings if s.algorithm))),
            ]
    output.write_text('\n\n'.join(part for part in parts if part) + '\n')


def _done(runs: Runs) -> list[Experiment]:
    """Experiments with most of their settings run at a seed: they share settings with others."""
    planned = experiments(runs.scale, runs.at_first_seed())
    return [e for e in planned if 2 * len([s for s in e.settings if runs.all(s, e.seeds)]) > len(e.settings)]


def about(runs: Runs) -> str:
    """What was run at a scale, where, and how long it took."""
    scale, results = runs.scale, list(runs.results.values())
    rates = runs.rates()
    group = 'tokens' if scale.tokens_per_parameter else scale.name
    hours = sum(result.seconds for result in results) / scale.workers / 3600
    tuned = f"""is the one at which the baseline is best: its
final losses at seed {scale.seeds[0]} are {', '.join(f'{lr:g}: {rates[lr]:.3f}' for lr in rates)}; all that follows is
at {runs.lr:g}"""
    return f"""Scale `{scale.name}`: {scale.about} {results[0].parameters / 1e6:.2f}M parameters, {scale.steps:,} steps,
{scale.warmup} of warmup, decay over the last tenth. The learning rate {tuned if len(rates) > 1 else f'is {runs.lr:g}'}.
{len(results)} runs, {scale.workers} at a time, {hours:.1f} hours of training on
{'; '.join(dict.fromkeys(result.machine for result in results))}. Command: `make evidence SCALE={group}`."""
