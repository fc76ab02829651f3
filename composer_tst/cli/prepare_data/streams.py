"""Inputs as streams of bytes, unpacked. A disk or a store that fails is never taken for damaged data."""

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from composer_tst.cli.prepare_data import s3
from composer_tst.cli.prepare_data.errors import BadDocument, changed, naming
from composer_tst.cli.prepare_data.inputs import MISSING, Source

BLOCK_BYTES = 1 << 20


class _Members(io.RawIOBase):
    """The bytes of bzip2 or xz members, one after another.

    Python's own files take a member that is damaged at its start for the end of the data; pyarrow refuses an empty
    member of bzip2 before another.
    """

    def __init__(self, stream: Any, decoder: Callable[[], Any], padding: bytes = b''):
        self.stream, self.new, self.padding = stream, decoder, padding
        self.decoder: Any = None  # between members there is none
        self.rest = b''

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read up to the buffer's size; EOFError if a member is cut short."""
        unpacked = b''
        while not unpacked:
            if self.decoder is None or self.decoder.needs_input:
                self.rest = self.rest or self.stream.read(BLOCK_BYTES)
                if not self.rest and self.decoder:
                    raise EOFError('a member is cut short')
                if not self.rest:
                    return 0
            if self.decoder is None:
                self.rest = self.rest.lstrip(self.padding)
                if not self.rest:
                    continue
                self.decoder = self.new()
            unpacked, self.rest = self.decoder.decompress(self.rest, len(buffer)), b''
            if self.decoder.eof:
                self.rest, self.decoder = self.decoder.unused_data, None
        buffer[: len(unpacked)] = unpacked
        return len(unpacked)


UNPACKERS: dict[str, Callable[[Any], Any]] = {
    '': lambda stream: stream,
    # Not pyarrow, which refuses the zeros that tapes and tools leave after a member.
    'gzip': lambda stream: gzip.GzipFile(fileobj=stream),
    'zstd': lambda stream: io.BufferedReader(pa.input_stream(stream, compression='zstd'), BLOCK_BYTES),  # pyright: ignore
    'bzip2': lambda stream: io.BufferedReader(_Members(stream, bz2.BZ2Decompressor), BLOCK_BYTES),
    'xz': lambda stream: io.BufferedReader(_Members(stream, lzma.LZMADecompressor, b'\0'), BLOCK_BYTES),
}
# What decoders raise on data that their format refuses. An OSError of the disk has a number.
REFUSALS = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, pa.ArrowException)


def _check(source: Source) -> None:
    """Refuse an input that changed. Of an object, each answer of the store is checked."""
    if not s3.is_s3(source.path):
        found = os.stat(source.path)
        if (found.st_size, str(found.st_mtime_ns)) != (source.size, source.stamp):
            raise changed(source.path)


@contextmanager
def opened(source: Source) -> Iterator[tuple[Any, Any]]:
    """Open a source as a stream of unpacked bytes, beside the file itself; at the end, see whether it changed.

    Raises:
        BadDocument: if it is not there, or empty where there should be packed data.
    """
    if source.stamp == MISSING:
        raise BadDocument('it is not there')
    if source.compression and source.size == 0:
        raise BadDocument(f'damaged {source.compression} data (an empty file)')
    _check(source)
    path = source.path
    with naming(path), s3.opened(path, source.size, source.stamp) if s3.is_s3(path) else io.FileIO(path) as file:
        yield UNPACKERS[source.compression](io.BufferedReader(file, BLOCK_BYTES)), file
    _check(source)


@contextmanager
def refusing(kind: str) -> Iterator[None]:
    """Turn what a decoder raises into a bad document, with the decoder's own words."""
    try:
        yield
    except REFUSALS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        raise BadDocument(f'damaged {kind} data ({str(error) or "it ends too early"})') from error
