"""Reading every shard back, and the summary that `composer-tst plan` reads."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.convert import Job
from composer_tst.cli.prepare_data.parts import PartCount, Settings
from composer_tst.cli.prepare_data.shards import digest_of
from composer_tst.cli.prepare_data.tokenizer import TextTokenizer
from composer_tst.cli.prepare_data.workers import parallel
from composer_tst.cli.progress_bar import progress


def summarize(shards: Mapping[str, list], count: PartCount, settings: Settings, tokenizer: TextTokenizer) -> dict:
    """Sum up a data set: what `stats.json` holds.

    Returns:
        For each split: documents, characters, rows, tokens (in rows), dropped tokens, documents of which some or
        all tokens were dropped, unknown tokens, characters without a token, tokens per document, shards, and bytes
        (of the shards as stored); and the length of rows, the vocabulary and the bad documents.
    """
    splits = {}
    for name, counted in count.splits.items():
        tokens = counted.rows * settings.seq_len
        splits[name] = {
            'documents': counted.documents,
            'characters': counted.characters,
            'rows': counted.rows,
            'tokens': tokens,
            'dropped_tokens': counted.dropped_tokens,
            'cut_documents': counted.documents - counted.ends,
            'unknown_tokens': counted.unknown_tokens,
            'lost_characters': counted.lost_characters,
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
    lines = []
    for name, split in stats['splits'].items():
        lines.append(
            f'{name}: {split["documents"]:,} documents, {split["tokens"]:,} tokens in {split["rows"]:,} rows of '
            f'{stats["seq_len"]:,}, {split["tokens_per_document"]:,.1f} tokens per document, '
            f'{split["bytes"]:,} bytes in {split["shards"]:,} shards'
        )
        if split['dropped_tokens']:
            lines.append(
                f'{name}: at the ends of parts {split["dropped_tokens"]:,} tokens fill no row, and cut '
                f'{split["cut_documents"]:,} documents'
            )
    if stats['bad_documents']:
        lines.append(f'{stats["bad_documents"]:,} bad documents skipped')
    return '\n'.join(lines)


def verify(job: Job, records: list[dict], count: PartCount) -> None:
    """Read every shard back and compare it with its record and with what was counted.

    Raises:
        CommandError: at the first shard that is missing, damaged, or holds what it should not.
    """
    items = [(split, file) for record in records for split, files in record['files'].items() for file in files]
    rows = dict.fromkeys(count.splits, 0)
    ends = dict.fromkeys(count.splits, 0)
    bar = progress(len(items), 'shards', 'verify', delay=5)
    for split, read_rows, read_ends in parallel(_verify_shard, job, items):
        bar.update(1)
        rows[split] += read_rows
        ends[split] += read_ends
    for split, counted in count.splits.items():
        for what, read, wrote in (
            ('rows', rows[split], counted.rows),
            ('end-of-text tokens', ends[split], counted.ends),
        ):
            if read != wrote:
                raise CommandError(f'verify: split {split} holds {read:,} {what}, but {wrote:,} were written')


def _verify_shard(job: Job, item: tuple[str, dict], report: Callable[[Any], None]) -> tuple[str, int, int]:
    """Check one shard; return its split, rows and end-of-text tokens."""
    split, file = item
    path = job.output.at(split, file['name'])

    def check(holds: bool, problem: str) -> None:
        if not holds:
            raise CommandError(f'verify: {path} {problem}: move it away, and the same command makes it anew')

    data = job.output.store.read(path)
    check(data is not None, 'is not there')
    assert data is not None
    check(len(data) == file['bytes'], f'has {len(data):,} bytes instead of {file["bytes"]:,}')
    check(digest_of(data) == file['sha256'], 'does not hold what was written (by its sha256)')
    try:
        rows = job.shards.decode(job.shards.unpack(data), file['rows'], job.settings.seq_len)
    except ValueError:
        raise CommandError(f'verify: {path} is no shard of {file["rows"]:,} rows of {job.settings.seq_len:,}') from None
    outside = (rows < 0) | (rows >= job.tokenizer.vocab_size)
    check(not outside.any(), 'holds an id outside the vocabulary')
    return split, len(rows), int(np.count_nonzero(rows == job.tokenizer.eos_id))
