"""Train everything that docs/evidence.md reports, and write it.

    python tools/evidence.py --data data/quickstart

Runs that are finished are kept in ``--runs`` and not trained again, unless what they depend on has changed: stop it at
any time, and run it again to go on. The page is written anew as runs end, with what there is, and beside it what each
run came to, as ``evidence_SCALE.json``: with ``--known`` another machine goes on from there.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from experiments.page import write
from experiments.report import Runs
from experiments.settings import BASELINE, SCALES, Scale, experiments
from experiments.training import Job, Result, train_all

from composer_tst.progress import progress


def main(
    data: Annotated[Path, typer.Option(help='What prepare_data.py wrote.')] = Path('data/quickstart'),
    scale: Annotated[str, typer.Option(help=f'{" or ".join(SCALES)}: tools/experiments/settings.py.')] = 'cpu',
    runs: Annotated[Path, typer.Option(help='Where runs and their results are kept.')] = Path('runs/evidence'),
    page: Annotated[Path, typer.Option(help='The page; pictures and records go beside it.')] = Path('docs/evidence.md'),
    known: Annotated[Path | None, typer.Option(help='A record of runs that need not be trained again.')] = None,
) -> None:
    """Rerun the evidence and write its page."""
    if scale not in SCALES:
        raise typer.BadParameter(f'{scale} is no scale: choose {" or ".join(SCALES)}.', param_hint='--scale')
    size, folder = SCALES[scale], runs / scale
    if size.device == 'cuda' and not torch.cuda.is_available():
        raise typer.BadParameter(f'{scale} needs a GPU, and torch sees none.', param_hint='--scale')
    folder.mkdir(parents=True, exist_ok=True)
    page.parent.mkdir(parents=True, exist_ok=True)
    if known:
        for run in json.loads(known.read_text()):
            (folder / f'{run["name"]}.json').write_text(json.dumps(run['result'], indent=1) + '\n')
    trained = Runs({}, size)

    bar = progress(len(_planned(size, trained)), 'runs', 'evidence')

    def train(jobs: Iterable[Job]) -> None:
        for at, results in enumerate(train_all(jobs, data, folder, size.workers)):
            new = len(results.keys() - trained.results.keys())
            trained.results.update(results)
            # The best of an experiment are judged again, in runs that are not planned before it has ended.
            bar.total = max(bar.total, len(_planned(size, trained)))
            if at == 0:  # what was trained before says nothing of how long the rest takes
                bar.initial += new
            bar.update(new)
            if not trained.rates():
                continue
            entries = [
                {'name': job.name(data), 'setting': job.setting.name, 'seed': job.seed, 'lr': job.lr}
                | {'result': asdict(result)}
                for job, result in trained.results.items()
            ]
            _record(page, size).write_text(json.dumps(entries, indent=1) + '\n')
            write(page, [_read(page, other) for other in SCALES.values() if _record(page, other).exists()])

    train([Job(BASELINE, size.seeds[0], lr, size) for lr in size.learning_rates])
    # Large ones at their first seed, and at the others when all else is done.
    for large_at_all in (False, True):
        done = 0
        while done < len(planned := experiments(size, trained.at_first_seed())):
            experiment = planned[done]
            seeds = experiment.seeds if large_at_all or not experiment.large else experiment.seeds[:1]
            train(Job(setting, seed, trained.lr, size) for seed in seeds for setting in experiment.settings)
            done += 1
    bar.close()


def _planned(size: Scale, trained: Runs) -> set[Job]:
    """Every run that is known to be needed."""
    planned = experiments(size, trained.at_first_seed() if trained.rates() else None)
    tuning = {Job(BASELINE, size.seeds[0], lr, size) for lr in size.learning_rates}
    lr = trained.lr if trained.rates() else size.learning_rates[0]
    return tuning | {Job(setting, seed, lr, size) for e in planned for setting in e.settings for seed in e.seeds}


def _record(page: Path, scale: Scale) -> Path:
    return page.with_name(f'{page.stem}_{scale.name}.json')


def _read(page: Path, scale: Scale) -> Runs:
    """The runs of a record whose settings are still those of the scale."""
    settings = {setting.name: setting for experiment in experiments(scale) for setting in experiment.settings}
    return Runs(
        {
            Job(settings[run['setting']], run['seed'], run['lr'], scale): Result(**run['result'])
            for run in json.loads(_record(page, scale).read_text())
            if run['setting'] in settings
        },
        scale,
    )


if __name__ == '__main__':
    typer.run(main)
