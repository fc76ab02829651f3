"""The end of a run: every file read back, and what there is."""

import json
from hashlib import sha256
from typing import Any

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.convert import Job
from composer_tst.cli.prepare_data.output import part_folder
from composer_tst.cli.prepare_data.s3 import is_s3
from composer_tst.cli.prepare_data.workers import parallel
from composer_tst.cli.progress_bar import progress


def verify(job: Job, records: list[dict]) -> None:
    """Read every file back and compare it with its record.

    Raises:
        CommandError: at the first file that is missing, damaged, or holds something else.
    """
    items = [
        ((split, part_folder(record['part']), name), *file)
        for record in records
        for split, made in record['splits'].items()
        for name, file in made['files'].items()
    ]
    with progress(sum(size for _, size, _ in items), 'bytes', 'verify', delay=5, unit_scale=True) as bar:
        for size in parallel(_verify_file, job, items):
            bar.update(size)


def _verify_file(job: Job, item: tuple[tuple[str, ...], int, str], report: Any) -> int:
    """Check one file; return its size."""
    parts, size, digest = item
    data = job.output.read(*parts)
    if data is None:
        problem = 'is not there'
    elif sha256(data).hexdigest() != digest:
        problem = 'does not hold what was written (by its sha256)'
    else:
        return size
    raise CommandError(f'verify: {job.output.at(*parts)} {problem}: move it away, and the same command makes it anew')


def summarize(job: Job, records: list[dict], indexes: dict[str, str]) -> dict:
    """Sum up a data set: what `stats.json` holds.

    Args:
        indexes: the index of each split that has rows.

    Returns:
        For each split: documents, rows, tokens (in rows), dropped tokens, documents of which some or all tokens were
        dropped, shards, and bytes (of the shards as stored); and the length of rows, the vocabulary and the bad
        documents.
    """
    splits = {}
    for name, _ in job.settings.splits:
        count = {
            key: sum(record['counts'][name][key] for record in records)
            for key in ('documents', 'rows', 'ends', 'dropped_tokens')
        }
        shards = json.loads(indexes[name])['shards'] if name in indexes else []
        splits[name] = {
            'documents': count['documents'],
            'cut_documents': count['documents'] - count['ends'],
            'rows': count['rows'],
            'tokens': count['rows'] * job.settings.seq_len,
            'dropped_tokens': count['dropped_tokens'],
            'shards': len(shards),
            'bytes': sum((shard['zip_data'] or shard['raw_data'])['bytes'] for shard in shards),
        }
    return {
        'seq_len': job.settings.seq_len,
        'vocab_size': job.tokenizer.vocab_size,
        'eos_token_id': job.tokenizer.eos_id,
        'bad_documents': sum(len(record['bad']) for record in records),
        'splits': splits,
    }


def describe(stats: dict, left_out: str) -> str:
    """The summary in lines for people: a line for each split, what is wrong with it, and what is not in it."""
    lines = []
    for name, split in stats['splits'].items():
        lines.append(f'{name}: ' + ', '.join(f'{key.replace("_", " ")} {count:,}' for key, count in split.items()))
        if not split['rows']:
            lines.append(f'warning: split {name} has no rows: give it a larger share with --split')
    if stats['bad_documents']:
        lines.append(f'bad documents, listed in bad_documents.txt: {stats["bad_documents"]:,}')
    if left_out:
        lines.append(f'left out: {left_out}')
    return '\n'.join(lines)


def describe_loaders(stats: dict, path: str, tokenizer: str) -> str:
    """The lines of a YAML for llm-foundry that train on a data set."""
    length = stats['seq_len']
    name = json.dumps(tokenizer)
    lines = [f'max_seq_len: {length}', f'tokenizer: {{name: {name}, kwargs: {{model_max_length: {length}}}}}']
    where = f'remote: {json.dumps(path)}, local: /tmp/mds-cache' if is_s3(path) else f'local: {json.dumps(path)}'
    rows = {name: split['rows'] for name, split in stats['splits'].items() if split['rows']}
    # The split named train, or the largest; and another one to evaluate on.
    order = sorted(rows, key=lambda name: (name != 'train', -rows[name]))
    for loader, split, is_train in zip(('train_loader', 'eval_loader'), order, ('true', 'false'), strict=False):
        dataset = f'{{{where}, split: {split}, max_seq_len: {length}, shuffle: {is_train}}}'
        lines += [f'{loader}:', '  name: text', f'  dataset: {dataset}', f'  drop_last: {is_train}', '  num_workers: 8']
    return '\n'.join(['to train on it:', *lines])
