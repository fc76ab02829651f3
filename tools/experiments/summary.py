"""The summary of the record that the package brings: a row a cell, which is a setting at a scale."""

import csv
import statistics
from pathlib import Path

from tools.experiments.judge import known, of_any_size, over_best, over_plain, seeds_of
from tools.experiments.questions import asked
from tools.experiments.record import Record
from tools.experiments.scales import SCALES
from tools.experiments.settings import BASELINE, LIMITED, bags

SUMMARY = Path('composer_tst/cli/plan/losses/evidence.csv')
COLUMNS = (
    *('scale', 'text', 'parameters', 'tokens_per_parameter', 'steps', 'tokens_per_step', 'setting'),
    *('bag_sizes', 'ends', 'expand', 'rate', 'seeds', 'final_loss', 'change', 'deviation'),
    *('change_from_best', 'deviation_from_best', 'seeds_from_best'),
)


def write_summary(path: Path, record: Record) -> None:
    """Every cell that was run at three seeds or more: its loss, and the change from plain training.

    In steps of its own size; and from the best plain run of the same model on as many tokens, where plain training was
    run in steps of more than one size. Runs on limited data are left out: they have a baseline of their own.
    """
    settings = {setting.name: setting for ask in asked() for setting in (BASELINE, *ask.settings)}
    with path.open('w', newline='') as file:
        lines = csv.writer(file, lineterminator='\n')
        lines.writerow(COLUMNS)
        for scale in SCALES.values():
            names = dict.fromkeys(row.setting for row in record.rows.values() if row.scale == scale.name)
            for setting in (settings[name] for name in sorted(names) if name in settings and LIMITED not in name):
                losses = record.judged(scale, setting, seeds_of(record, scale, setting)).values()
                change = over_plain(record, scale, setting)
                if not known(losses) or not known(change):
                    continue
                told = [scale.name, scale.text, scale.parameters, f'{scale.tokens_per_parameter:.2f}', scale.steps]
                told += [scale.tokens_per_step, setting.name, *(bags(setting) or ('', '', ''))]
                told += [f'{record.rate(scale, setting):g}', len(change), f'{statistics.fmean(losses):.4f}']
                best = over_best(record, scale, setting) if len(of_any_size(record, scale)) > 1 else []
                lines.writerow([*told, *_mean(change), *_mean(best), f'{len(best)}' if known(best) else ''])


def _mean(change: list[float]) -> list[str]:
    if not known(change):
        return ['', '']
    return [f'{statistics.fmean(change):.4f}', f'{statistics.stdev(change):.4f}']
