"""The comparison as text."""

from __future__ import annotations

from collections.abc import Sequence

from composer_tst.cli.compare.fairness import MARK, is_marked, what_is_known
from composer_tst.cli.compare.runs import Run
from composer_tst.cli.compare.speedup import iso_loss_speedup

EXPLAINED = (
    "iso-loss speed-up: the baseline's steps to the run's final loss, over the run's; an upper bound, for the baseline"
    '\nlowers its learning rate only at its own end.'
)


NEVER_AS_LOW = 'better than the baseline ever was'
NOT_KNOWN = 'not known: the event files do not tell; lr_monitor in callbacks and log_config: true make later runs tell.'
ONE_SEED = 'One pair of runs is one seed: a small difference may be chance.'


def speedup_text(baseline: Run, run: Run) -> str:
    """The iso-loss speed-up, or that the baseline did not come as low."""
    ratio = iso_loss_speedup(baseline.validation, run.validation)
    return NEVER_AS_LOW if ratio is None else f'{ratio:.2f}x'


def change(baseline: Run, run: Run, digits: int = 4) -> str:
    """How much better or worse a run ends."""
    difference = run.final_loss - baseline.final_loss
    shown = f'{abs(difference):.{digits}f}'
    return 'level' if not float(shown) else f'{"better" if difference < 0 else "worse"} {shown}'


def table(runs: Sequence[Run]) -> str:
    """The comparison as aligned text, a line a run; ``runs[0]`` is the baseline."""
    baseline = runs[0]
    rows = [('run', 'final val loss', 'vs baseline', 'steps', 'data tokens', 'iso-loss speed-up')]
    for run in runs:
        is_baseline = run is baseline
        mark = f' {MARK}' if is_marked(runs, run) else ''
        rows.append(
            (
                run.name + mark,
                f'{run.final_loss:.4f}',
                '-' if is_baseline else change(baseline, run),
                f'{run.final_step:,}',
                f'{run.tokens_at([run.final_step])[0]:,.0f}',
                '-' if is_baseline else speedup_text(baseline, run),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        '  '.join(
            # names to the left, numbers to the right, the last column ragged
            cell.ljust(width) if column == 0 else cell if column == len(row) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    if any(row[-1].endswith('x') for row in rows[1:]):
        lines += ['', EXPLAINED]
    known = [what_is_known(baseline, run) for run in runs[1:]]
    lines += ['', *known]
    if any('not known' in each for each in known):
        lines.append(NOT_KNOWN)
    if len(runs) == 2:
        lines += ['', ONE_SEED]
    return '\n'.join(lines)
