"""Inputs as streams of bytes, unpacked. A store that fails is a sentence and never taken for damaged data."""

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.inputs import MISSING, Source
from composer_tst.cli.prepare_data.storage import ChangedError, explained, is_s3, s3, shown

BLOCK_BYTES = 1 << 20


class DamagedError(Exception):
    """A file that is not there, or whose bytes its format refuses."""


class Input(io.RawIOBase):
    """The bytes of a source, on disk or in a bucket, as it was when it was listed."""

    def __init__(self, source: Source):
        self.path = source.path
        # The byte that is read next.
        self.position = 0
        with explained('read', self.path):
            self.raw: Any = (
                s3().S3Object(source.path, source.size, source.stamp) if is_s3(self.path) else io.FileIO(self.path)
            )
        self.listed = source.size, source.stamp
        self.check()

    def check(self) -> None:
        """Refuse an input that changed. Of an object, each answer of the store is checked."""
        if is_s3(self.path):
            return
        with explained('read', self.path):
            found = os.fstat(self.raw.fileno())
        if (found.st_size, str(found.st_mtime_ns)) != self.listed:
            raise ChangedError(self.path)

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read up to the buffer's size."""
        with explained('read', self.path):
            count = self.raw.readinto(buffer)
        self.position += count
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a byte."""
        self.position = self.raw.seek(offset, whence)
        return self.position

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self.raw.close()
        super().close()


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
        while True:
            packed = b''
            if self.decoder is None or self.decoder.needs_input:
                packed, self.rest = self.rest or self.stream.read(BLOCK_BYTES), b''
                if not packed:
                    if self.decoder is None:
                        return 0
                    raise EOFError('a member is cut short')
            if self.decoder is None:
                packed = packed.lstrip(self.padding)
                if not packed:
                    continue
                self.decoder = self.new()
            unpacked = self.decoder.decompress(packed, len(buffer))
            if self.decoder.eof:
                self.rest, self.decoder = self.decoder.unused_data, None
            if unpacked:
                buffer[: len(unpacked)] = unpacked
                return len(unpacked)


UNPACKERS: dict[str, Callable[[Any], Any]] = {
    # Not pyarrow, which refuses the zeros that tapes and tools leave after a member.
    'gzip': lambda stream: gzip.GzipFile(fileobj=stream),
    'zstd': lambda stream: io.BufferedReader(pa.input_stream(stream, compression='zstd'), BLOCK_BYTES),  # pyright: ignore
    'bzip2': lambda stream: io.BufferedReader(_Members(stream, bz2.BZ2Decompressor), BLOCK_BYTES),
    'xz': lambda stream: io.BufferedReader(_Members(stream, lzma.LZMADecompressor, b'\0'), BLOCK_BYTES),
}
# What decoders raise on data that their format refuses. A failure to read is a CommandError by then.
REFUSALS = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, pa.ArrowException)
# What pyarrow says of zstd that is whole, and that it cannot read.
UNREADABLE = {
    'too much memory': 'is compressed over windows of more than 128 MiB: compress it again with zstd --long=27',
    'Dictionary mismatch': 'is compressed with a dictionary: compress it again without one',
}


@dataclass
class Meter:
    """How far the file that is read has been read: the file, and a share for what is not read in order."""

    file: Input | None = None
    share: float | None = None

    def bytes_of(self, start: int, size: int) -> int:
        """How many of `size` bytes from `start` on have been read."""
        if self.share is not None:
            return int(self.share * size)
        return 0 if self.file is None else min(max(self.file.position - start, 0), size)


@contextmanager
def opened(source: Source, meter: Meter | None = None) -> Iterator[Any]:
    """Open a source as a stream of unpacked bytes; at its end, see whether it changed meanwhile."""
    if source.stamp == MISSING:
        raise DamagedError('it is not there')
    with Input(source) as raw:
        if meter is not None:
            meter.file = raw
        stream = io.BufferedReader(raw, BLOCK_BYTES)
        if source.compression:
            if source.size == 0:
                raise DamagedError(f'damaged {source.compression} data (an empty file)')
            stream = UNPACKERS[source.compression](stream)
        yield stream
        raw.check()


@contextmanager
def refusing(kind: str, path: str) -> Iterator[None]:
    """Turn what a decoder raises into the one word for damaged data."""
    try:
        yield
    except REFUSALS as error:
        for word, why in UNREADABLE.items():
            if word in str(error):
                raise CommandError(f'{shown(path)} {why}') from error
        raise DamagedError(f'damaged {kind} data') from error


def blocks(stream: Any) -> Iterator[bytes]:
    """The bytes of a stream, some at a time, without the mark that some editors put before UTF-8."""
    first = True
    while block := stream.read(BLOCK_BYTES):
        yield block.removeprefix(b'\xef\xbb\xbf') if first else block
        first = False
