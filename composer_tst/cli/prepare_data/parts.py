"""The unit of work of both engines: some megabytes of input, read, tokenised and packed by itself.

Parts depend on the inputs alone, never on the number of workers, so every run makes the same rows. Rows do
not run on from one part to the next: the last, incomplete row of a part and split is dropped and counted.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.documents import BAD_ADVICE, BadDocument, Piece, open_parquet, read_documents
from composer_tst.cli.prepare_data.inputs import Source
from composer_tst.cli.prepare_data.streams import DamagedError, Meter, opened, refusing
from composer_tst.cli.prepare_data.tokenizer import TextTokenizer

# About as many bytes of rows as of text, so about one shard of streaming's default size.
PART_BYTES = 64 << 20
# So that a data set of any size has a number of parts, and of records of them, that is easily handled.
MOST_PARTS = 10_000
# What is tokenised in one call, in characters; bounds the memory of a worker.
BATCH_CHARS = 1 << 20

NAME = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_-]*')

Splits = tuple[tuple[str, float], ...]
Part = tuple[Piece, ...]


class Done(NamedTuple):
    """What has been done since the last report."""

    documents: int
    tokens: int
    bytes: int


Report = Callable[[Done], None]


@dataclass(frozen=True)
class Settings:
    """What turns documents into rows, the same for every part; and whether bad ones are passed over."""

    seq_len: int
    splits: Splits
    text_key: str
    skip_bad: bool


@dataclass
class SplitCount:
    """What a part, or all of them, put into one split."""

    documents: int = 0
    characters: int = 0
    rows: int = 0
    # Documents that are whole in rows: their end-of-text tokens are. Those of the others went with dropped tokens.
    ends: int = 0
    dropped_tokens: int = 0
    # Tokens that stand for what the vocabulary does not know.
    unknown_tokens: int = 0


@dataclass
class PartCount:
    """What came of a part: counts by split, and the bad documents as sentences."""

    splits: dict[str, SplitCount]
    bad: list[str] = field(default_factory=list)

    @classmethod
    def zero(cls, settings: Settings) -> 'PartCount':
        """Counts at zero."""
        return cls({name: SplitCount() for name, _ in settings.splits})

    @classmethod
    def from_json(cls, record: dict) -> 'PartCount':
        """The inverse of `dataclasses.asdict`."""
        return cls({name: SplitCount(**split) for name, split in record['splits'].items()}, record['bad'])

    def add(self, other: 'PartCount') -> None:
        """Add another part's counts."""
        self.bad += other.bad
        for name, split in other.splits.items():
            for key, value in vars(split).items():
                setattr(self.splits[name], key, getattr(self.splits[name], key) + value)


def parse_splits(text: str) -> Splits:
    """Read `train=0.99,val=0.01`.

    Raises:
        CommandError: if a share is not a positive number, a name is unfit or repeated, or the sum is not 1.
    """
    splits = []
    for item in text.split(','):
        name, _, share = item.strip().partition('=')
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not value > 0:
            raise CommandError(f'--split {text}: {item.strip()!r} is not NAME=SHARE with a share above 0')
        if not NAME.fullmatch(name):
            raise CommandError(f'--split {text}: {name!r} is no name of a folder: use letters, digits, _ and -')
        if name.lower() == 'tokenizer':
            raise CommandError(f'--split {text}: the folder {name} is that of the tokenizer: use another name')
        splits.append((name, value))
    # On some disks, names that differ in case alone are one.
    names = [name.lower() for name, _ in splits]
    if len(set(names)) < len(names):
        raise CommandError(f'--split {text}: a name is given twice')
    if not math.isclose(sum(share for _, share in splits), 1.0, abs_tol=1e-6):
        raise CommandError(f'--split {text}: the shares do not sum to 1')
    return tuple(splits)


def choose_split(digest: bytes, splits: Sequence[tuple[str, float]]) -> str:
    """Place a document by the hash of its text.

    The same text goes to the same split whatever its name and whatever else is prepared with it, so no
    document is ever in two splits, and files added later move none.

    Args:
        digest: 8 bytes from `content_hash`.
        splits: names and shares, the shares summing to 1.
    """
    position = int.from_bytes(digest, 'big') / 2**64
    edge = 0.0
    for name, share in splits:
        edge += share
        if position < edge:
            return name
    return splits[-1][0]


def size_of(part: Part) -> int:
    """The bytes of a part."""
    return sum(piece.size for piece in part)


