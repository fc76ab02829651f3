"""Rows to MDS shards, by streaming's writer: a folder for each part and split, whose index is written last."""

import contextlib
import gzip
import importlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.storage import explained

# streaming's default.
SHARD_BYTES = 1 << 26
# What a shard has beside its rows, at most.
HEAD_BYTES = 512
# A row must be within reach of the 32-bit offsets of a shard.
LONGEST_ROW = 1 << 28
INDEX = 'index.json'


class _Absent(ModuleType):
    """Stands for a module of which names are imported and none is used."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return object


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Import streaming's writer alone: its package brings torch, half a gigabyte for each worker and ten seconds."""
    found = importlib.util.find_spec('streaming')
    assert found is not None
    assert found.submodule_search_locations is not None
    for name, path in (('streaming', ''), ('streaming.base', 'base')):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [os.path.join(found.submodule_search_locations[0], path)]
    absent = ('torch', 'torch.distributed', 'torch.utils', 'torch.utils.data')
    absent = [name for name in absent if name not in sys.modules]
    sys.modules.update({name: _Absent(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@lru_cache
def streaming(name: str) -> Any:
    """A module of streaming.base. In a worker only: a process that trains needs all of the package."""
    if 'streaming' not in sys.modules:
        with _without_torch():
            importlib.import_module('streaming.base.format.mds.writer')
    return importlib.import_module(f'streaming.base.{name}')


@dataclass(frozen=True)
class ShardOptions:
    """How shards are written: compression, as in `zstd:7`, and the names of hashes, sorted."""

    compression: str | None
    hashes: list[str]


def check_options(options: ShardOptions) -> None:
    """Refuse what streaming does not know.

    Raises:
        CommandError: if the compression or a hash is unknown.
    """
    known = streaming('compression')
    if options.compression and not known.is_compression(options.compression):
        levels: dict[str, list[int]] = {}
        for name in known.get_compressions():
            kind, _, level = name.partition(':')
            levels.setdefault(kind, []).extend([int(level)] if level else [])
        there_are = [
            kind + (f', {kind}:{min(of)} to {kind}:{max(of)}' if of else '') for kind, of in sorted(levels.items())
        ]
        raise CommandError(f'--compression {options.compression}: there are {"; ".join(there_are)}')
    for name in options.hashes:
        if not streaming('hashing').is_hash(name):
            raise CommandError(f'--hashes {name}: not one of {", ".join(sorted(streaming("hashing").get_hashes()))}')


class RowWriter:
    """Writes rows to a folder of its own, which is made with the first of them."""

    def __init__(self, folder: str, options: ShardOptions):
        self.folder, self.options = folder, options
        self.writer: Any = None

    def write(self, rows: NDArray[np.int32]) -> None:
        """Write rows[N, L]."""
        with explained('write', self.folder):
            if self.writer is None:
                # Without the time: two runs at once, and one that goes on, make the same bytes.
                streaming('compression').Gzip.compress = lambda gz, data: gzip.compress(data, gz.level, mtime=0)
                self.writer = streaming('format.mds.writer').MDSWriter(
                    columns={'tokens': 'ndarray:int32'},
                    out=self.folder,
                    compression=self.options.compression,
                    hashes=self.options.hashes,
                    size_limit=max(SHARD_BYTES, HEAD_BYTES + 4 * rows.shape[1]),
                )
            for row in rows:
                self.writer.write({'tokens': row})

    def finish(self) -> dict[str, list]:
        """Write what is left and the index; return (size, sha256) of each file, the index last."""
        if self.writer is None:
            return {}
        with explained('write', self.folder):
            self.writer.finish()
            files = {}
            for name in sorted(os.listdir(self.folder), key=lambda name: (name == INDEX, name)):
                with open(os.path.join(self.folder, name), 'rb') as file:
                    data = file.read()
                files[name] = [len(data), digest_of(data)]
        return files


def merge(indexes: dict[str, str]) -> str:
    """Merge the indexes of parts, by the names of their folders, to one."""
    logging.disable(logging.WARNING)  # it warns of its temporary folder
    with explained('write', f'the temporary folder {tempfile.gettempdir()}'), tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, text in indexes.items():
            os.mkdir(os.path.join(folder, name))
            paths.append(os.path.join(folder, name, INDEX))
            with open(paths[-1], 'w') as file:
                file.write(text)
        streaming('util').merge_index(paths, folder)
        with open(os.path.join(folder, INDEX)) as file:
            return file.read()


def read_rows(data: bytes, entry: dict[str, Any]) -> NDArray[np.int32]:
    """The rows[N, L] of a shard, of which `entry` is what the index says.

    Raises:
        ValueError: if it is none.
    """
    try:
        if entry['compression']:
            data = streaming('compression').decompress(entry['compression'], data)
        reader = streaming('format.mds.reader').MDSReader.from_json('', None, entry)
        ends = np.frombuffer(data, np.uint32, entry['samples'] + 1, 4)
        rows = [reader.decode_sample(data[start:end])['tokens'] for start, end in pairwise(ends)]
        return np.stack(rows)
    except Exception as error:  # of the decompressors, numpy and streaming
        raise ValueError(str(error)) from error


def entries_of(index: str) -> list[dict[str, Any]]:
    """What an index says of its shards."""
    return json.loads(index)['shards']


def stored(entry: dict[str, Any]) -> dict[str, Any]:
    """What an entry of an index says of the file that is stored."""
    return entry['zip_data'] or entry['raw_data']


def digest_of(data: bytes) -> str:
    """What a record keeps of a file's content."""
    return sha256(data).hexdigest()
