"""The local engine: parts over all cores, each finished one on record for a restart."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tqdm import tqdm

from .errors import PrepareError
from .output import STATE, Output
from .parts import Part, PartCount, Settings, pack_part
from .tokenizer import TextTokenizer
from .workers import parallel

COLUMNS = {'tokens': 'ndarray:int32'}


@dataclass(frozen=True)
class ShardOptions:
    """How streaming writes shards: compression, as in `zstd:7`, and the names of hashes, sorted."""

    compression: str | None
    hashes: list[str]


def check_shard_options(options: ShardOptions) -> None:
    """Refuse what streaming cannot write, before any work is done.

    Raises:
        PrepareError: if the compression or a hash is unknown.
    """
    from streaming.base.compression import is_compression
    from streaming.base.hashing import get_hashes, is_hash

    if options.compression and not is_compression(options.compression):
        raise PrepareError(f'--compression {options.compression}: streaming has no such compression')
    for name in options.hashes:
        if not is_hash(name):
            raise PrepareError(f'--hashes {name}: not one of {", ".join(sorted(get_hashes()))}')


@dataclass(frozen=True)
class Job:
    """What every part is converted with and to."""

    tokenizer: TextTokenizer
    settings: Settings
    shards: ShardOptions
    output: Output


def convert(parts: Sequence[Part], job: Job) -> tuple[dict[str, list], PartCount]:
    """Convert the parts that are not finished yet.

    Returns:
        The entries of shards for MDS indexes, by split and in the order of parts; and the counts.
    """
    records: dict[int, dict] = {}
    for name, data in job.output.read_state().items():
        if name.startswith('part.'):
            records[int(name.split('.')[1])] = json.loads(data)
    items = [(number, part) for number, part in enumerate(parts) if number not in records]
    with tqdm(unit=' tokens', unit_scale=True, bar_format='{n_fmt} tokens [{elapsed}, {rate_fmt}{postfix}]') as bar:
        documents = 0

        def show(counts: tuple[int, int]) -> None:
            nonlocal documents
            documents += counts[0]
            bar.update(counts[1])
            bar.set_postfix_str(f'{documents:,} documents, {len(records)}/{len(parts)} parts', refresh=False)

        for number, record in parallel(_convert_part, job, items, show):
            records[number] = record
        show((0, 0))
    return merged([records[number] for number in range(len(parts))], job.settings)


def merged(records: list[dict], settings: Settings) -> tuple[dict[str, list], PartCount]:
    """Put the records of all parts, in their order, together."""
    shards: dict[str, list] = {name: [] for name, _ in settings.splits}
    count = PartCount.zero(settings)
    for record in records:
        count.add(PartCount.from_json(record['count']))
        for split, entries in record['shards'].items():
            shards[split] += entries
    return shards, count


def _convert_part(job: Job, item: tuple[int, Part], report: Callable[[Any], None]) -> tuple[int, dict]:
    number, part = item
    count = PartCount.zero(job.settings)
    with job.output.scratch() as folder:
        writers: dict[str, _SplitWriter] = {}
        for split, rows in pack_part(part, job.tokenizer, job.settings, count, report):
            if split not in writers:
                writers[split] = _SplitWriter(job, number, split, os.path.join(folder, split))
            writers[split].write(rows)
        for writer in writers.values():
            writer.finish()
    record = {'count': asdict(count), 'shards': {split: writer.entries for split, writer in writers.items()}}
    job.output.write(json.dumps(record).encode(), STATE, f'part.{number:06}.json')
    return number, record


class _SplitWriter:
    """Streaming's writer for one part and split, whose shards are moved to the output as they fill up."""

    def __init__(self, job: Job, number: int, split: str, folder: str):
        from streaming import MDSWriter

        self.writer = MDSWriter(
            out=folder, columns=COLUMNS, compression=job.shards.compression, hashes=job.shards.hashes
        )
        self.job, self.number, self.split, self.folder = job, number, split, folder
        self.entries: list[dict] = []

    def write(self, rows: Any) -> None:
        """Write rows[N, L]."""
        for row in rows:
            self.writer.write({'tokens': row})
            if len(self.writer.shards) > len(self.entries):
                self._move()

    def finish(self) -> None:
        """Write what is left. Not the writer's own `finish`, which makes an index and may sleep for it."""
        if self.writer.new_samples:
            self.writer.flush_shard()
            self._move()
        self.writer.executor.shutdown()

    def _move(self) -> None:
        """Give the newest shard a name that no other part uses and move it."""
        entry = dict(self.writer.shards[-1])
        for key in ('raw_data', 'zip_data'):
            if entry[key]:
                name = entry[key]['basename']
                unique = name.replace('shard.', f'shard.{self.number:05}.')
                entry[key] = {**entry[key], 'basename': unique}
                if os.path.exists(os.path.join(self.folder, name)):
                    self.job.output.take(os.path.join(self.folder, name), self.split, unique)
        self.entries.append(entry)
