"""The comparison as text."""

from __future__ import annotations

from collections.abc import Sequence

from composer_tst.cli.compare.fairness import MARK, is_marked
from composer_tst.cli.compare.runs import Run
from composer_tst.cli.compare.speedup import iso_loss_speedup

EXPLAINED = (
    "iso-loss speed-up: the baseline's steps to the run's final loss, over the run's; an upper bound, for the baseline"
    '\nlowers its learning rate only at its own end.'
)


def speedup_text(baseline: Run, run: Run) -> str:
    """The iso-loss speed-up, or that the baseline did not come as low."""
    ratio = iso_loss_speedup(baseline.validation, run.validation)
    return 'not reached' if ratio is None else f'{ratio:.2f}x'


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
                '-' if is_baseline else f'{run.final_loss - baseline.final_loss:+.4f}',
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
    return '\n'.join(lines)
