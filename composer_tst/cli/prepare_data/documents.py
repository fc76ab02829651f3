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
from composer_tst.cli.prepare_data.inputs import Source
from composer_tst.cli.prepare_data.storage import explained, shown
from composer_tst.cli.prepare_data.streams import BLOCK_BYTES, DamagedError, Meter, opened, refusing

# Few rows of Parquet at a time, since a row may be a book.
BATCH_ROWS = 64
# How many documents of a format are looked at before a run, and how many names a sentence lists.
LOOKED_AT = 20
NAMES_SHOWN = 12

BAD_ADVICE = ' (with --skip-bad, the same command goes on from here without such documents)'


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
    """A document: the hash of its UTF-8 bytes, and its text as consecutive chunks, to be read once."""

    digest: bytes
    chunks: Iterable[str]


@dataclass(frozen=True)
class BadDocument:
    """Something that should have been a document, where it was found and why it is none."""

    where: str
    why: str
    # What is wrong with all of a file, in the words of the cure.
    cure: str = ''

    def __str__(self) -> str:
        return shown(f'{self.where}: {self.why}')


class _BadError(Exception):
    """Why something is no document, and perhaps the cure."""


def content_hash() -> Any:
    """The hash that is fed a document's UTF-8 bytes to place it."""
    return blake2b(digest_size=8)


def look(sources: Sequence[Source], text_key: str, skip_bad: bool) -> None:
    """Read the first documents of each format, before anything is begun.

    Raises:
        CommandError: if they are bad, unless bad ones are skipped; if none has the field of the text.
    """
    for source in {source.format: source for source in reversed(sources)}.values():
        cured = None
        for document in islice(read_documents(Piece(source), text_key), LOOKED_AT):
            if isinstance(document, Document):
                break
            if not skip_bad:
                raise CommandError(f'{document}: {document.cure}' if document.cure else f'{document}{BAD_ADVICE}')
            cured = cured or (document if document.cure else None)
        else:
            if cured:
                raise CommandError(f'{cured}: {cured.cure}')


def read_documents(piece: Piece, text_key: str, meter: Meter | None = None) -> Iterator[Document | BadDocument]:
    """Read a piece's documents in order.

    Args:
        piece: what to read.
        text_key: the field of a JSON line, or the column of a Parquet file, that holds the text.
        meter: is told how far it is.

    Raises:
        CommandError: if the disk or the object store fails, or the input changed; what is wrong with the
            data itself comes back as a BadDocument.
    """
    source = piece.source
    readers = {'text': _text_document, 'jsonl': _jsonl_documents, 'parquet': _parquet_documents}
    try:
        with refusing(source.compression or source.format, source.path):
            yield from readers[source.format](piece, text_key, meter or Meter())
    except DamagedError as error:
        yield BadDocument(source.path, str(error))


def _text_document(piece: Piece, text_key: str, meter: Meter) -> Iterator[Document | BadDocument]:
    path = piece.source.path
    decoder = codecs.getincrementaldecoder('utf-8')()
    digest = content_hash()
    chunks = []
    with opened(piece.source, meter) as stream:
        try:
            while block := stream.read(BLOCK_BYTES):
                if b'\0' in block:
                    yield BadDocument(path, 'NUL bytes, as in UTF-16 or in what is no text')
                    return
                # Some editors put a mark before UTF-8.
                block = block if chunks else block.removeprefix(codecs.BOM_UTF8)
                digest.update(block)
                chunks.append(decoder.decode(block))
            decoder.decode(b'', final=True)
        except UnicodeDecodeError:
            yield BadDocument(path, 'invalid UTF-8')
            return
    yield Document(digest.digest(), chunks) if any(chunks) else BadDocument(path, 'empty document')


def _jsonl_documents(piece: Piece, text_key: str, meter: Meter) -> Iterator[Document | BadDocument]:
    source = piece.source
    with opened(source, meter) as stream:
        position = piece.start
        if position > 0:
            # The range begins with the first line that starts in it.
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        first = position
        number = 0
        lines_before = None
        while piece.end is None or position < piece.end:
            line = stream.readline()
            if not line:
                return
            number += 1
            position += len(line)
            if line.isspace():
                continue
            try:
                yield _from_line(line, text_key)
            except _BadError as error:
                if lines_before is None:
                    # Only a message needs the number of the line in the file, so only now is it worked out.
                    lines_before = _count_lines(source, first)
                yield BadDocument(f'{source.path}, line {lines_before + number}', *error.args)


def _count_lines(source: Source, end: int) -> int:
    """Count the lines in the first `end` bytes."""
    count = 0
    with opened(source) as stream:
        while end > 0 and (block := stream.read(min(BLOCK_BYTES, end))):
            count += block.count(b'\n')
            end -= len(block)
    return count


