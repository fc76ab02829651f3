"""Reading documents: plain text, JSON lines and Parquet, packed or not, on disk or on S3."""

import codecs
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

import pyarrow.parquet as pq

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.errors import explained, shown
from composer_tst.cli.prepare_data.inputs import Source
from composer_tst.cli.prepare_data.streams import BLOCK_BYTES, DamagedError, opened, refusing

# Few rows of Parquet at a time, since a row may be a book.
BATCH_ROWS = 64
# How many documents of a format are looked at before a run.
LOOKED_AT = 20

BAD_ADVICE = ' (with --skip-bad, the same command goes on from here without such documents)'
ARRAY_ADVICE = "make lines of it, as with: jq -c '.[]' FILE > FILE.jsonl"


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
    """A document: its text, the hash that places it, and how many bytes of its piece have been read with it."""

    text: str
    digest: bytes
    read: int


class BadDocument(Exception):
    """Why something that should have been a document is none, the cure if it is wrong with all of a file, and where."""

    def __init__(self, why: str, cure: str = '', where: str = ''):
        self.why, self.cure, self.where = why, cure, where

    def __str__(self) -> str:
        return shown(f'{self.where}: {self.why}')

    def at(self, where: str) -> 'BadDocument':
        """The same, found there."""
        return BadDocument(self.why, self.cure, where)


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
    readers = {'text': _text_document, 'jsonl': _jsonl_documents, 'parquet': _parquet_documents}
    try:
        with refusing(source.compression or source.format):
            yield from readers[source.format](piece, text_key)
    except DamagedError as error:
        yield BadDocument(str(error), where=source.path)


def _text_document(piece: Piece, text_key: str) -> Iterator[Document | BadDocument]:
    with opened(piece.source) as (stream, _):
        # Some editors put a mark before UTF-8.
        data = stream.read().removeprefix(codecs.BOM_UTF8)
    try:
        if b'\0' in data:
            raise BadDocument('NUL bytes, as in UTF-16 or in what is no text')
        yield _document(data.decode(), text_key, piece.size)
    except UnicodeDecodeError:
        yield BadDocument('invalid UTF-8', where=piece.source.path)
    except BadDocument as error:
        yield error.at(piece.source.path)


def _document(value: object, text_key: str, read: int) -> Document:
    """Make a document of a text, or of what stands where one should."""
    if value is None:
        raise BadDocument(f'no text in "{text_key}"')
    if not isinstance(value, str):
        raise BadDocument(f'"{text_key}" is not a string')
    if not value:
        raise BadDocument('empty document')
    try:
        return Document(value, blake2b(value.encode(), digest_size=8).digest(), read)
    except UnicodeEncodeError:
        raise BadDocument('invalid Unicode (half of a surrogate pair)') from None


def _jsonl_documents(piece: Piece, text_key: str) -> Iterator[Document | BadDocument]:
    source = piece.source
    with opened(source) as (stream, file):
        position = piece.start
        if position > 0:
            # The range begins with the first line that starts in it.
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        first, number, lines_before = position, 0, None
        while (piece.end is None or position < piece.end) and (line := stream.readline()):
            number += 1
            position += len(line)
            if line.isspace():
                continue
            try:
                yield _from_line(line, text_key, min(max(file.tell() - piece.start, 0), piece.size))
            except BadDocument as error:
                if lines_before is None:
                    # Only a message needs the number of the line in the file, so only now is it worked out.
                    lines_before = _count_lines(source, first)
                yield error.at(f'{source.path}, line {lines_before + number}')


def _count_lines(source: Source, end: int) -> int:
    """Count the lines in the first `end` bytes."""
    count = 0
    with opened(source) as (stream, _):
        while end > 0 and (block := stream.read(min(BLOCK_BYTES, end))):
            count += block.count(b'\n')
            end -= len(block)
    return count


def _from_line(line: bytes, text_key: str, read: int) -> Document:
    """Make a document of a JSON line."""
    try:
        # Windows marks a file's first line. Numbers are of no interest, and Python limits the digits of integers.
        record = json.loads(line.decode('utf-8-sig'), parse_int=float)
    except UnicodeDecodeError:
        raise BadDocument('invalid UTF-8') from None
    except (ValueError, RecursionError):
        if line.strip() in (b'[', b'[{') or (line.lstrip()[:1] == b'[' and line.rstrip()[-1:] == b','):
            raise BadDocument('the file is one array over several lines', ARRAY_ADVICE) from None
        raise BadDocument('malformed JSON') from None
    if isinstance(record, list) and any(isinstance(item, dict) for item in record):
        raise BadDocument('the file is one array, not lines', ARRAY_ADVICE)
    if not isinstance(record, dict):
        raise BadDocument('not a JSON object')
    if text_key not in record:
        raise _missing(text_key, 'fields', record)
    return _document(record[text_key], text_key, read)


def _missing(text_key: str, kind: str, names: Iterable[str]) -> BadDocument:
    there = ', '.join(shown(name) for name in names) or 'none'
    return BadDocument(
        f'no text in "{text_key}" (its {kind}: {there})', 'name the one that holds the text with --text-key'
    )


def open_parquet(stream: Any) -> pq.ParquetFile:
    """Open Parquet: a buffer is read at a time, and the checksums of pages, where there are some, are looked at."""
    return pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False, buffer_size=BLOCK_BYTES)


def _parquet_documents(piece: Piece, text_key: str) -> Iterator[Document | BadDocument]:
    source = piece.source
    with opened(source) as (stream, _), tempfile.TemporaryFile() as unpacked:
        if source.compression:  # Parquet is read from its end
            while block := stream.read(BLOCK_BYTES):
                with explained('write', f'the temporary folder {tempfile.gettempdir()}'):
                    unpacked.write(block)
                    unpacked.flush()
        with refusing('parquet'):
            file = open_parquet(unpacked if source.compression else stream)
        names = file.schema_arrow.names
        if names.count(text_key) != 1:
            several = BadDocument(f'several columns "{text_key}"')
            yield (several if text_key in names else _missing(text_key, 'columns', names)).at(source.path)
            return
        groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        if min(groups, default=0) < 0 or sum(groups) != file.metadata.num_rows:
            raise DamagedError('damaged parquet data (its row groups have not as many rows as the file)')
        last = len(groups) if piece.end is None else piece.end
        first, rows = sum(groups[: piece.start]), sum(groups[piece.start : last])
        for group in range(piece.start, last):
            number, end = sum(groups[:group]), sum(groups[: group + 1])
            try:
                with refusing('parquet'):
                    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[text_key]):
                        for cell in batch.column(batch.schema.get_field_index(text_key)):
                            number += 1
                            try:
                                yield _from_cell(cell, text_key, piece.size * (number - first) // rows)
                            except BadDocument as error:
                                yield error.at(f'{source.path}, row {number}')
                if number != end:
                    raise DamagedError('damaged parquet data (it has not as many rows as it says)')
            except DamagedError as error:
                # The other row groups are none the worse for it.
                yield BadDocument(str(error), where=f'{source.path}, rows {number + 1} to {end}')


def _from_cell(cell: Any, text_key: str, read: int) -> Document:
    try:
        return _document(cell.as_py(), text_key, read)
    except UnicodeDecodeError:
        raise BadDocument('invalid UTF-8') from None
    except (ValueError, OverflowError):  # as of a date that Python does not have
        raise BadDocument(f'"{text_key}" is not a string') from None
