"""The unit of work of both engines: some megabytes of input, read, tokenised and packed by itself.

Parts depend on the inputs alone, never on the number of workers, so every run makes the same rows. Rows do
not run on from one part to the next: the last, incomplete row of a part and split is dropped and counted.
"""

import math
import random
import re
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.documents import Document, Piece, open_parquet, read_documents
from composer_tst.cli.prepare_data.errors import BadDocument
from composer_tst.cli.prepare_data.inputs import Source
from composer_tst.cli.prepare_data.streams import opened, refusing

# About as many bytes of rows as of text, so about four shards.
PART_BYTES = 64 << 20
# So that a data set of any size has a number of parts, and of records of them, that is easily handled.
MOST_PARTS = 10_000
# What a tokenizer is trained on, for BPE finds its merges in far less text than a corpus: so many characters of so
# many parts, and of one document.
SAMPLE_CHARS = 32 << 20
SAMPLE_PARTS = 32
DOCUMENT_CHARS = 1 << 20

SPLIT = re.compile(r'([A-Za-z0-9_][A-Za-z0-9_-]*)=(\d*\.?\d+(?:[eE]-?\d+)?)', re.ASCII)

Splits = tuple[tuple[str, float], ...]
Part = tuple[Piece, ...]


@dataclass(frozen=True)
class Settings:
    """What turns documents into shards, the same for every part; and whether bad ones are passed over.

    `compression` and `hashes` are names of streaming's, as `zstd:7`; the hashes are sorted.
    """

    seq_len: int
    splits: Splits
    text_key: str = 'text'
    skip_bad: bool = False
    compression: str | None = None
    hashes: tuple[str, ...] = ()


def parse_splits(text: str) -> Splits:
    """Read `train=0.99,val=0.01`.

    Raises:
        CommandError: if a share is not a positive number, a name is unfit or repeated, or the sum is not 1.
    """
    found = [SPLIT.fullmatch(item.strip()) for item in text.split(',')]
    splits = tuple((item[1], float(item[2])) for item in found if item)
    # On some disks, names that differ in case alone are one; the tokenizer has a folder beside those of the splits.
    names = {name.lower() for name, _ in splits} - {'tokenizer'}
    if len(names) < len(found) or any(not share for _, share in splits):
        problem = 'give NAME=SHARE,NAME=SHARE with names of letters, digits, _ and -, each once, and shares above 0'
    elif not math.isclose(sum(share for _, share in splits), 1.0, abs_tol=1e-6):
        problem = 'the shares do not sum to 1'
    else:
        return splits
    raise CommandError(f'--split {text}: {problem}')


def choose_split(text: str, splits: Splits) -> str:
    """Place a document by the hash of its text.

    The same text goes to the same split whatever its name and whatever else is prepared with it, so no
    document is ever in two splits, and files added later move none.
    """
    position = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), 'big') / 2**64
    edges = list(accumulate(share for _, share in splits))
    return splits[min(bisect(edges, position), len(splits) - 1)][0]


def size_of(part: Part) -> int:
    """The bytes of a part."""
    return sum(piece.size for piece in part)


def plan_parts(sources: Sequence[Source]) -> list[Part]:
    """Gather small files and cut large ones, where their format allows it, into parts of about one size."""
    part_bytes = max(PART_BYTES, sum(source.size for source in sources) // MOST_PARTS)
    parts: list[list[Piece]] = []
    size = part_bytes
    for piece in (piece for source in sources for piece in cut_source(source, part_bytes)):
        if size >= part_bytes:
            parts.append([])
            size = 0
        parts[-1].append(piece)
        size += piece.size
    return [tuple(part) for part in parts]


def cut_source(source: Source, part_bytes: int) -> Iterator[Piece]:
    """Cut a source into pieces of about a size."""
    if source.size <= part_bytes or source.compression or source.format == 'text':
        yield Piece(source, size=source.size)
    elif source.format == 'jsonl':
        for start in range(0, source.size, part_bytes):
            end = min(start + part_bytes, source.size)
            yield Piece(source, start, end, end - start)
    else:
        try:
            with opened(source) as (stream, _), refusing('parquet'):
                metadata = open_parquet(stream).metadata
        except BadDocument:
            # Reading it will report it as a bad document.
            yield Piece(source, size=source.size)
            return
        start, size = 0, 0
        for group in range(metadata.num_row_groups):
            if size >= part_bytes:
                yield Piece(source, start, group, size)
                start, size = group, 0
            size += metadata.row_group(group).total_byte_size
        yield Piece(source, start, None, size)


def sample_texts(parts: Sequence[Part], settings: Settings) -> Iterator[str]:
    """Take text to train a tokenizer on: documents of the largest split, the beginnings of long ones, from all over.

    What is taken depends on the text and on the plan of parts, and on neither names nor times. Bad documents
    are passed over here and dealt with when their part is converted.
    """
    # In whatever order splits are named; of two of one size, that which is called train.
    largest, _ = max(settings.splits, key=lambda split: (split[1], split[0] == 'train', split[0]))
    some = random.Random(0).sample(parts, min(len(parts), SAMPLE_PARTS))
    for part in some:
        left = SAMPLE_CHARS // len(some)
        for document in (each for piece in part for each in read_documents(piece, settings.text_key)):
            if isinstance(document, Document) and choose_split(document.text, settings.splits) == largest:
                yield document.text[: min(DOCUMENT_CHARS, left)]
                left -= min(DOCUMENT_CHARS, left, len(document.text))
                if not left:
                    break