def _from_line(line: bytes, text_key: str) -> Document:
    """Make a document of a JSON line."""
    try:
        # Windows marks a file's first line. Numbers are of no interest, and Python limits the digits of integers.
        record = json.loads(line.decode('utf-8-sig'), parse_int=float)
    except UnicodeDecodeError:
        raise _BadError('invalid UTF-8') from None
    except (ValueError, RecursionError):
        if b'\0' in line:
            raise _BadError('malformed JSON (NUL bytes, as in UTF-16)') from None
        start = line.strip()[:1]
        if line.strip() in (b'[', b'[{') or (start == b'[' and line.rstrip().endswith(b',')):
            raise _BadError('the file is one array over several lines', _ARRAY) from None
        spread = line.strip() == b'{'
        raise _BadError(
            'malformed JSON' + (' (an object over several lines: there must be one in each line)' if spread else '')
        ) from None
    if isinstance(record, list) and any(isinstance(item, dict) for item in record):
        raise _BadError('the file is one array, not lines', _ARRAY)
    if not isinstance(record, dict):
        raise _BadError('not a JSON object')
    if text_key not in record:
        raise _missing(text_key, 'fields', record)
    return _from_field(record[text_key], text_key)


_ARRAY = "make lines of it, as with: jq -c '.[]' FILE > FILE.jsonl"


def _missing(text_key: str, kind: str, names: Iterable[str]) -> _BadError:
    some = [shown(str(name)) for name in names]
    more = ', ...' if len(some) > NAMES_SHOWN else ''
    return _BadError(
        f'no text in "{text_key}" (its {kind}: {", ".join(some[:NAMES_SHOWN]) or "none"}{more})',
        'name the one that holds the text with --text-key',
    )


def _from_field(value: object, text_key: str) -> Document:
    """Make a document of a field's value."""
    if value is None:
        raise _BadError(f'no text in "{text_key}"')
    if not isinstance(value, str):
        raise _BadError(f'"{text_key}" is not a string')
    if not value:
        raise _BadError('empty document')
    digest = content_hash()
    try:
        digest.update(value.encode())
    except UnicodeEncodeError:
        raise _BadError('invalid Unicode (half of a surrogate pair)') from None
    return Document(digest.digest(), [value])


def open_parquet(stream: Any) -> pq.ParquetFile:
    """Open Parquet: a buffer is read at a time, and the checksums of pages, where there are some, are looked at."""
    return pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False, buffer_size=BLOCK_BYTES)


def _parquet_documents(piece: Piece, text_key: str, meter: Meter) -> Iterator[Document | BadDocument]:
    source = piece.source
    with opened(source) as stream, tempfile.TemporaryFile() as unpacked:
        if source.compression:  # Parquet is read from its end
            while block := stream.read(BLOCK_BYTES):
                with explained('write', f'the temporary folder {tempfile.gettempdir()}'):
                    unpacked.write(block)
                    unpacked.flush()
        with refusing('parquet', source.path):
            file = open_parquet(unpacked if source.compression else stream)
        names = file.schema_arrow.names
        if text_key not in names:
            yield BadDocument(source.path, *_missing(text_key, 'columns', names).args)
            return
        if names.count(text_key) > 1:
            yield BadDocument(source.path, f'several columns "{text_key}"')
            return
        groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        if min(groups, default=0) < 0 or sum(groups) != file.metadata.num_rows:
            yield BadDocument(source.path, 'damaged parquet data (its row groups have not as many rows as the file)')
            return
        last = len(groups) if piece.end is None else piece.end
        first, rows = sum(groups[: piece.start]), sum(groups[piece.start : last])
        for group in range(piece.start, last):
            number, end = sum(groups[:group]), sum(groups[: group + 1])
            try:
                with refusing('parquet', source.path):
                    _check_rows(file, group, text_key)
                    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[text_key]):
                        for cell in batch.column(batch.schema.get_field_index(text_key)):
                            number += 1
                            meter.share = (number - first) / rows
                            try:
                                yield _from_cell(cell, text_key)
                            except _BadError as error:
                                yield BadDocument(f'{source.path}, row {number}', *error.args)
                if number != end:
                    raise DamagedError('damaged parquet data (it has not as many rows as it says)')
            except DamagedError as error:
                # The other row groups are none the worse for it.
                yield BadDocument(f'{source.path}, rows {number + 1} to {end}', str(error))


def _check_rows(file: pq.ParquetFile, group: int, text_key: str) -> None:
    """Refuse a row group of which the column has another number of values than it has rows."""
    found = file.metadata.row_group(group)
    for at in range(found.num_columns):
        column = found.column(at)
        if column.path_in_schema == text_key and column.num_values != found.num_rows:
            raise DamagedError(f'damaged parquet data ({column.num_values} values in {found.num_rows} rows)')


def _from_cell(cell: Any, text_key: str) -> Document:
    try:
        return _from_field(cell.as_py(), text_key)
    except UnicodeDecodeError:
        raise _BadError('invalid UTF-8') from None
    except (ValueError, OverflowError):  # as of a date that Python does not have
        raise _BadError(f'"{text_key}" is not a string') from None
