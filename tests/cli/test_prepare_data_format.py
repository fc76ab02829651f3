"""The shards of composer-tst prepare-data: byte for byte those of streaming, whenever they are made."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from common.preparing import TEXTS, L, define_rows, prepare, read_rows, refuse, succeed
from streaming import MDSWriter

from composer_tst.cli.prepare_data import shards

pytest_plugins = ['common.preparing_fixtures']


@pytest.mark.parametrize('length', [1, 3, 255, 256, 70_000])
def test_shards_are_the_bytes_of_the_writer_of_streaming(tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch):
    rows = np.random.default_rng(0).integers(0, 1 << 30, (7, length), dtype=np.int32)
    limit = 3 * (4 * length + 20) + 300
    monkeypatch.setattr(shards, 'SHARD_BYTES', limit)
    options = shards.ShardOptions('zstd:3', ['sha1', 'xxh64'])
    with MDSWriter(
        out=str(tmp_path), columns={'tokens': 'ndarray:int32'}, compression='zstd:3', hashes=['sha1', 'xxh64'],
        size_limit=limit,
    ) as writer:  # fmt: skip
        for row in rows:
            writer.write({'tokens': row})
    theirs = json.loads((tmp_path / 'index.json').read_text())['shards']
    full = options.rows_in_shard(length)
    for at, entry in enumerate(theirs):
        some = rows[at * full : (at + 1) * full]
        data, ours = options.pack(options.encode(some), f'shard.{at:05}.mds')
        assert {'samples': len(some), **ours} == entry
        assert data == (tmp_path / entry['zip_data']['basename']).read_bytes()
        assert np.array_equal(options.decode(options.unpack(data), len(some), length), some)
    assert sum(entry['samples'] for entry in theirs) == len(rows)


@pytest.mark.parametrize('compression', ['gz', 'zstd:3', 'bz2', 'br:1', 'snappy'])
def test_a_shard_made_again_is_the_same(compression: str, monkeypatch: pytest.MonkeyPatch):
    """Of any time of day, which gzip writes down."""
    options = shards.ShardOptions(compression, ['sha1'])
    rows = np.arange(4 * L, dtype=np.int32).reshape(4, L)
    first = options.pack(options.encode(rows), 'shard')
    monkeypatch.setattr(time, 'time', lambda: 1e9)
    assert options.pack(options.encode(rows), 'shard') == first
    assert np.array_equal(options.decode(options.unpack(first[0]), 4, L), rows)


def test_what_was_made_before_is_refused_and_kept(common: list[object], tmp_path: Path):
    """A data set of the older format, which training reads as it does the new ones."""
    with MDSWriter(out=str(tmp_path / 'out' / 'train'), columns={'tokens': 'ndarray:int32'}) as writer:
        writer.write({'tokens': np.arange(L, dtype=np.int32)})
    assert 'out holds train and was not begun by this command' in refuse(*common, '--output', tmp_path / 'out')
    assert read_rows(tmp_path / 'out' / 'train') == [list(range(L))]


def test_rows_of_all_parts_are_those_of_the_definition(common: list[object], tokenizer_dir: str, tmp_path: Path):
    succeed(*common, '--output', tmp_path / 'out')
    stats = json.loads((tmp_path / 'out' / 'stats.json').read_text())['splits']['train']
    whole = define_rows(TEXTS, tokenizer_dir, 1)
    assert stats['tokens'] + stats['dropped_tokens'] == len(whole)
    assert stats['documents'] == len(TEXTS)
    ends = sum(row.count(0) for row in read_rows(tmp_path / 'out' / 'train'))
    assert stats['cut_documents'] == len(TEXTS) - ends
    assert prepare(*common, '--output', tmp_path / 'out').exit_code == 0
