"""Reading documents: plain text, JSON lines and Parquet, plain or compressed, on disk or on S3."""

import codecs
import glob
import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import PrepareError, explained, reason
from .split import content_hash
from .storage import check_bucket, filesystem, is_s3

COMPRESSIONS = {'.gz': 'gzip', '.zst': 'zstd', '.zstd': 'zstd'}
JSONL_EXTENSIONS = ('.jsonl', '.ndjson', '.json')
BLOCK_BYTES = 1 << 20
# A text file up to this size is read once and held; a longer one is read twice, first for its hash.
HELD_BYTES = 4 << 20


@dataclass(frozen=True)
class Source:
    """One input file: its path, its size in bytes, and a stamp that changes when its content does."""

    path: str
    size: int
    stamp: str

    @property
    def compression(self) -> str | None:
        """The compression of the whole file, by its extension."""
        return COMPRESSIONS.get(os.path.splitext(self.path)[1])

    @property
    def format(self) -> str:
        """`text`, `jsonl` or `parquet`, by the extension before that of the compression."""
        stem = os.path.splitext(self.path)[0] if self.compression else self.path
        extension = os.path.splitext(stem)[1].lower()
        if extension == '.parquet':
            return 'parquet'
        return 'jsonl' if extension in JSONL_EXTENSIONS else 'text'


@dataclass(frozen=True)
class Piece:
    """A range of a source: bytes of JSON lines, row groups of Parquet, else the whole (`end` is None)."""

    source: Source
    start: int = 0
    end: int | None = None


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


def list_sources(inputs: list[str]) -> list[Source]:
    """Find the files behind files, folders, globs and S3 prefixes, sorted by path, each once.

    Hidden files and folders are left out where a folder or a glob is searched.

    Raises:
        PrepareError: if an input matches nothing, or cannot be listed.
    """
    sources: dict[str, Source] = {}
    for text in inputs:
        with explained('read', text):
            found = _list_s3(text) if is_s3(text) else _list_local(text)
        if not found:
            raise PrepareError(f'no input: {text} matches no file')
        sources.update((source.path, source) for source in found)
    if not sources:
        raise PrepareError('no input: name at least one file, folder, glob or s3:// prefix')
    unique: dict[str, Source] = {}
    for path in sorted(sources):
        # A file reached by two ways, as through a link, is read once.
        unique.setdefault(path if is_s3(path) else os.path.realpath(path), sources[path])
    return list(unique.values())


def _list_local(text: str) -> list[Source]:
    pattern = os.path.join(glob.escape(text), '**') if os.path.isdir(text) else text
    names = [text] if os.path.isfile(text) else glob.glob(pattern, recursive=True)
    if not names and not glob.has_magic(text):
        raise FileNotFoundError(text)
    sources = []
    for name in names:
        if os.path.isdir(name):
            # Without this, what is in a folder that we may not read would be left out without a word.
            with explained('read', name):
                os.scandir(name).close()
            continue
        try:
            found = os.stat(name)
            if not stat.S_ISREG(found.st_mode):
                raise PrepareError(f'cannot read {name}: it is a pipe or a device, not a file')
            size, stamp = found.st_size, str(found.st_mtime_ns)
        except FileNotFoundError:
            # A dangling link: reading it will report it as a bad document.
            size, stamp = 0, 'missing'
        sources.append(Source(os.path.abspath(name), size, stamp))
    return sources


def _list_s3(text: str) -> list[Source]:
    check_bucket(text)
    fs = filesystem(text)
    root = text.removeprefix('s3://')
    if glob.has_magic(text):
        infos = fs.glob(text, detail=True)
        root = glob.escape(root).partition('[')[0].rpartition('/')[0]  # the folders before the first wildcard
    elif fs.isfile(text):
        infos = {text: fs.info(text)}
    else:
        infos = fs.find(text, detail=True)
    return [
        Source(f's3://{info["name"]}', info['size'], str(info.get('ETag')))
        for info in infos.values()
        # A key that ends with a slash is how some tools mark an empty folder.
        if info['type'] == 'file' and not info['name'].endswith('/')
        if '/.' not in f'/{info["name"].removeprefix(root)}'
    ]


