"""Parts to shards and records: the one task of both engines."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.documents import BAD_ADVICE, read_documents
from composer_tst.cli.prepare_data.errors import BadDocument, naming
from composer_tst.cli.prepare_data.output import Output, part_folder, part_record
from composer_tst.cli.prepare_data.parts import Part, Settings, choose_split, size_of
from composer_tst.cli.prepare_data.shards import RowWriter
from composer_tst.cli.prepare_data.tokenizer import TextTokenizer
from composer_tst.cli.progress_bar import progress

# What is tokenised in one call, in characters; bounds the memory of a worker.
BATCH_CHARS = 1 << 19
Item = tuple[int, Part]
# Told how many bytes have been read since it was last told.
Report = Callable[[int], Any]


@dataclass(frozen=True)
class Job:
    """What every part is converted with and to."""

    tokenizer: TextTokenizer
    settings: Settings
    output: Output


def convert_part(job: Job, item: Item, report: Report) -> dict:
    """Convert one part: write its shards in `scratch`, bring them to their place, the index last, then its record.

    Raises:
        CommandError: for anything that the user can act on.
    """
    number, part = item
    record: dict = {'part': number, 'bad': [], 'splits': {}}
    reported = 0
    # On a cluster, the driver's temporary folder is not that of a node.
    scratch = job.output.scratch if os.path.isdir(job.output.scratch) else None
    with tempfile.TemporaryDirectory(dir=scratch) as folder, naming(folder):
        writers = {
            name: RowWriter(f'{folder}/{name}', job.settings, job.tokenizer.eos_id) for name, _ in job.settings.splits
        }
        for batch, read in _batches(part, job, record['bad']):
            encoded = job.tokenizer.encode([text for _, text, _ in batch])
            for (split, _, is_last), tokens in zip(batch, encoded, strict=True):
                writers[split].add(tokens, is_last)
            for writer in writers.values():
                writer.write()
            report(read - reported)
            reported = read
        for name, writer in writers.items():
            files, data = {}, b''
            for file in writer.finish():
                data = Path(folder, name, file).read_bytes()
                job.output.publish(data, name, part_folder(number), file)
                files[file] = [len(data), sha256(data).hexdigest()]
            record['splits'][name] = {'counts': writer.counts(), 'files': files, 'index': data.decode()}
    job.output.record(part_record(number), record)
    report(size_of(part) - reported)
    return record


def _batches(part: Part, job: Job, bad: list[str]) -> Iterator[tuple[list[tuple[str, str, bool]], int]]:
    """Gather (split, piece of a document, whether it is the document's last) up to the batch size.

    Beside it is how many bytes of the part have been read.
    """
    batch: list[tuple[str, str, bool]] = []
    chars, before, read = 0, 0, 0
    for piece in part:
        for document in read_documents(piece, job.settings.text_key):
            if isinstance(document, BadDocument):
                if not job.settings.skip_bad:
                    raise CommandError(f'{document}{BAD_ADVICE}')
                bad.append(str(document))
                continue
            read = before + document.read
            split = choose_split(document.text, job.settings.splits)
            for text, is_last in job.tokenizer.pieces(document.text):
                batch.append((split, text, is_last))
                chars += len(text)
                if chars >= BATCH_CHARS:
                    yield batch, read
                    batch, chars = [], 0
        before += piece.size
    if batch:
        yield batch, read


def convert(parts: Sequence[Part], job: Job, engine: Callable[[Job, list[Item], Report], Iterable[dict]]) -> list[dict]:
    """Convert the parts that are not finished yet; return the records of all, in their order.

    The engine yields records as they are finished.

    Raises:
        CommandError: for anything that the user can act on; at a bad document, unless bad ones are skipped.
    """
    records = job.output.part_records(len(parts), [name for name, _ in job.settings.splits])
    for sentence in (line for record in records.values() for line in record['bad'] if not job.settings.skip_bad):
        raise CommandError(sentence + BAD_ADVICE)
    if items := [(number, part) for number, part in enumerate(parts) if number not in records]:
        total, left = sum(map(size_of, parts)), sum(size_of(part) for _, part in items)
        with progress(total, 'bytes', 'read', initial=total - left, unit_scale=True) as bar:
            for record in engine(job, items, bar.update):
                records[record['part']] = record
    return [records[number] for number in range(len(parts))]
