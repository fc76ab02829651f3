"""The record: a row a run, in one CSV."""

import csv
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tools.experiments.scales import SCALES, Scale
from tools.experiments.settings import BASELINE, Setting

RUNS = Path('tools/experiments/results/runs.csv')
COPYING = Path('tools/experiments/results/copying.csv')
SEEDS = (17, 18, 19)
Key = tuple[str, str, int, float]


@dataclass(frozen=True)
class Job:
    """One run: a setting at a scale, a seed and a learning rate."""

    scale: Scale
    setting: Setting
    seed: int
    rate: float

    @property
    def key(self) -> Key:
        """What tells its row from others."""
        return self.scale.name, self.setting.name, self.seed, self.rate

    @property
    def steps(self) -> int:
        """Training steps."""
        return round(self.setting.length * self.scale.steps)


@dataclass(frozen=True)
class Row:
    """What one run came to.

    Args:
        scale: Name of its scale.
        text: What it read.
        setting: Name of its setting.
        seed: Its seed.
        rate: Its learning rate.
        steps: Training steps.
        tokens_per_step: Positions of the model in one.
        final_loss: Next-token validation loss at the end, in nats per token; infinite if it diverged.
        seconds: Of training steps; start-up and evaluation are left out.
        versions: Of what it was trained with, and how many tokens its text had to train on, as far as they are known.
    """

    scale: str
    text: str
    setting: str
    seed: int
    rate: float
    steps: int
    tokens_per_step: int
    final_loss: float
    seconds: float
    versions: str

    @property
    def key(self) -> Key:
        """What tells it from other rows."""
        return self.scale, self.setting, self.seed, self.rate


class Record:
    """All rows, by what tells them apart."""

    def __init__(self, rows: Iterable[Row] = ()):
        self.rows = {row.key: row for row in rows}

    def losses(self, scale: Scale, setting: Setting, rate: float, seeds: Sequence[int]) -> dict[int, float]:
        """Final losses, by seed."""
        found = {seed: self.rows.get(Job(scale, setting, seed, rate).key) for seed in seeds}
        return {seed: row.final_loss for seed, row in found.items() if row}

    def judged(self, scale: Scale, setting: Setting, seeds: Sequence[int]) -> dict[int, float]:
        """Final losses at the rate a setting is judged at, by seed; empty if it was not run."""
        if not self.tried(scale, setting):
            return {}
        return self.losses(scale, setting, self.rate(scale, setting), seeds)

    def tried(self, scale: Scale, setting: Setting) -> dict[float, float]:
        """The final loss at each learning rate that was tried, at the first seed."""
        of = (row for row in self.rows.values() if (row.scale, row.setting) == (scale.name, setting.name))
        return {row.rate: row.final_loss for row in sorted(of, key=lambda row: row.rate) if row.seed == SEEDS[0]}

    def tuned(self, scale: Scale, setting: Setting) -> float:
        """The learning rate at which a setting ends lowest, at the first seed."""
        tried = self.tried(scale, setting)
        return min(tried, key=lambda rate: tried[rate])

    def rate(self, scale: Scale, setting: Setting) -> float:
        """The rate a setting is judged at: of those run at all of the first seeds, the one of the lowest mean.

        Before any has been run at all of them, the one that ends lowest at the first seed.
        """
        means = {
            rate: statistics.fmean(losses.values())
            for rate in self.tried(scale, setting)
            if len(losses := self.losses(scale, setting, rate, SEEDS)) == len(SEEDS)
        }
        return min(means, key=lambda rate: means[rate]) if means else self.tuned(scale, setting)

    def changes(self, scale: Scale, setting: Setting, seeds: Sequence[int]) -> dict[int, float]:
        """Final losses minus the baseline's, each at the rate it is judged at, by seed."""
        return differences(self.judged(scale, setting, seeds), self.judged(scale, BASELINE, seeds))


def differences(losses: dict[int, float], base: dict[int, float]) -> dict[int, float]:
    """Losses minus others, at the seeds of both."""
    return {seed: losses[seed] - base[seed] for seed in losses if seed in base}


def read(path: Path) -> Record:
    """The rows of a file; none if there is no file."""
    if not path.exists():
        return Record()
    with path.open(newline='') as file:
        return Record(
            Row(
                *(line['scale'], line['text'], line['setting'], int(line['seed']), float(line['rate'])),
                *(int(line['steps']), int(line['tokens_per_step'])),
                *(float(line['final_loss']), float(line['seconds']), line['versions']),
            )
            for line in csv.DictReader(file)
        )


def write(path: Path, record: Record) -> None:
    """All rows, sorted; another file takes the old one's place at once."""
    rows = sorted(record.rows.values(), key=lambda row: _order(row.key))
    _write(path, [field.name for field in fields(Row)], [asdict(row).values() for row in rows])


def read_copying(path: Path, record: Record) -> dict[Key, list[float]]:
    """The losses of runs on all tokens, on those that repeat, and on others; none of a run that was trained again."""
    if not path.exists():
        return {}
    with path.open(newline='') as file:
        _, *lines = csv.reader(file)
    found = {(a, b, int(seed), float(rate)): [*map(float, losses)] for a, b, seed, rate, *losses in lines}
    return {key: found[key][1:] for key, row in record.rows.items() if found.get(key, [None])[0] == row.final_loss}


def write_copying(path: Path, record: Record, found: dict[Key, list[float]]) -> None:
    """All of them, sorted; with the final loss, which tells a run from the same one trained again."""
    columns = ('scale', 'setting', 'seed', 'rate', 'final_loss', 'all', 'repeats', 'others')
    _write(path, columns, [[*key, record.rows[key].final_loss, *found[key]] for key in sorted(found, key=_order)])


def _order(key: Key) -> tuple[int, Key]:
    return [*SCALES].index(key[0]), key


def _write(path: Path, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    part = path.with_suffix('.part')
    path.parent.mkdir(parents=True, exist_ok=True)
    with part.open('w', newline='') as file:
        lines = csv.writer(file, lineterminator='\n')
        lines.writerow(columns)
        lines.writerows(rows)
    part.rename(path)


def add(path: Path, row: Row) -> Record:
    """Write one more row, beside those that the file has by now."""
    record = read(path)
    record.rows[row.key] = row
    write(path, record)
    return record
