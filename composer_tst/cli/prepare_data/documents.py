"""Reading documents: plain text, JSON lines and Parquet, packed or not, on disk or on S3."""

import codecs
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from composer_tst.cli.prepare_data.errors import explained
from composer_tst.cli.prepare_data.reading import BLOCK_BYTES, DamagedError, Meter, blocks, opened, refusing
from composer_tst.cli.prepare_data.sources import Source
from composer_tst.cli.prepare_data.split import content_hash

# A text file up to this size is read once and held; a longer one is read twice, first for its hash.
HELD_BYTES = 4 << 20
# Few rows of Parquet at a time, since a row may be a book.
BATCH_ROWS = 64


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
    kind = source.compression or source.format
    try:
        with refusing(kind):
            yield from readers[source.format](piece, text_key, meter or Meter())
    except DamagedError as error:
        yield BadDocument(source.path, str(error))


def _decoded(source: Source, meter: Meter) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder('utf-8')()
    with opened(source, meter) as stream:
        for block in blocks(stream):
            yield decoder.decode(block)


def _text_document(piece: Piece, text_key: str, meter: Meter) -> Iterator[Document | BadDocument]:
    source = piece.source
    decoder = codecs.getincrementaldecoder('utf-8')()
    digest = content_hash()
    size = 0
    held = []
    with opened(source, meter) as stream:
        try:
            for block in blocks(stream):
                if b'\0' in block:
                    yield BadDocument(source.path, 'NUL bytes, as in UTF-16 or in what is no text')
                    return
                digest.update(block)
                size += len(block)
                text = decoder.decode(block)
                held = [*held, text] if size <= HELD_BYTES else []
            decoder.decode(b'', final=True)
        except UnicodeDecodeError:
            yield BadDocument(source.path, 'invalid UTF-8')
            return
    if size == 0:
        yield BadDocument(source.path, 'empty document')
    else:
        yield Document(digest.digest(), held or _decoded(source, meter))


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
            document = _from_line(line, text_key)
            if isinstance(document, str):
                if lines_before is None:
                    # Only a message needs the number of the line in the file, so only now is it worked out.
                    lines_before = _count_lines(source, first)
                document = BadDocument(f'{source.path}, line {lines_before + number}', document)
            yield document


def _count_lines(source: Source, end: int) -> int:
    """Count the lines in the first `end` bytes."""
    count = 0
    with opened(source) as stream:
        while end > 0 and (block := stream.read(min(BLOCK_BYTES, end))):
            count += block.count(b'\n')
            end -= len(block)
    return count


def _from_line(line: bytes, text_key: str) -> Document | str:
    """Make a document of a JSON line, or say why it is none."""
    try:
        # Windows marks a file's first line. Numbers are of no interest, and Python limits the digits of integers.
        record = json.loads(line.decode('utf-8-sig'), parse_int=float)
    except UnicodeDecodeError:
        return 'invalid UTF-8'
    except (ValueError, RecursionError):
        if b'\0' in line:
            return 'malformed JSON (NUL bytes, as in UTF-16)'
        spread = line.strip() in (b'{', b'[', b'[{')
        return 'malformed JSON' + (' (an object over several lines: there must be one in each line)' if spread else '')
    if not isinstance(record, dict):
        return 'not a JSON object'
    return _from_field(record.get(text_key), text_key)


def _from_field(value: object, text_key: str) -> Document | str:
    """Make a document of a field's value, or say why it is none."""
    if value is None:
        return f'no text in "{text_key}"'
    if not isinstance(value, str):
        return f'"{text_key}" is not a string'
    if not value:
        return 'empty document'
    digest = content_hash()
    try:
        digest.update(value.encode())
    except UnicodeEncodeError:
        return 'invalid Unicode (half of a surrogate pair)'
    return Document(digest.digest(), [value])


def open_parquet(stream: Any) -> pq.ParquetFile:
    """Open Parquet such that the checksums of its pages, where it has them, are looked at."""
    return pq.ParquetFile(stream, page_checksum_verification=True)


def _parquet_documents(piece: Piece, text_key: str, meter: Meter) -> Iterator[Document | BadDocument]:
    source = piece.source
    # Parquet is read from its end, so a file compressed as a whole is unpacked to disk first.
    with opened(source) as raw, _unpacked(raw) if source.compression else nullcontext(raw) as stream:
        with refusing('parquet'):
            file = open_parquet(stream)
        columns = file.schema_arrow.names.count(text_key)
        if columns != 1:
            yield BadDocument(source.path, f'{"several columns" if columns else "no column"} "{text_key}"')
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
                with refusing('parquet'):
                    _check_rows(file, group, text_key)
                    for cell in _cells(file, group, text_key):
                        number += 1
                        meter.share = (number - first) / rows
                        try:
                            document = _from_field(cell.as_py(), text_key)
                        except UnicodeDecodeError:
                            document = 'invalid UTF-8'
                        except (ValueError, OverflowError):  # as of a date that Python does not have
                            document = f'"{text_key}" is not a string'
                        if isinstance(document, str):
                            document = BadDocument(f'{source.path}, row {number}', document)
                        yield document
                if number != end:
                    raise DamagedError('damaged parquet data (it has not as many rows as it says)')
            except DamagedError as error:
                # The other row groups are none the worse for it.
                yield BadDocument(f'{source.path}, rows {number + 1} to {end}', str(error))


@contextmanager
def _unpacked(stream: Any) -> Iterator[Any]:
    """A temporary file of the bytes of a stream. Its failures are not those of the data."""
    with explained('write', f'the temporary folder {tempfile.gettempdir()}'):
        file = tempfile.TemporaryFile()  # noqa: SIM115
    with file:
        while block := stream.read(BLOCK_BYTES):
            with explained('write', f'the temporary folder {tempfile.gettempdir()}'):
                file.write(block)
                file.flush()
        yield file


def _check_rows(file: pq.ParquetFile, group: int, text_key: str) -> None:
    """Refuse a row group of which the column has another number of values than it has rows."""
    found = file.metadata.row_group(group)
    for at in range(found.num_columns):
        column = found.column(at)
        if column.path_in_schema == text_key and column.num_values != found.num_rows:
            raise DamagedError(f'damaged parquet data ({column.num_values} values in {found.num_rows} rows)')


def _cells(file: pq.ParquetFile, group: int, text_key: str) -> Iterator[Any]:
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[text_key]):
        yield from batch.column(batch.schema.get_field_index(text_key))