def read_documents(piece: Piece, text_key: str) -> Iterator[Document | BadDocument]:
    """Read a piece's documents in order.

    Args:
        piece: what to read.
        text_key: the field of a JSON line, or the column of a Parquet file, that holds the text.

    Raises:
        PrepareError: if the disk or the object store fails; what is wrong with the data itself comes back
            as a BadDocument.
    """
    source = piece.source
    readers = {'text': _text_document, 'jsonl': _jsonl_documents, 'parquet': _parquet_documents}
    try:
        with explained('read', source.path):
            try:
                yield from readers[source.format](piece, text_key)
            except pa.ArrowInvalid as error:
                raise _Damaged(f'damaged {source.format} data') from error
            except OSError as error:
                # pyarrow's decompressors say what is wrong with the data without an errno.
                if source.compression and error.errno is None:
                    raise _Damaged(f'damaged {source.compression} data') from error
                if not is_s3(source.path) and isinstance(error, FileNotFoundError | PermissionError):
                    raise _Damaged(reason(error)) from error
                raise
    except _Damaged as error:
        yield BadDocument(source.path, str(error))


class _Damaged(Exception):
    """A file that cannot be opened, or whose bytes its format refuses."""


@contextmanager
def _opened(source: Source) -> Iterator[Any]:
    """Open a source as a stream of uncompressed bytes."""
    with filesystem(source.path).open(source.path, 'rb') as raw:
        if source.compression:
            stream: Any = pa.input_stream(raw, compression=source.compression)
            yield io.BufferedReader(stream, BLOCK_BYTES)
        else:
            yield raw


def _blocks(stream: Any) -> Iterator[bytes]:
    while block := stream.read(BLOCK_BYTES):
        yield block


def _decoded(source: Source) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder('utf-8')()
    with explained('read', source.path), _opened(source) as stream:
        for block in _blocks(stream):
            yield decoder.decode(block)


def _text_document(piece: Piece, text_key: str) -> Iterator[Document | BadDocument]:
    source = piece.source
    decoder = codecs.getincrementaldecoder('utf-8')()
    digest = content_hash()
    size = 0
    held = []
    with _opened(source) as stream:
        try:
            for block in _blocks(stream):
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
        yield Document(digest.digest(), held or _decoded(source))


def _jsonl_documents(piece: Piece, text_key: str) -> Iterator[Document | BadDocument]:
    source = piece.source
    with _opened(source) as stream:
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
    with _opened(source) as stream:
        while end > 0 and (block := stream.read(min(BLOCK_BYTES, end))):
            count += block.count(b'\n')
            end -= len(block)
    return count


def _from_line(line: bytes, text_key: str) -> Document | str:
    """Make a document of a JSON line, or say why it is none."""
    try:
        record = json.loads(line.decode('utf-8-sig'))  # Windows marks a file's first line
    except UnicodeDecodeError:
        return 'invalid UTF-8'
    except (ValueError, RecursionError):
        return 'malformed JSON'
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


def _parquet_documents(piece: Piece, text_key: str) -> Iterator[Document | BadDocument]:
    source = piece.source
    with _opened(source) as stream, tempfile.TemporaryFile() as unpacked:
        if source.compression:
            # Parquet is read from its end, so a file compressed as a whole is unpacked to disk first.
            shutil.copyfileobj(stream, unpacked, BLOCK_BYTES)
            stream = unpacked
        file = pq.ParquetFile(stream)
        if text_key not in file.schema_arrow.names:
            yield BadDocument(source.path, f'no column "{text_key}"')
            return
        end = file.num_row_groups if piece.end is None else piece.end
        number = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        # Few rows at a time, since a row may be a book.
        for batch in file.iter_batches(64, row_groups=range(piece.start, end), columns=[text_key]):
            for cell in batch.column(0):
                number += 1
                try:
                    document = _from_field(cell.as_py(), text_key)
                except UnicodeDecodeError:
                    document = 'invalid UTF-8'
                if isinstance(document, str):
                    document = BadDocument(f'{source.path}, row {number}', document)
                yield document
