"""Rows to MDS shards, by streaming's writer, and the index of all of them, by streaming's merging."""

import gzip
import importlib
import importlib.util
import logging
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.errors import naming
from composer_tst.cli.prepare_data.parts import Settings

# A quarter of streaming's default: its writer holds a shard three times, and a worker is to need less than 400 MB.
SHARD_BYTES = 1 << 24
# What a shard has beside its rows, at most.
HEAD_BYTES = 512
# A row must be within reach of the 32-bit offsets of a shard.
LONGEST_ROW = 1 << 28
INDEX = 'index.json'


def streaming(name: str) -> Any:
    """A module of streaming.base. In a worker only: a process that trains needs all of the package.

    The package brings torch, half a gigabyte for each worker and ten seconds. So its `__init__` files are passed over,
    and modules stand in for torch's, of which names are imported and none is used.
    """
    if 'streaming' not in sys.modules:
        (root,) = importlib.util.find_spec('streaming').submodule_search_locations  # pyright: ignore
        for package, path in (('streaming', root), ('streaming.base', os.path.join(root, 'base'))):
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = [path]
        absent = {'torch', 'torch.distributed', 'torch.utils', 'torch.utils.data'} - sys.modules.keys()
        for module in absent:
            sys.modules[module] = ModuleType(module)
            sys.modules[module].__getattr__ = lambda name: object
        importlib.import_module('streaming.base.format.mds.writer')
        for module in absent:
            del sys.modules[module]
    return importlib.import_module(f'streaming.base.{name}')


def check_options(settings: Settings) -> None:
    """Refuse what streaming does not know.

    Raises:
        CommandError: if the compression or a hash is unknown.
    """
    known = {
        '--compression': streaming('compression').get_compressions(),
        '--hashes': streaming('hashing').get_hashes(),
    }
    given = {'--compression': {settings.compression} - {None}, '--hashes': set(settings.hashes)}
    for option, names in given.items():
        for name in names - known[option]:
            there = sorted({each.partition(':')[0] for each in known[option]})
            raise CommandError(f'{option} {name}: there are {", ".join(there)}')


class RowWriter:
    """Packs tokens to rows and writes these to a folder of its own, which is made with the first of them."""

    def __init__(self, folder: str, settings: Settings, eos_id: int):
        self.folder, self.settings, self.eos_id = folder, settings, eos_id
        self.writer: Any = None
        self.held = [np.empty(0, np.int32)]  # they fill no row yet
        self.documents = self.rows = self.ends = 0

    def add(self, tokens: NDArray[np.int32], is_last: bool) -> None:
        """Append array[T] of tokens, and end-of-text if they are the last of a document."""
        self.held += [tokens, np.array([self.eos_id], np.int32)] if is_last else [tokens]
        self.documents += is_last

    def write(self) -> None:
        """Write what rows there are."""
        stream = np.concatenate(self.held)
        length = self.settings.seq_len
        rows = stream[: len(stream) // length * length].reshape(-1, length)
        # A copy, because a view would keep the whole stream in memory.
        self.held = [stream[rows.size :].copy()]
        self.rows += len(rows)
        self.ends += int(np.count_nonzero(rows == self.eos_id))
        if len(rows) and not self.writer:
            # Without the time: two runs at once, and one that goes on, make the same bytes.
            streaming('compression').Gzip.compress = lambda gz, data: gzip.compress(data, gz.level, mtime=0)
            self.writer = streaming('format.mds.writer').MDSWriter(
                columns={'tokens': 'ndarray:int32'},
                out=self.folder,
                compression=self.settings.compression,
                hashes=list(self.settings.hashes),
                size_limit=max(SHARD_BYTES, HEAD_BYTES + 4 * length),
            )
        for row in rows:
            self.writer.write({'tokens': row})

    def finish(self) -> list[str]:
        """Write the last shard and the index; return the names of all files, the index last."""
        if self.writer is None:
            return []
        self.writer.finish()
        return sorted(os.listdir(self.folder), key=lambda name: (name == INDEX, name))

    def counts(self) -> dict[str, int]:
        """What there is, and of how many documents some or all tokens were dropped with the last row."""
        return {
            'documents': self.documents,
            'cut_documents': self.documents - self.ends,
            'rows': self.rows,
            'tokens': self.rows * self.settings.seq_len,
            'dropped_tokens': sum(map(len, self.held)),
        }


def merge(indexes: dict[str, str]) -> str:
    """Merge the indexes of parts, by the names of their folders, to one. In a worker only: it changes its folder."""
    logging.disable(logging.WARNING)  # streaming warns of a temporary folder
    with tempfile.TemporaryDirectory() as folder, naming(folder):
        os.chdir(folder)  # in a whole path, streaming would take a '#' or '?' for those of an address
        for name, index in indexes.items():
            Path(name).mkdir()
            Path(name, INDEX).write_text(index)
        streaming('util').merge_index([f'{name}/{INDEX}' for name in indexes], '.')
        return Path(INDEX).read_text()