def plan_parts(sources: Sequence[Source]) -> list[Part]:
    """Gather small files and cut large ones, where their format allows it, into parts of about one size."""
    total = sum(source.size for source in sources)
    part_bytes = max(PART_BYTES, total // MOST_PARTS)
    parts: list[Part] = []
    gathered: list[Piece] = []
    size = 0
    for source in sources:
        for piece in _pieces(source, part_bytes):
            gathered.append(piece)
            size += piece.size
            if size >= part_bytes:
                parts.append(tuple(gathered))
                gathered, size = [], 0
    return [*parts, tuple(gathered)] if gathered else parts


def _pieces(source: Source, part_bytes: int) -> Iterator[Piece]:
    """Cut a source into pieces."""
    if source.size <= part_bytes or source.compression or source.format == 'text':
        yield Piece(source, size=source.size)
    elif source.format == 'jsonl':
        for start in range(0, source.size, part_bytes):
            end = min(start + part_bytes, source.size)
            yield Piece(source, start, end, end - start)
    else:
        try:
            with opened(source) as stream, refusing('parquet', source.path):
                metadata = open_parquet(stream).metadata
        except DamagedError:
            # Reading it will report it as a bad document.
            yield Piece(source, size=source.size)
            return
        start, size = 0, 0
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).total_byte_size
            if size >= part_bytes or group == metadata.num_row_groups - 1:
                yield Piece(source, start, group + 1, size)
                start, size = group + 1, 0


class Packer:
    """Joins token arrays and hands them back as full rows.

    Args:
        seq_len: the tokens of a row, L.
    """

    def __init__(self, seq_len: int):
        self.seq_len = seq_len
        self.held: list[NDArray[np.int32]] = []
        self.held_tokens = 0

    def add(self, tokens: NDArray[np.int32]) -> None:
        """Append tokens[T] to the stream."""
        self.held.append(tokens)
        self.held_tokens += len(tokens)

    def rows(self) -> NDArray[np.int32]:
        """Take the full rows[N, L] out, N >= 0; fewer than L tokens stay held."""
        count = self.held_tokens // self.seq_len
        if count == 0:
            return np.empty((0, self.seq_len), np.int32)
        stream = np.concatenate(self.held)
        whole = count * self.seq_len
        # A copy, because a view would keep the whole stream in memory.
        self.held = [stream[whole:].copy()]
        self.held_tokens -= whole
        return stream[:whole].reshape(count, self.seq_len)


def pack_part(
    part: Part, tokenizer: TextTokenizer, settings: Settings, count: PartCount, report: Report
) -> Iterator[tuple[str, NDArray[np.int32]]]:
    """Read, tokenise and pack a part; yield (split, rows[N, L]).

    Args:
        count: is filled in as the rows are taken.
        report: is told what each batch has done.

    Raises:
        CommandError: at the first bad document, unless bad documents are skipped.
    """
    packers = {name: Packer(settings.seq_len) for name, _ in settings.splits}
    end_of_text = np.array([tokenizer.eos_id], np.int32)
    reported = 0
    for batch, read in _batches(part, tokenizer, settings, count):
        documents, tokens = 0, 0
        encoded = tokenizer.encode([text for _, text, _ in batch])
        for (split, text, last), ids in zip(batch, encoded, strict=True):
            counted = count.splits[split]
            counted.characters += len(text)
            if tokenizer.unknown_id is not None:
                counted.unknown_tokens += int(np.count_nonzero(ids == tokenizer.unknown_id))
            packers[split].add(ids)
            tokens += len(ids)
            if last:
                packers[split].add(end_of_text)
                counted.documents += 1
                documents += 1
        report(Done(documents, tokens + documents, read - reported))
        reported = read
        for split, packer in packers.items():
            rows = packer.rows()
            if len(rows):
                count.splits[split].rows += len(rows)
                count.splits[split].ends += int(np.count_nonzero(rows == tokenizer.eos_id))
                yield split, rows
    report(Done(0, 0, size_of(part) - reported))
    for split, packer in packers.items():
        counted = count.splits[split]
        counted.dropped_tokens = packer.held_tokens


def _batches(
    part: Part, tokenizer: TextTokenizer, settings: Settings, count: PartCount
) -> Iterator[tuple[list[tuple[str, str, bool]], int]]:
    """Gather (split, piece of a document, whether it is the document's last) up to the batch size.

    Beside it is how many bytes of the part have been read.
    """
    batch: list[tuple[str, str, bool]] = []
    chars, read = 0, 0
    for piece in part:
        meter = Meter()
        for document in read_documents(piece, settings.text_key, meter):
            if isinstance(document, BadDocument):
                if not settings.skip_bad:
                    raise CommandError(f'{document}{BAD_ADVICE}')
                count.bad.append(str(document))
                continue
            split = choose_split(document.digest, settings.splits)
            texts = tokenizer.pieces(document.chunks)
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
