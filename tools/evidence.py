"""Train everything that docs/evidence.md reports, and write it.

    python tools/evidence.py --data data/quickstart

Runs that are finished are kept in ``--runs`` and not trained again, unless their settings have changed: stop it at any
time, and run it again to go on. The page is written anew after each experiment, with what there is.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from experiments.report import Runs, write
from experiments.settings import BASELINE, SCALES, Experiment, Scale, experiments
from experiments.training import Job, Result, train_all

FINALISTS = 2


def main(
    data: Annotated[Path, typer.Option(help='What prepare_data.py wrote.')] = Path('data/quickstart'),
    scale: Annotated[str, typer.Option(help='cpu or gpu.')] = 'cpu',
    runs: Annotated[Path, typer.Option(help='Where runs and their results are kept.')] = Path('runs/evidence'),
    output: Annotated[Path, typer.Option(help='The page; pictures go beside it.')] = Path('docs/evidence.md'),
) -> None:
    """Rerun the evidence and write its page."""
    if scale not in SCALES:
        raise typer.BadParameter(f'{scale} is no scale: choose {" or ".join(SCALES)}.', param_hint='--scale')
    size, folder = SCALES[scale], runs / scale
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[Job, Result] = {}

    def train(jobs: Iterable[Job]) -> None:
        results.update(train_all(jobs, data, folder, size.workers))

    train(Job(BASELINE, size.seeds[0], lr, size) for lr in size.learning_rates)
    lr = min(results, key=lambda job: results[job].final_loss).lr
    done: list[Experiment] = []
    for experiment in experiments(size):
        train(Job(setting, seed, lr, size) for setting in experiment.settings for seed in experiment.seeds)
        if experiment.title == 'Beyond the paper':
            train(finals(experiment, results, lr, size))
        done.append(experiment)
        write(output, Runs(results, lr, size), done)


def finals(experiment: Experiment, results: dict[Job, Result], lr: float, scale: Scale) -> list[Job]:
    """The best settings at the first seed, at all seeds."""
    settings = [setting for setting in experiment.settings if setting.algorithm]
    settings.sort(key=lambda setting: results[Job(setting, scale.seeds[0], lr, scale)].final_loss)
    return [Job(setting, seed, lr, scale) for setting in settings[:FINALISTS] for seed in scale.seeds]


if __name__ == '__main__':
    typer.run(main)
