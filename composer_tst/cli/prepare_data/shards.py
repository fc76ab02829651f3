"""The MDS format for rows of tokens, from and to bytes, without a file or a copy of each row in between.

The bytes are those of streaming's own writer, as a test compares, whose import costs ten seconds of every run.
"""

import hashlib
import importlib.util
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from composer_tst.cli.main import CommandError

SHARD_BYTES = 1 << 26
# A row must be within reach of the 32-bit offsets of a shard.
LONGEST_ROW = 1 << 28
GZIP = b'\x1f\x8b\x08'


@dataclass(frozen=True)
class ShardOptions:
    """How shards are written: compression, as in `zstd:7`, and the names of hashes, sorted."""

    compression: str | None
    hashes: list[str]

    def check(self) -> None:
        """Refuse what streaming does not know.

        Raises:
            CommandError: if the compression or a hash is unknown.
        """
        if self.compression and not _streaming('compression').is_compression(self.compression):
            raise CommandError(f'--compression {self.compression}: streaming has no such compression')
        for name in self.hashes:
            known = _streaming('hashing')
            if not known.is_hash(name):
                raise CommandError(f'--hashes {name}: not one of {", ".join(sorted(known.get_hashes()))}')

    def config(self) -> dict[str, Any]:
        """What a shard and its entry in the index say of their format."""
        return {
            'version': 2,
            'format': 'mds',
            'compression': self.compression,
            'hashes': self.hashes,
            'size_limit': SHARD_BYTES,
            'column_names': ['tokens'],
            'column_encodings': ['ndarray:int32'],
            'column_sizes': [None],
        }

    def rows_in_shard(self, seq_len: int) -> int:
        """How many rows of L tokens a full shard holds."""
        row = len(_row_head(seq_len)) + 4 * seq_len + 4
        return max(1, (SHARD_BYTES - 8 - len(self._config_bytes())) // row)

    def encode(self, rows: NDArray[np.int32]) -> bytes:
        """Make a shard of rows[N, L]."""
        count, seq_len = rows.shape
        head, config = _row_head(seq_len), self._config_bytes()
        size = len(head) + 4 * seq_len
        offsets = 4 + 4 * (count + 1) + len(config) + size * np.arange(count + 1, dtype=np.int64)
        body = np.empty((count, size), np.uint8)
        body[:, : len(head)] = np.frombuffer(head, np.uint8)
        body[:, len(head) :] = np.ascontiguousarray(rows, '<i4').view(np.uint8)
        return b''.join([np.uint32(count).tobytes(), offsets.astype('<u4').tobytes(), config, body.data])

    def decode(self, data: bytes, count: int, seq_len: int) -> NDArray[np.int32]:
        """Take the rows[N, L] out of a shard.

        Raises:
            ValueError: if it is none of N rows of L tokens.
        """
        size = len(_row_head(seq_len)) + 4 * seq_len
        body = np.frombuffer(data, np.uint8)[len(data) - count * size :].reshape(count, size)
        rows = np.ascontiguousarray(body[:, -4 * seq_len :]).view('<i4')
        if self.encode(rows) != data:
            raise ValueError('not the format')
        return rows

    @property
    def extension(self) -> str:
        """What follows the name of a shard, with its dot."""
        return f'.{_streaming("compression").get_compression_extension(self.compression)}' if self.compression else ''

    def pack(self, data: bytes, name: str) -> tuple[bytes, dict[str, Any]]:
        """Compress and hash a shard; return its bytes as stored and what the index says of them."""
        packed, entry = data, {'raw_data': self._info(data, name), 'zip_data': None}
        if self.compression:
            known = _streaming('compression')
            packed = known.compress(self.compression, data)
            if packed.startswith(GZIP):
                # Without the time, which would make other bytes of a part that is converted again.
                packed = packed[:4] + bytes(4) + packed[8:]
            entry['zip_data'] = self._info(packed, f'{name}{self.extension}')
        return packed, {**entry, **self.config()}

    def unpack(self, packed: bytes) -> bytes:
        """The inverse of compressing."""
        return _streaming('compression').decompress(self.compression, packed) if self.compression else packed

    def _info(self, data: bytes, name: str) -> dict[str, Any]:
        hashes = {algorithm: _streaming('hashing').get_hash(algorithm, data) for algorithm in self.hashes}
        return {'basename': name, 'bytes': len(data), 'hashes': hashes}

    def _config_bytes(self) -> bytes:
        return json.dumps(self.config(), sort_keys=True).encode()


@lru_cache
def _row_head(seq_len: int) -> bytes:
    """What is before the tokens of a row: its bytes, its one axis, and its length in as few bytes as hold it."""
    code = 0 if seq_len < 1 << 8 else 1 if seq_len < 1 << 16 else 2
    shape = bytes([1 << 2 | code]) + seq_len.to_bytes(1 << code, 'little')
    return np.uint32(len(shape) + 4 * seq_len).tobytes() + shape


@lru_cache
def _streaming(name: str) -> Any:
    """A module of streaming.base by itself: importing streaming as a whole imports torch and more."""
    package = importlib.util.find_spec('streaming')
    assert package is not None
    assert package.origin is not None
    path = os.path.join(os.path.dirname(package.origin), 'base', f'{name}.py')
    spec = importlib.util.spec_from_file_location(f'data_prep_streaming_{name}', path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stored(entry: dict[str, Any]) -> dict[str, Any]:
    """What an entry of the index says of the file that is stored."""
    return entry['zip_data'] or entry['raw_data']


def digest_of(data: bytes) -> str:
    """What a record keeps of a file's content."""
    return hashlib.sha256(data).hexdigest()
