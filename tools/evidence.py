"""Train everything that docs/evidence.md reports, and write it.

    python tools/evidence.py --data data/quickstart

Runs that are finished are kept in ``--runs`` and not trained again, unless what they depend on has changed: stop it at
any time, and run it again to go on. The page is written anew after each experiment, with what there is.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from experiments.report import Runs, write
from experiments.settings import BASELINE, BEYOND, SCALES, Experiment, beyond, experiments, finals
from experiments.training import Job, Result, train_all


def main(
    data: Annotated[Path, typer.Option(help='What prepare_data.py wrote.')] = Path('data/quickstart'),
    scale: Annotated[str, typer.Option(help=f'{", ".join(SCALES)}: tools/experiments/settings.py.')] = 'cpu',
    runs: Annotated[Path, typer.Option(help='Where runs and their results are kept.')] = Path('runs/evidence'),
    output: Annotated[
        Path | None, typer.Option(help='The page, docs/evidence_SCALE.md, or docs/evidence.md for cpu, with pictures.')
    ] = None,
) -> None:
    """Rerun the evidence and write its page."""
    if scale not in SCALES:
        raise typer.BadParameter(f'{scale} is no scale: choose {" or ".join(SCALES)}.', param_hint='--scale')
    size, folder = SCALES[scale], runs / scale
    if size.device == 'cuda' and not torch.cuda.is_available():
        raise typer.BadParameter(f'{scale} needs a GPU, and torch sees none.', param_hint='--scale')
    page = output or Path('docs', 'evidence.md' if scale == 'cpu' else f'evidence_{scale}.md')
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[Job, Result] = {}

    def train(jobs: Iterable[Job]) -> None:
        results.update(train_all(jobs, data, folder, size.workers))

    train(Job(BASELINE, size.seeds[0], lr, size) for lr in size.learning_rates)
    lr = min(results, key=lambda job: results[job].final_loss).lr
    done: list[Experiment] = []
    to_come = experiments(size)
    while to_come:
        experiment = to_come.pop(0)
        done.append(experiment)
        for seed in experiment.seeds:
            train(Job(setting, seed, lr, size) for setting in experiment.settings)
            write(page, Runs(results, lr, size), done, to_come)
        if experiment.title == BEYOND:
            losses = {setting: results[Job(setting, size.seeds[0], lr, size)].final_loss for setting in beyond()}
            to_come.insert(0, finals(size, losses))


if __name__ == '__main__':
    typer.run(main)
