"""Reading documents: plain text, JSON lines and Parquet, packed or not, on disk or on S3."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import pyarrow.parquet as pq

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.errors import BadDocument, naming, shown
from composer_tst.cli.prepare_data.inputs import Source
from composer_tst.cli.prepare_data.streams import BLOCK_BYTES, opened, refusing

# Few rows of Parquet at a time, since a row may be a book.
BATCH_ROWS = 64
# How many documents of a format are looked at before a run.
LOOKED_AT = 20

BAD_ADVICE = ' (with --skip-bad, the same command goes on from here without such documents)'
ARRAY_ADVICE = "if the file is one array, make lines of it, as with: jq -c '.[]' FILE > FILE.jsonl"


@dataclass(frozen=True)
class Piece:
    """A range of a source: bytes of JSON lines, row groups of Parquet, else the whole (`end` is None).

    `size` is in bytes, of row groups unpacked ones.
    """

    source: Source
    start: int = 0
    end: int | None = None
    size: int = 0


@dataclass(frozen=True)
class Document:
    """A document, and how many bytes of its piece have been read with it."""

    text: str
    read: int


# What gives the text of a document, how many bytes have been read with it, and where in its file it is.
Found = tuple[Callable[[], Any], int, str]


def look(sources: Sequence[Source], text_key: str, skip_bad: bool) -> None:
    """Read the first documents of each format, before anything is begun.

    Raises:
        CommandError: if they are bad, unless bad ones are skipped; if none has the field of the text.
    """
    for source in {source.format: source for source in reversed(sources)}.values():
        first = list(islice(read_documents(Piece(source), text_key), LOOKED_AT))
        bad = [document for document in first if isinstance(document, BadDocument)]
        if skip_bad:
            bad = [document for document in bad if document.cure] if len(bad) == len(first) else []
        for document in bad:
            raise CommandError(f'{document}: {document.cure}' if document.cure else f'{document}{BAD_ADVICE}')


def read_documents(piece: Piece, text_key: str) -> Iterator[Document | BadDocument]:
    """Read a piece's documents in order.

    Args:
        piece: what to read.
        text_key: the field of a JSON line, or the column of a Parquet file, that holds the text.

    Raises:
        CommandError: if the disk or the object store fails, or the input changed; what is wrong with the
            data itself comes back as a BadDocument.
    """
    source = piece.source
    find = {'text': _texts, 'jsonl': _lines, 'parquet': _cells}[source.format]
    try:
        with refusing(source.compression or source.format):
            for text_of, read, where in find(piece, text_key):
                try:
                    yield Document(_checked(text_of, text_key), read)
                except BadDocument as error:
                    error.where = f'{source.path}{where}'
                    yield error
    except BadDocument as error:
        error.where = source.path
        yield error


def _checked(text_of: Callable[[], Any], text_key: str) -> str:
    """The text of a document, or why there is none."""
    try:
        text = text_of()
        if isinstance(text, str):
            text.encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise BadDocument(f'invalid UTF-8 ({error.reason})') from None
    except (ValueError, OverflowError, KeyError):  # as of a date or a time zone that Python does not have
        text = 0
    if not isinstance(text, str):
        raise BadDocument(f'no text in "{text_key}"' if text is None else f'"{text_key}" is not a string')
    if not text:
        raise BadDocument('empty document')
    return text


def _texts(piece: Piece, text_key: str) -> Iterator[Found]:
    with opened(piece.source) as (stream, _):
        data = stream.read()
    if b'\0' in data:
        raise BadDocument('NUL bytes, as in UTF-16 or in what is no text')
    yield partial(data.decode, 'utf-8-sig'), piece.size, ''  # some editors put a mark before UTF-8


def _lines(piece: Piece, text_key: str) -> Iterator[Found]:
    with opened(piece.source) as (stream, file):
        position, number = piece.start, 0
        if position > 0:
            # The range begins with the first line that starts in it.
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        while (piece.end is None or position < piece.end) and (line := stream.readline()):
            number += 1
            # How many lines are before a later range, only reading them would tell.
            where = f', line {number}' if piece.start == 0 else f', the line that begins at byte {position}'
            position += len(line)
            if not line.isspace():
                read = min(max(file.tell() - piece.start, 0), piece.size)
                yield partial(_text_of_line, line, text_key), read, where


def _text_of_line(line: bytes, text_key: str) -> Any:
    text = line.decode('utf-8-sig')  # Windows marks a file's first line
    if text.lstrip().startswith('['):
        raise BadDocument('a JSON array, not an object', ARRAY_ADVICE)
    try:
        # Numbers are of no interest, and Python limits the digits of integers.
        record = json.loads(text, parse_int=float)
    except (ValueError, RecursionError):
        raise BadDocument('malformed JSON') from None
    if not isinstance(record, dict):
        raise BadDocument('not a JSON object')
    if text_key not in record:
        raise _missing(text_key, 'fields', record)
    return record[text_key]


def _missing(text_key: str, kind: str, names: Iterable[str]) -> BadDocument:
    there = ', '.join(shown(name) for name in names) or 'none'
    return BadDocument(
        f'no text in "{text_key}" (its {kind}: {there})', 'name the one that holds the text with --text-key'
    )


def open_parquet(stream: Any) -> pq.ParquetFile:
    """Open Parquet: a buffer is read at a time, and the checksums of pages, where there are some, are looked at."""
    return pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False, buffer_size=BLOCK_BYTES)


def _cells(piece: Piece, text_key: str) -> Iterator[Found]:
    with opened(piece.source) as (stream, _), tempfile.TemporaryFile() as unpacked:
        if piece.source.compression:  # Parquet is read from its end
            with naming(tempfile.gettempdir()):
                shutil.copyfileobj(stream, unpacked, BLOCK_BYTES)
            stream = unpacked
        with refusing('parquet'):
            file = open_parquet(stream)
        if file.schema_arrow.names.count(text_key) != 1:
            raise _missing(text_key, 'columns', file.schema_arrow.names)
        rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        groups = range(len(rows))[piece.start : piece.end]
        first = number = sum(rows[: piece.start])
        last = first + sum(rows[group] for group in groups)
        batches = file.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=[text_key]) if groups else ()
        with refusing('parquet'):
            for cell in (cell for batch in batches for cell in batch.column(text_key)):
                number += 1
                read = piece.size * (number - first) // max(last - first, 1)
                yield cell.as_py, read, f', row {number}'
        if number != last or sum(rows) != file.metadata.num_rows:
            raise BadDocument('damaged parquet data (it has not as many rows as it says)')
