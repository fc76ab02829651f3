"""Parts to shards and records: the one task of both engines."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.documents import BAD_ADVICE
from composer_tst.cli.prepare_data.inputs import plural
from composer_tst.cli.prepare_data.output import Output, part_folder
from composer_tst.cli.prepare_data.parts import Done, Part, PartCount, Report, Settings, pack_part, size_of
from composer_tst.cli.prepare_data.shards import INDEX, RowWriter, ShardOptions
from composer_tst.cli.prepare_data.storage import explained, is_s3
from composer_tst.cli.prepare_data.tokenizer import TextTokenizer
from composer_tst.cli.prepare_data.workers import parallel
from composer_tst.cli.progress_bar import progress

Item = tuple[int, Part]


@dataclass(frozen=True)
class Job:
    """What every part is converted with and to."""

    tokenizer: TextTokenizer
    settings: Settings
    shards: ShardOptions
    output: Output


# Converts items, the first argument of all being the job, and yields (number, record) as they are finished.
Engine = Callable[[Job, list[Item], Report], Iterable[tuple[int, dict]]]


def convert_part(job: Job, item: Item, report: Report) -> tuple[int, dict]:
    """Convert one part: write its shards beside the output, bring them to their place, then write its record.

    Raises:
        CommandError: for anything that the user can act on.
    """
    number, part = item
    # On a cluster, the driver's temporary folder is not that of a node.
    scratch = job.output.scratch if os.path.isdir(job.output.scratch) else None
    with explained('write', scratch or f'the temporary folder {tempfile.gettempdir()}'):
        folder = tempfile.mkdtemp(prefix=part_folder(number), dir=scratch)
    try:
        count = PartCount.zero(job.settings)
        folders = {split: os.path.join(folder, split) for split, _ in job.settings.splits}
        writers = {split: RowWriter(path, job.shards) for split, path in folders.items()}
        for split, rows in pack_part(part, job.tokenizer, job.settings, count, report):
            writers[split].write(rows)
        files = {split: written for split, writer in writers.items() if (written := writer.finish())}
        indexes = {}
        for split in files:
            with explained('read', folder), open(os.path.join(folders[split], INDEX)) as file:
                indexes[split] = file.read()
        record = {'part': number, 'count': asdict(count), 'files': files, 'indexes': indexes}
        job.output.finish_part(number, folders, record)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return number, record


def convert_locally(job: Job, items: list[Item], report: Report) -> Iterator[tuple[int, dict]]:
    """The local engine: parts over all cores."""
    yield from parallel(convert_part, job, items, report, job.output.scratch if is_s3(job.output.path) else None)


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
                bar.set_postfix_str(f'{documents:,} {plural(documents, "document")}, {tokens:,} tokens', refresh=False)
                bar.update(done.bytes)

            records.update(engine(job, items, show))
    return [records[number] for number in range(len(parts))]


def summed(records: list[dict], settings: Settings) -> PartCount:
    """Put the counts of all parts together."""
    count = PartCount.zero(settings)
    for record in records:
        count.add(PartCount.from_json(record['count']))
    return count
