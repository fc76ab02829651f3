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
    (root,) = importlib.util.find_spec('streaming').submodule_search_locations  # pyright: ignore
    for name, path in (('streaming', root), ('streaming.base', os.path.join(root, 'base'))):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [path]
    names = {'torch', 'torch.distributed', 'torch.utils', 'torch.utils.data'} - sys.modules.keys()
    sys.modules.update({name: _Absent(name) for name in names})
    try:
        yield
    finally:
        for name in names:
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
    known = streaming('compression').get_compressions()
    if options.compression and options.compression not in known:
        kinds = sorted({name.partition(':')[0] for name in known})
        levels = {
            kind: [int(name.partition(':')[2]) for name in known if name.startswith(f'{kind}:')] for kind in kinds
        }
        there_are = [kind + (f', {kind}:{min(of)} to {kind}:{max(of)}' if of else '') for kind, of in levels.items()]
        raise CommandError(f'--compression {options.compression}: there are {"; ".join(there_are)}')
    hashes = streaming('hashing').get_hashes()
    for name in options.hashes:
        if name not in hashes:
            raise CommandError(f'--hashes {name}: not one of {", ".join(sorted(hashes))}')


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

    def finish(self) -> dict | None:
        """Write what is left and the index; return (size, sha256) of each file, the index last, and the index."""
        if self.writer is None:
            return None
        with explained('write', self.folder):
            self.writer.finish()
        files, data = {}, b''
        for name in sorted(os.listdir(self.folder), key=lambda name: (name == INDEX, name)):
            with open(os.path.join(self.folder, name), 'rb') as file:
                data = file.read()
            files[name] = [len(data), digest_of(data)]
        return {'files': files, 'index': data.decode()}


def merge(indexes: dict[str, str]) -> str:
    """Merge the indexes of parts, by the names of their folders, to one."""
    logging.disable(logging.WARNING)  # it warns of its temporary folder
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name, text in indexes.items():
            paths.append(os.path.join(folder, name, INDEX))
            os.mkdir(os.path.dirname(paths[-1]))
            with open(paths[-1], 'w') as file:
                file.write(text)
        streaming('util').merge_index(paths, folder)
        with open(os.path.join(folder, INDEX)) as file:
            return file.read()


def entries_of(index: str) -> list[dict[str, Any]]:
    """What an index says of its shards."""
    return json.loads(index)['shards']


def digest_of(data: bytes) -> str:
    """What a record keeps of a file's content."""
    return sha256(data).hexdigest()
