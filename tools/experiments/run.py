"""Train what the record of the evidence lacks, and write what is made of it.

    python -m tools.experiments.run

A run whose row is in the record is never trained again, and one whose row is deleted is. Kill it at any time: begun
anew, it goes on from the last checkpoint of each run that was under way.
"""

import subprocess
from pathlib import Path
from typing import Annotated

import typer

from tools.experiments.picture import draw
from tools.experiments.questions import missing
from tools.experiments.record import RUNS, Record, add, read
from tools.experiments.scales import SCALES, Scale
from tools.experiments.summary import SUMMARY, write_summary
from tools.experiments.tables import write_tables
from tools.experiments.train import Pool

PAGES, PICTURE = (Path('README.md'), Path('docs/evidence.md')), Path('docs/evidence.png')


def main(
    scale: Annotated[str, typer.Option(help=f'One scale alone: {", ".join(SCALES)}.')] = '',
    workers: Annotated[int, typer.Option(help='Runs that train at the same time.', min=1, max=2)] = 2,
) -> None:
    """Rerun the evidence."""
    if scale and scale not in SCALES:
        raise typer.BadParameter(f'{scale} is no scale: choose {", ".join(SCALES)}.', param_hint='--scale')
    train(scale, workers, RUNS, Path('runs/evidence'))


def train(scale: str, workers: int, runs: Path, folder: Path) -> None:
    """Train what a record lacks, of one scale or of all, and write anew what is made of it after each run.

    Args:
        scale: The scale's name, or empty.
        workers: Runs that train at the same time.
        runs: The record.
        folder: Where runs keep checkpoints and logs.
    """
    record = read(runs)
    write(record)
    pool = Pool(folder, workers)
    try:
        while jobs := missing(record, scale):
            for each in dict.fromkeys(job.scale for job in jobs[:workers]):
                _prepare(each)
            row = pool.train(jobs)
            record = add(runs, row)
            write(record)
            told = f'{row.scale}, {row.setting}, seed {row.seed}, rate {row.rate:g}'
            typer.echo(f'{told}: {row.final_loss:.3f} in {row.seconds:.0f} s of training')
    finally:
        pool.close()


def write(record: Record, root: Path = Path()) -> None:
    """Everything that is made of the record: the tables of the pages, a picture, and the summary in the package."""
    for page in PAGES:
        write_tables(root / page, record)
    draw(root / PICTURE, record)
    write_summary(root / SUMMARY, record)


def _prepare(scale: Scale) -> None:
    """Make a scale's data where there are none."""
    stats = Path(scale.data) / 'stats.json'
    if not stats.exists() and subprocess.run(['make', str(stats)]).returncode:
        typer.echo(
            f'{scale.name} lacks runs, and make could not make {stats}: see above, or choose another --scale.',
            err=True,
        )
        raise typer.Exit(1)


if __name__ == '__main__':
    typer.run(main)
