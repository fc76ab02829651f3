"""Parts to shards and records: the one task of both engines."""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.documents import BAD_ADVICE, BadDocument, read_documents
from composer_tst.cli.prepare_data.inputs import plural
from composer_tst.cli.prepare_data.output import Output, part_folder
from composer_tst.cli.prepare_data.parts import Part, Settings, choose_split, size_of
from composer_tst.cli.prepare_data.shards import RowWriter, ShardOptions
from composer_tst.cli.prepare_data.storage import is_s3
from composer_tst.cli.prepare_data.streams import Meter
from composer_tst.cli.prepare_data.tokenizer import TextTokenizer
from composer_tst.cli.prepare_data.workers import parallel
from composer_tst.cli.progress_bar import progress

# What is tokenised in one call, in characters; bounds the memory of a worker.
BATCH_CHARS = 1 << 20
# What is counted of a split. `ends` are the documents whose ends are in rows: the others are cut, or left out.
COUNTED = ('documents', 'characters', 'rows', 'ends', 'dropped_tokens', 'unknown_tokens')

Item = tuple[int, Part]
# Told what has been done since it was last told: documents, tokens, bytes.
Report = Callable[[tuple[int, int, int]], None]


@dataclass(frozen=True)
class Job:
    """What every part is converted with and to."""

    tokenizer: TextTokenizer
    settings: Settings
    shards: ShardOptions
    output: Output


# Converts items, the first argument of all being the job, and yields their records as they are finished.
Engine = Callable[[Job, list[Item], Report], Iterable[dict]]


class _Split:
    """What a part puts into one split: rows, and the tokens that fill none yet."""

    def __init__(self, job: Job, folder: str):
        self.length, self.eos_id, self.unknown_id = job.settings.seq_len, job.tokenizer.eos_id, job.tokenizer.unknown_id
        self.writer = RowWriter(folder, job.shards)
        self.count = Counter(dict.fromkeys(COUNTED, 0))
        self.held = np.empty(0, np.int32)

    def add(self, tokens: list[NDArray[np.int32]]) -> None:
        """Append arrays[T] of tokens, and write what rows they fill."""
        stream = np.concatenate([self.held, *tokens])
        rows = stream[: len(stream) // self.length * self.length].reshape(-1, self.length)
        # A copy, because a view would keep the whole stream in memory.
        self.held = stream[rows.size :].copy()
        self.count['rows'] += len(rows)
        self.count['ends'] += int(np.count_nonzero(rows == self.eos_id))
        self.count['dropped_tokens'] = len(self.held)
        if self.unknown_id is not None:
            self.count['unknown_tokens'] += int(np.count_nonzero(np.concatenate(tokens) == self.unknown_id))
        if len(rows):
            self.writer.write(rows)


def convert_part(job: Job, item: Item, report: Report) -> dict:
    """Convert one part: write its shards beside the output, bring them to their place, then write its record.

    Raises:
        CommandError: for anything that the user can act on.
    """
    number, part = item
    # On a cluster, the driver's temporary folder is not that of a node.
    scratch = job.output.scratch if os.path.isdir(job.output.scratch) else None
    folder = tempfile.mkdtemp(prefix=part_folder(number), dir=scratch)
    try:
        splits = {split: _Split(job, os.path.join(folder, split)) for split, _ in job.settings.splits}
        bad: list[str] = []
        end_of_text = np.array([job.tokenizer.eos_id], np.int32)
        reported = 0
        for batch, read in _batches(part, job, bad):
            tokens: dict[str, list[NDArray[np.int32]]] = {}
            for (split, text, last), ids in zip(
                batch, job.tokenizer.encode([text for _, text, _ in batch]), strict=True
            ):
                tokens.setdefault(split, []).extend([ids, end_of_text] if last else [ids])
                splits[split].count.update(documents=last, characters=len(text))
            for split, arrays in tokens.items():
                splits[split].add(arrays)
            made = sum(len(array) for arrays in tokens.values() for array in arrays)
            report((sum(last for _, _, last in batch), made, read - reported))
            reported = read
        written = {split: files for split in splits if (files := splits[split].writer.finish())}
        counts = {split: dict(each.count) for split, each in splits.items()}
        record = {'part': number, 'counts': counts, 'bad': bad, 'splits': written}
        job.output.finish_part(folder, record)
        report((0, 0, size_of(part) - reported))
        return record
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _batches(part: Part, job: Job, bad: list[str]) -> Iterator[tuple[list[tuple[str, str, bool]], int]]:
    """Gather (split, piece of a document, whether it is the document's last) up to the batch size.

    Beside it is how many bytes of the part have been read.
    """
    batch: list[tuple[str, str, bool]] = []
    chars, read = 0, 0
    for piece in part:
        meter = Meter()
        for document in read_documents(piece, job.settings.text_key, meter):
            if isinstance(document, BadDocument):
                if not job.settings.skip_bad:
                    raise CommandError(f'{document}{BAD_ADVICE}')
                bad.append(str(document))
                continue
            split = choose_split(document.digest, job.settings.splits)
            texts = job.tokenizer.pieces(document.chunks)
            text = next(texts)
            while text is not None:
                following = next(texts, None)
                batch.append((split, text, following is None))
                chars += len(text)
                if chars >= BATCH_CHARS:
                    yield batch, read + meter.bytes_of(piece.start, piece.size)
                    batch, chars = [], 0
                text = following
        read += piece.size
    if batch:
        yield batch, read


def convert_locally(job: Job, items: list[Item], report: Report) -> Iterable[dict]:
    """The local engine: parts over all cores."""
    return parallel(convert_part, job, items, report, job.output.scratch if is_s3(job.output.path) else None)


def convert(parts: Sequence[Part], job: Job, engine: Engine) -> list[dict]:
    """Convert the parts that are not finished yet; return the records of all, in their order.

    Raises:
        CommandError: for anything that the user can act on; at a bad document, unless bad ones are skipped.
    """
    records = job.output.part_records(len(parts), [name for name, _ in job.settings.splits])
    items = [(number, part) for number, part in enumerate(parts) if number not in records]
    for record in records.values() if not job.settings.skip_bad else []:
        for sentence in record['bad']:
            raise CommandError(sentence + BAD_ADVICE)
    if items:
        total, left = sum(map(size_of, parts)), sum(size_of(part) for _, part in items)
        documents = tokens = 0
        with progress(total, 'bytes', 'read', initial=total - left, unit_scale=True) as bar:

            def show(done: tuple[int, int, int]) -> None:
                nonlocal documents, tokens
                documents, tokens = documents + done[0], tokens + done[1]
                bar.set_postfix_str(f'{documents:,} {plural(documents, "document")}, {tokens:,} tokens', refresh=False)
                bar.update(done[2])

            records |= {record['part']: record for record in engine(job, items, show)}
    return [records[number] for number in range(len(parts))]
