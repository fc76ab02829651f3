"""The summary of a data set, and reading every shard of it back."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.convert import Job
from composer_tst.cli.prepare_data.inputs import plural
from composer_tst.cli.prepare_data.output import part_folder
from composer_tst.cli.prepare_data.parts import PartCount, Settings
from composer_tst.cli.prepare_data.shards import INDEX, digest_of, entries_of, read_rows, stored
from composer_tst.cli.prepare_data.storage import read
from composer_tst.cli.prepare_data.tokenizer import TextTokenizer
from composer_tst.cli.prepare_data.workers import parallel
from composer_tst.cli.progress_bar import progress


def summarize(shards: dict[str, list], count: PartCount, settings: Settings, tokenizer: TextTokenizer) -> dict:
    """Sum up a data set: what `stats.json` holds.

    Returns:
        For each split: documents, characters, rows, tokens (in rows), dropped tokens, documents of which some or
        all tokens were dropped, unknown tokens, tokens per document, shards, and bytes (of the shards as stored);
        and the length of rows, the vocabulary and the bad documents.
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
            'tokens_per_document': (
                round((tokens + counted.dropped_tokens) / counted.documents, 2) if counted.documents else 0.0
            ),
            'shards': len(shards[name]),
            'bytes': sum(stored(entry)['bytes'] for entry in shards[name]),
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
        documents, rows, shards, cut = (split[key] for key in ('documents', 'rows', 'shards', 'cut_documents'))
        lines.append(
            f'{name}: {documents:,} {plural(documents, "document")}, {split["tokens"]:,} tokens in {rows:,} '
            f'{plural(rows, "row")} of {stats["seq_len"]:,}, {split["tokens_per_document"]:,.1f} tokens per document, '
            f'{split["bytes"]:,} bytes in {shards:,} {plural(shards, "shard")}'
        )
        if dropped := split['dropped_tokens']:
            lines.append(
                f'{name}: cut or left out are {cut:,} {plural(cut, "document")}, by {dropped:,} '
                f'{plural(dropped, "token")} that fill no row at the ends of parts'
            )
    if bad := stats['bad_documents']:
        lines.append(f'{bad:,} bad {plural(bad, "document")} skipped')
    return '\n'.join(lines)


def describe_loaders(stats: dict, path: str, tokenizer: str) -> str:
    """The lines of a YAML for llm-foundry that train on a data set."""
    lines = [
        'to train on it:',
        f'max_seq_len: {stats["seq_len"]}',
        f'tokenizer: {{name: {json.dumps(tokenizer)}, kwargs: {{model_max_length: {stats["seq_len"]}}}}}',
    ]
    remote, local = ('remote: ' + json.dumps(path), '/tmp/mds-cache') if path.startswith('s3://') else ('', path)
    where = ', '.join(filter(None, [remote, f'local: {json.dumps(local)}']))
    splits = [name for name, split in stats['splits'].items() if split['rows']]
    train = 'train' if 'train' in splits else max(splits, key=lambda name: stats['splits'][name]['rows'])
    for loader, split in (('train_loader', train), ('eval_loader', next((s for s in splits if s != train), None))):
        if split:
            lines += [
                f'{loader}:',
                '  name: text',
                f'  dataset: {{{where}, split: {split}, max_seq_len: {stats["seq_len"]}, '
                f'shuffle: {str(loader == "train_loader").lower()}}}',
                f'  drop_last: {str(loader == "train_loader").lower()}',
                '  num_workers: 8',
            ]
    return '\n'.join(lines)


def verify(job: Job, records: list[dict], count: PartCount) -> None:
    """Read every file back and compare it with its record, and the rows with what was counted.

    Raises:
        CommandError: at the first file that is missing, damaged, or holds what it should not.
    """
    items = [(record['part'], split, files) for record in records for split, files in record['files'].items()]
    rows = dict.fromkeys(count.splits, 0)
    ends = dict.fromkeys(count.splits, 0)
    size = sum(size for _, _, files in items for size, _ in files.values())
    with progress(size, 'bytes', 'verify', delay=5, unit_scale=True) as bar:
        for split, read_rows, read_ends in parallel(_verify_folder, job, items, bar.update):
            rows[split] += read_rows
            ends[split] += read_ends
    for split, counted in count.splits.items():
        for what, found, wrote in (
            ('rows', rows[split], counted.rows),
            ('end-of-text tokens', ends[split], counted.ends),
        ):
            if found != wrote:
                raise CommandError(f'verify: split {split} holds {found:,} {what}, but {wrote:,} were written')


def _verify_folder(job: Job, item: tuple[int, str, dict], report: Callable[[Any], None]) -> tuple[str, int, int]:
    """Check the files of a part and split; return the split, its rows and end-of-text tokens."""
    number, split, files = item
    rows = ends = 0
    entries = {}

    def check(path: str, holds: bool, problem: str) -> None:
        if not holds:
            raise CommandError(f'verify: {path} {problem}: move it away, and the same command makes it anew')

    for name in sorted(files, key=lambda name: name != INDEX):
        size, digest = files[name]
        path = job.output.at(split, part_folder(number), name)
        data = read(path)
        check(path, data is not None, 'is not there')
        assert data is not None
        check(path, len(data) == size, f'has {len(data):,} bytes instead of {size:,}')
        check(path, digest_of(data) == digest, 'does not hold what was written (by its sha256)')
        if name == INDEX:
            entries = {stored(entry)['basename']: entry for entry in entries_of(data.decode())}
        else:
            try:
                found = read_rows(data, entries[name])
            except (KeyError, ValueError) as error:
                raise CommandError(f'verify: {path} is no shard that its index knows: {error}') from error
            check(path, found.shape[1:] == (job.settings.seq_len,), f'has no rows of {job.settings.seq_len:,}')
            check(path, not ((found < 0) | (found >= job.tokenizer.vocab_size)).any(), 'holds an id of no token')
            rows += len(found)
            ends += int(np.count_nonzero(found == job.tokenizer.eos_id))
        report(size)
    return split, rows, ends
