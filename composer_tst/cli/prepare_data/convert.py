"""Parts to shards and records: the one task of both engines."""

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.documents import BAD_ADVICE, BadDocument, read_documents
from composer_tst.cli.prepare_data.output import Output, part_folder, part_record
from composer_tst.cli.prepare_data.parts import Part, Settings, choose_split, size_of
from composer_tst.cli.prepare_data.shards import RowWriter
from composer_tst.cli.prepare_data.tokenizer import TextTokenizer
from composer_tst.cli.progress_bar import progress

# What is tokenised in one call, in characters; bounds the memory of a worker.
BATCH_CHARS = 1 << 19
Item = tuple[int, Part]
# Told how many bytes and how many documents have been read since it was last told.
Report = Callable[[tuple[int, int]], Any]


@dataclass(frozen=True)
class Job:
    """What every part is converted with and to."""

    tokenizer: TextTokenizer
    settings: Settings
    output: Output


# Converts items, the first argument of all being the job, and yields their records as they are finished.
Engine = Callable[[Job, list[Item], Report], Iterable[dict]]


def convert_part(job: Job, item: Item, report: Report) -> dict:
    """Convert one part: write its shards in `scratch`, bring them to their place, then write its record.

    Raises:
        CommandError: for anything that the user can act on.
    """
    number, part = item
    end_of_text = np.array([job.tokenizer.eos_id], np.int32)
    # On a cluster, the driver's temporary folder is not that of a node.
    scratch = job.output.scratch if os.path.isdir(job.output.scratch) else None
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        names = [name for name, _ in job.settings.splits]
        writers = {name: RowWriter(f'{folder}/{name}', job.settings, job.tokenizer.eos_id) for name in names}
        documents = Counter(dict.fromkeys(names, 0))
        bad: list[str] = []
        reported = 0
        for batch, read in _batches(part, job, bad):
            tokens: dict[str, list[NDArray[np.int32]]] = {}
            encoded = job.tokenizer.encode([text for _, text, _ in batch])
            for (split, _, is_last), ids in zip(batch, encoded, strict=True):
                tokens.setdefault(split, []).extend([ids, end_of_text] if is_last else [ids])
                documents[split] += is_last
            for split, arrays in tokens.items():
                writers[split].add(arrays)
            report((read - reported, sum(is_last for _, _, is_last in batch)))
            reported = read
        record: dict = {'part': number, 'bad': bad, 'counts': {}, 'splits': {}}
        for name, writer in writers.items():
            record['counts'][name] = {
                'documents': documents[name],
                'rows': writer.rows,
                'ends': writer.ends,  # of documents, in rows: others are cut, or left out
                'dropped_tokens': len(writer.held),
            }
            if writer.rows:
                record['splits'][name] = _publish(job.output, writer, name, part_folder(number))
        job.output.record(part_record(number), record)
    report((size_of(part) - reported, 0))
    return record


def _publish(output: Output, writer: RowWriter, split: str, folder: str) -> dict:
    """Bring the shards of a part to their place, the index last; return (size, sha256) of each file, and the index."""
    files, data = {}, b''
    for name in writer.finish():
        with open(f'{writer.folder}/{name}', 'rb') as file:
            data = file.read()
        output.publish(data, split, folder, name)
        files[name] = [len(data), sha256(data).hexdigest()]
    return {'files': files, 'index': data.decode()}


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
            split = choose_split(document.digest, job.settings.splits)
            left = len(document.text)
            for text in job.tokenizer.pieces(document.text):
                left -= len(text)
                batch.append((split, text, not left))
                chars += len(text)
                if chars >= BATCH_CHARS:
                    yield batch, read
                    batch, chars = [], 0
        before += piece.size
    if batch:
        yield batch, read


def convert(parts: Sequence[Part], job: Job, engine: Engine) -> list[dict]:
    """Convert the parts that are not finished yet; return the records of all, in their order.

    Raises:
        CommandError: for anything that the user can act on; at a bad document, unless bad ones are skipped.
    """
    records = job.output.part_records(len(parts), [name for name, _ in job.settings.splits])
    items = [(number, part) for number, part in enumerate(parts) if number not in records]
    for sentence in (line for record in records.values() for line in record['bad'] if not job.settings.skip_bad):
        raise CommandError(sentence + BAD_ADVICE)
    if items:
        total, left = sum(map(size_of, parts)), sum(size_of(part) for _, part in items)
        documents = 0
        with progress(total, 'bytes', 'read', initial=total - left, unit_scale=True) as bar:

            def show(more: tuple[int, int]) -> None:
                nonlocal documents
                documents += more[1]
                bar.set_postfix_str(f'{documents:,} document' + ('' if documents == 1 else 's'), refresh=False)
                bar.update(more[0])

            records |= {record['part']: record for record in engine(job, items, show)}
    return [records[number] for number in range(len(parts))]
