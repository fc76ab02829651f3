"""Parts to shards and records: the one task of both engines, and what is made of the records of all parts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.lock import DiskLock, S3Lock
from composer_tst.cli.prepare_data.output import Output, part_name
from composer_tst.cli.prepare_data.parts import BAD_ADVICE, Done, Part, PartCount, Report, Settings, pack_part, size_of
from composer_tst.cli.prepare_data.shards import ShardOptions, digest_of, stored
from composer_tst.cli.prepare_data.tokenizer import TextTokenizer
from composer_tst.cli.prepare_data.workers import parallel
from composer_tst.cli.progress_bar import progress

Item = tuple[int, Part]


@dataclass(frozen=True)
class Job:
    """What every part is converted with and to, and the lock that its workers share."""

    tokenizer: TextTokenizer
    settings: Settings
    shards: ShardOptions
    output: Output
    lock: DiskLock | S3Lock | None = None


# Converts items, the first argument of all being the job, and yields (number, record) as they are finished.
Engine = Callable[[Job, list[Item], Report], Iterable[tuple[int, dict]]]


def convert_part(job: Job, item: Item, report: Report) -> tuple[int, dict]:
    """Convert one part: write its shards, then its record.

    Raises:
        CommandError: for anything that the user can act on.
    """
    number, part = item
    count = PartCount.zero(job.settings)
    writers = {split: _SplitWriter(job, number, split) for split, _ in job.settings.splits}
    for split, rows in pack_part(part, job.tokenizer, job.settings, count, report):
        writers[split].write(rows)
    for writer in writers.values():
        writer.finish()
    record = {
        'count': asdict(count),
        'files': {split: writer.files for split, writer in writers.items()},
        'shards': {split: writer.entries for split, writer in writers.items()},
    }
    job.output.record(part_name(number), record)
    return number, record


class _SplitWriter:
    """Writes the shards of one part and split, each when it is full."""

    def __init__(self, job: Job, number: int, split: str):
        self.job, self.number, self.split = job, number, split
        self.full = job.shards.rows_in_shard(job.settings.seq_len)
        self.held: list[NDArray[np.int32]] = []
        self.entries: list[dict] = []
        self.files: list[dict] = []

    def write(self, rows: NDArray[np.int32]) -> None:
        """Write rows[N, L]."""
        while len(rows):
            room = self.full - sum(map(len, self.held))
            self.held.append(rows[:room])
            rows = rows[room:]
            if sum(map(len, self.held)) == self.full:
                self.finish()

    def finish(self) -> None:
        """Write what is left."""
        if not self.held:
            return
        rows = np.concatenate(self.held)
        self.held = []
        name = f'shard.{self.number:05}.{len(self.entries):05}.mds'
        data, entry = self.job.shards.pack(self.job.shards.encode(rows), name)
        entry = {'samples': len(rows), **entry}
        name = stored(entry)['basename']
        self.job.output.create(data, self.split, name)
        self.entries.append(entry)
        self.files.append({'name': name, 'bytes': len(data), 'rows': len(rows), 'sha256': digest_of(data)})


def convert_locally(job: Job, items: list[Item], report: Report) -> Iterator[tuple[int, dict]]:
    """The local engine: parts over all cores."""
    yield from parallel(convert_part, job, items, report)


def convert(parts: Sequence[Part], job: Job, engine: Engine) -> list[dict]:
    """Convert the parts that are not finished yet; return the records of all, in their order.

    Raises:
        CommandError: for anything that the user can act on; at a bad document, unless bad ones are skipped.
    """
    names = [name for name, _ in job.settings.splits]
    records = job.output.part_records(len(parts), names)
    items = [(number, part) for number, part in enumerate(parts) if number not in records]
    if not job.settings.skip_bad:
        for number in sorted(records):
            for sentence in records[number]['count']['bad']:
                raise CommandError(sentence + BAD_ADVICE)
    if items:
        sizes = [size_of(part) for part in parts]
        finished = sum(sizes[number] for number in records)
        documents = tokens = 0
        with progress(sum(sizes), 'bytes', 'read', initial=finished, unit_scale=True) as bar:

            def show(done: Done) -> None:
                nonlocal documents, tokens
                documents, tokens = documents + done.documents, tokens + done.tokens
                bar.set_postfix_str(f'{documents:,} documents, {tokens:,} tokens', refresh=False)
                bar.update(done.bytes)

            records.update(engine(job, items, show))
    return [records[number] for number in range(len(parts))]


def merged(records: list[dict], settings: Settings) -> tuple[dict[str, list], PartCount]:
    """Put the index entries and the counts of all parts, in their order, together."""
    shards: dict[str, list] = {name: [] for name, _ in settings.splits}
    count = PartCount.zero(settings)
    for record in records:
        count.add(PartCount.from_json(record['count']))
        for split, entries in record['shards'].items():
            shards[split] += entries
    return shards, count
