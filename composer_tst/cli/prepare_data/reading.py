"""Opening inputs: the stream of a source's bytes, unpacked, with damage told from failures to read."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import zstandard

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.errors import shown
from composer_tst.cli.prepare_data.inputs import Input
from composer_tst.cli.prepare_data.sources import MISSING, Source
from composer_tst.cli.prepare_data.stores import store_of

BLOCK_BYTES = 1 << 20
ZSTD_HEADER = 18  # bytes of a frame's header at most
ZSTD_WINDOW = 1 << 27  # what decoders take unless told otherwise, and Arrow's cannot be


class _Members(io.RawIOBase):
    """The bytes of bzip2 or xz members, one after another.

    Python's own files take a member that is damaged at its start for the end of the data.
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
    'gzip': lambda stream: gzip.GzipFile(fileobj=stream),
    'zstd': lambda stream: io.BufferedReader(pa.input_stream(stream, compression='zstd'), BLOCK_BYTES),  # pyright: ignore
    'bzip2': lambda stream: io.BufferedReader(_Members(stream, bz2.BZ2Decompressor), BLOCK_BYTES),
    'xz': lambda stream: io.BufferedReader(_Members(stream, lzma.LZMADecompressor, b'\0'), BLOCK_BYTES),
}
# What decoders raise on data that their format refuses. A failure to read is a CommandError by then.
REFUSALS = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, pa.ArrowException)


class DamagedError(Exception):
    """A file that is not there, or whose bytes its format refuses."""


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
    with store_of(source.path).open(source.path, source.size, source.stamp) as raw:
        if meter is not None:
            meter.file = raw
        stream = io.BufferedReader(raw, BLOCK_BYTES)
        if source.compression:
            if source.size == 0:
                raise DamagedError(f'damaged {source.compression} data (an empty file)')
            if source.compression == 'zstd':
                _check_window(source, stream.peek(ZSTD_HEADER))
            stream = UNPACKERS[source.compression](stream)
        yield stream
        raw.check()


def _check_window(source: Source, start: bytes) -> None:
    try:
        window = zstandard.get_frame_parameters(start[:ZSTD_HEADER]).window_size
    except zstandard.ZstdError:  # which the decoder says better
        return
    if window > ZSTD_WINDOW:
        raise CommandError(
            f'{shown(source.path)} is compressed over windows of {window >> 20:,} MiB, and at most '
            f'{ZSTD_WINDOW >> 20} can be read: compress it again, with zstd --long=27 at most'
        )


@contextmanager
def refusing(kind: str) -> Iterator[None]:
    """Turn what a decoder raises into the one word for damaged data."""
    try:
        yield
    except REFUSALS as error:
        raise DamagedError(f'damaged {kind} data') from error


def blocks(stream: Any) -> Iterator[bytes]:
    """The bytes of a stream, some at a time, without the mark that some editors put before UTF-8."""
    first = True
    while block := stream.read(BLOCK_BYTES):
        yield block.removeprefix(b'\xef\xbb\xbf') if first else block
        first = False
