"""Reading every shard back as training does, and the summary that `tools/plan.py` reads."""

import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .errors import PrepareError, explained
from .output import Output
from .parts import PartCount, Settings
from .storage import filesystem
from .tokenizer import TextTokenizer
from .workers import parallel


def summarize(shards: Mapping[str, list], count: PartCount, settings: Settings, tokenizer: TextTokenizer) -> dict:
    """Sum up a data set: what `stats.json` holds.

    Returns:
        For each split: documents, rows, tokens (in rows), dropped tokens, tokens per document, shards, and
        bytes (of the shards as stored); and the length of rows, the vocabulary and the bad documents.
    """
    splits = {}
    for name, counted in count.splits.items():
        tokens = counted.rows * settings.seq_len
        splits[name] = {
            'documents': counted.documents,
            'rows': counted.rows,
            'tokens': tokens,
            'dropped_tokens': counted.dropped_tokens,
            'tokens_per_document': (
                round((tokens + counted.dropped_tokens) / counted.documents, 2) if counted.documents else 0.0
            ),
            'shards': len(shards[name]),
            'bytes': sum((entry['zip_data'] or entry['raw_data'])['bytes'] for entry in shards[name]),
        }
    return {
        'seq_len': settings.seq_len,
        'vocab_size': tokenizer.vocab_size,
        'eos_token_id': tokenizer.eos_id,
        'bad_documents': len(count.bad),
        'splits': splits,
    }


def describe(stats: dict) -> str:
    """The summary in lines for people."""
    lines = [
        f'{name}: {split["documents"]:,} documents, {split["tokens"]:,} tokens in {split["rows"]:,} rows of '
        f'{stats["seq_len"]:,}, {split["tokens_per_document"]:,.1f} tokens per document, '
        f'{split["bytes"]:,} bytes in {split["shards"]:,} shards'
        for name, split in stats['splits'].items()
    ]
    if stats['bad_documents']:
        lines.append(f'{stats["bad_documents"]:,} bad documents skipped')
    return '\n'.join(lines)


def verify(output: Output, shards: Mapping[str, list], count: PartCount, stats: dict) -> None:
    """Read every shard back and compare it with its index entry and with what was counted.

    Args:
        stats: from `summarize`; has the length of rows, the vocabulary, and the end-of-text id.

    Raises:
        PrepareError: at the first shard that is missing, damaged, or holds what it should not.
    """
    items = [(split, entry) for split, entries in shards.items() for entry in entries]
    rows = dict.fromkeys(shards, 0)
    ends = dict.fromkeys(shards, 0)
    for split, read_rows, read_ends in parallel(_verify_shard, (output, stats), items):
        rows[split] += read_rows
        ends[split] += read_ends
    for split, counted in count.splits.items():
        for what, read, wrote in (
            ('rows', rows[split], counted.rows),
            ('end-of-text tokens', ends[split], counted.ends),
        ):
            if read != wrote:
                raise PrepareError(f'verify: split {split} holds {read:,} {what}, but {wrote:,} were written')


def _verify_shard(
    job: tuple[Output, dict], item: tuple[str, dict], report: Callable[[Any], None]
) -> tuple[str, int, int]:
    """Check one shard; return its split, rows and end-of-text tokens."""
    from streaming.base.compression import decompress
    from streaming.base.format.mds.reader import MDSReader
    from streaming.base.hashing import get_hash

    output, stats = job
    split, entry = item
    stored = entry['zip_data'] or entry['raw_data']
    path = output.at(split, stored['basename'])

    def check(holds: bool, problem: str) -> None:
        if not holds:
            raise PrepareError(f'verify: {path} {problem}')

    def check_file(data: bytes, info: dict) -> None:
        check(len(data) == info['bytes'], f'has {len(data):,} bytes instead of {info["bytes"]:,}')
        for algorithm, value in info['hashes'].items():
            check(get_hash(algorithm, data) == value, f'does not have the {algorithm} hash of the index')

    with explained('verify', path):
        data = filesystem(path).cat_file(path)
    check_file(data, stored)
    if entry['zip_data']:
        data = decompress(entry['compression'], data)
        check_file(data, entry['raw_data'])
    ends = 0
    with explained('verify', path), tempfile.TemporaryDirectory() as folder:
        # Spark's shards lie in folders of their own.
        name = os.path.basename(entry['raw_data']['basename'])
        with open(os.path.join(folder, name), 'wb') as file:
            file.write(data)
        del data
        reader = MDSReader.from_json(folder, None, {**entry, 'raw_data': {**entry['raw_data'], 'basename': name}})
        for index in range(reader.size):
            try:
                row = reader.get_item(index)['tokens']
            except Exception as error:
                # Damaged bytes make numpy fail in many ways.
                raise PrepareError(f'verify: {path}, row {index} cannot be read') from error
            check(row.dtype == np.int32, f'row {index} is {row.dtype} instead of int32')
            check(row.shape == (stats['seq_len'],), f'row {index} has shape {row.shape}')
            outside = (row < 0) | (row >= stats['vocab_size'])
            check(not outside.any(), f'row {index} holds an id outside the vocabulary')
            ends += int(np.count_nonzero(row == stats['eos_token_id']))
    return split, entry['samples'], ends
