"""Train everything that docs/evidence.md and docs/evidence_mpt.md report, and write them.

    python -m tools.experiments.run --scale tokens

Runs that are finished are kept in ``--runs`` and not trained again, unless what they depend on has changed: stop it at
any time, and run it again to go on. The page is written anew as runs end, with what there is, and beside it what each
run came to, as ``evidence_SCALE.json``: another machine goes on from there.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from composer_tst.cli.progress_bar import progress
from tools.experiments import budgets, budgets_page, page
from tools.experiments.budgets import BUDGETS, CHECKED, PROSE_BUDGETS, checks, of_budget, too_short
from tools.experiments.report import Runs
from tools.experiments.scales import (
    BASELINE,
    CPU,
    GPU,
    ROWS,
    Experiment,
    Scale,
    Setting,
    experiments,
)
from tools.experiments.train import Job, Result, finished, train_all


@dataclass(frozen=True)
class Group:
    """Scales that are trained by one command, one after another, and reported on one page.

    Args:
        scales: The scales.
        page: The page's name.
        write: Writes it.
        experiments: What is trained at a scale, given it and the final losses at its first seed.
        beside: Groups that are reported on the same page, in their order.
        checked: Settings whose learning rate is tuned too, by scale.
        measured: Where `composer-tst plan` finds what was gained, from the root of the repository.
    """

    scales: tuple[Scale, ...]
    page: str
    write: Callable[[Path, Sequence[Runs]], None]
    experiments: Callable[..., list[Experiment]]
    beside: tuple[str, ...] = ()
    checked: Mapping[str, Sequence[Setting]] = field(default_factory=dict)
    measured: str = ''


DOCS = Path('docs')
_MPT = ('cpu', 'rows', 'gpu')
GROUPS = {
    'tokens': Group(
        *((*BUDGETS, *PROSE_BUDGETS), 'evidence.md', budgets_page.write, of_budget),
        checked=CHECKED,
        measured='composer_tst/cli/plan/losses/small_llama.csv',
    ),
    **{size.name: Group((size,), 'evidence_mpt.md', page.write, experiments, _MPT) for size in (CPU, ROWS, GPU)},
}


def main(
    scale: Annotated[str, typer.Option(help=f'{" or ".join(GROUPS)}: tools/experiments/.')] = 'cpu',
    data: Annotated[
        Path | None, typer.Option(help="What prepare-data wrote, in place of the scale's own: give --docs, too.")
    ] = None,
    runs: Annotated[Path, typer.Option(help='Where runs and their results are kept.')] = Path('runs/evidence'),
    docs: Annotated[Path, typer.Option(help='Where the page, its pictures and the record go.')] = DOCS,
    known: Annotated[Path | None, typer.Option(help='Another record of runs that need not be trained again.')] = None,
) -> None:
    """Rerun the evidence and write its page."""
    if scale not in GROUPS:
        raise typer.BadParameter(f'{scale} is no scale: choose {" or ".join(GROUPS)}.', param_hint='--scale')
    group = GROUPS[scale]
    if known and not known.exists():
        raise typer.BadParameter(f'{known} is no file.', param_hint='--known')
    if data and not (data / 'stats.json').exists():
        raise typer.BadParameter(
            f'{data} is nothing that prepare-data wrote: stats.json is missing.', param_hint='--data'
        )
    ours = docs.resolve() == DOCS.resolve()
    if data and ours:
        raise typer.BadParameter(
            f'{docs} is the record of what make prepares, not of {data}: give --docs, another folder, with --data.',
            param_hint='--data',
        )
    if data and group.measured:
        group = replace(group, scales=budgets.on(data))
    if group.scales[0].device == 'cuda' and not torch.cuda.is_available():
        raise typer.BadParameter(f'{scale} needs a GPU, and torch sees none.', param_hint='--scale')
    docs.mkdir(parents=True, exist_ok=True)
    of_scale = {size: Runs({}, size) for size in group.scales}
    for size in of_scale:
        (runs / size.name).mkdir(parents=True, exist_ok=True)
    for source in (known, _record(docs, scale)):
        for run in json.loads(source.read_text()) if source and source.exists() else ():
            result = runs / run.get('scale', scale) / f'{run["name"]}.json'
            if result.parent.exists() and not result.exists():
                result.write_text(json.dumps(run['result'], indent=1) + '\n')
    for size, trained in of_scale.items():
        _load(group, size, trained, data or Path(size.data), runs / size.name)
    planned = {job.name(data or Path(size.data)) for size, trained in of_scale.items() for job in trained.results}
    record = _record(docs, scale)
    gone = (
        [run['name'] for run in json.loads(record.read_text()) if run['name'] not in planned] if record.exists() else []
    )
    if gone:
        typer.echo(
            f'{record} loses {len(gone)} runs, {gone[0]} first, for they are of no plan and config that is now.',
            err=True,
        )

    for folder in dict.fromkeys(data or Path(size.data) for size in group.scales):
        if other := budgets.other_text(folder):
            typer.echo(other, err=True)
        if data and group.measured and (again := budgets.read_twice(data)):
            typer.echo(again, err=True)

    def write() -> None:
        entries = [
            {'name': job.name(data or Path(size.data)), 'scale': size.name, 'setting': job.setting.name}
            | {'seed': job.seed, 'lr': job.lr, 'result': asdict(result)}
            for size, trained in of_scale.items()
            for job, result in sorted(trained.results.items(), key=lambda run: run[0].name(data or Path(size.data)))
        ]
        record.with_suffix('.part').write_text(json.dumps(entries, indent=1) + '\n')
        record.with_suffix('.part').rename(record)
        others = [_read(docs, name) for name in group.beside if name != scale and _record(docs, name).exists()]
        shown = [trained for trained in of_scale.values() if trained.rates()]
        group.write(docs / group.page, sorted([*shown, *others], key=lambda each: _order(each.scale)))
        if group.measured and ours:
            budgets_page.write_measured(Path(group.measured), shown)

    # The first question at every scale of the first text, then all others, then rates of their own.
    first_text = [size for size in of_scale if size.data == group.scales[0].data]
    rounds = [(size, 1, False) for size in first_text]
    rounds += [(size, None, rates) for rates in (False, True) for size in of_scale]
    for size, questions, rates in rounds:
        trained, folder = of_scale[size], data or Path(size.data)
        if _planned(group, size, trained) <= trained.results.keys() or (folder / 'stats.json').exists():
            _train(group, size, trained, folder, runs / size.name, write, questions, rates)
        elif rates:
            typer.echo(
                f'{size.name} is left out, for there are no data in {folder}: docs/{group.page} says how to make them.',
                err=True,
            )


def _load(group: Group, size: Scale, trained: Runs, data: Path, folder: Path) -> None:
    """Take up what has been trained of all that may ever be asked: what was once chosen by a map stays."""
    settings = dict.fromkeys(setting for experiment in group.experiments(size) for setting in experiment.settings)
    jobs = [
        Job(setting, seed, lr, size) for setting in settings for seed in size.all_seeds for lr in size.learning_rates
    ]
    trained.results.update(finished(jobs, data, folder))


def _train(
    group: Group,
    size: Scale,
    trained: Runs,
    data: Path,
    folder: Path,
    write: Callable[[], None],
    questions: int | None,
    rates: bool,
) -> None:
    """Train what a scale lacks of its first questions, or of all; and with ``rates``, of those that are tuned."""
    planned = _planned(group, size, trained)
    done = len(planned & trained.results.keys())
    bar = progress(len(planned), 'runs', f'evidence {size.name}', initial=done)

    def train(jobs: Iterable[Job]) -> None:
        for results in train_all(jobs, data, folder, size.workers):
            new = len(results.keys() - trained.results.keys())
            trained.results.update(results)
            # The best of an experiment are judged again, in runs that are not planned before it has ended.
            bar.total = max(bar.total, len(_planned(group, size, trained)))
            bar.update(new)
            if set(size.learning_rates) <= trained.rates().keys():  # else the best of them is not known
                write()

    train([Job(BASELINE, size.seeds[0], lr, size) for lr in size.learning_rates])
    # Large ones at their first seed, and at the others when all else is done.
    for large_at_all in (False, True):
        asked = 0
        while asked < len(plan := group.experiments(size, trained.at_first_seed())[:questions]):
            experiment = plan[asked]
            seeds = experiment.seeds if large_at_all or not experiment.large else experiment.seeds[:1]
            jobs = {Job(setting, seed, trained.lr, size) for seed in seeds for setting in experiment.settings}
            if experiment.form == 'limited' and not jobs <= trained.results.keys() and (short := too_short(data, size)):
                if rates and large_at_all:  # at the end, and once
                    typer.echo(f'{experiment.title} is left out: {short}', err=True)
            else:
                train(sorted(jobs, key=lambda job: (job.seed, experiment.settings.index(job.setting))))
            asked += 1
    while rates and (missing := set(checks(trained, group.checked.get(size.name, ()))) - trained.results.keys()):
        train(sorted(missing, key=lambda job: (job.seed, job.setting.name, job.lr)))
    bar.close()


def _planned(group: Group, size: Scale, trained: Runs) -> set[Job]:
    """Every run that is known to be needed."""
    planned = group.experiments(size, trained.at_first_seed() if trained.rates() else None)
    jobs = {Job(BASELINE, size.seeds[0], lr, size) for lr in size.learning_rates}
    best = trained.lr if trained.rates() else size.learning_rates[0]
    jobs |= set(checks(trained, group.checked.get(size.name, ()))) if trained.rates() else set()
    return jobs | {Job(setting, seed, best, size) for e in planned for setting in e.settings for seed in e.seeds}


def _record(docs: Path, scale: str) -> Path:
    return docs / f'evidence_{scale}.json'


def _order(scale: Scale) -> int:
    return [each.name for group in GROUPS.values() for each in group.scales].index(scale.name)


def _read(docs: Path, name: str) -> Runs:
    """The runs of a record whose settings are still those of the scale."""
    group = GROUPS[name]
    (scale,) = group.scales
    settings = {setting.name: setting for experiment in group.experiments(scale) for setting in experiment.settings}
    return Runs(
        {
            Job(settings[run['setting']], run['seed'], run['lr'], scale): Result(**run['result'])
            for run in json.loads(_record(docs, name).read_text())
            if run['setting'] in settings
        },
        scale,
    )


if __name__ == '__main__':
    typer.run(main)
