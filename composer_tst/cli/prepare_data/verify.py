"""Reading every file of a data set back, and its summary."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.convert import COUNTED, Job
from composer_tst.cli.prepare_data.inputs import plural
from composer_tst.cli.prepare_data.output import part_folder
from composer_tst.cli.prepare_data.shards import digest_of
from composer_tst.cli.prepare_data.storage import is_s3, read
from composer_tst.cli.prepare_data.workers import parallel
from composer_tst.cli.progress_bar import progress


def verify(job: Job, records: list[dict]) -> None:
    """Read every file back and compare it with its record.

    Raises:
        CommandError: at the first file that is missing, damaged, or holds something else.
    """
    items = [
        (job.output.at(split, part_folder(record['part']), name), *file)
        for record in records
        for split, made in record['splits'].items()
        for name, file in made['files'].items()
    ]
    with progress(sum(size for _, size, _ in items), 'bytes', 'verify', delay=5, unit_scale=True) as bar:
        for size in parallel(_verify_file, job, items):
            bar.update(size)


def _verify_file(job: Job, item: tuple[str, int, str], report: Callable[[Any], None]) -> int:
    """Check one file; return its size."""
    path, size, digest = item
    data = read(path)
    if data is None:
        problem = 'is not there'
    elif len(data) != size:
        problem = f'has {len(data):,} bytes instead of {size:,}'
    elif digest_of(data) != digest:
        problem = 'does not hold what was written (by its sha256)'
    else:
        return size
    raise CommandError(f'verify: {path} {problem}: move it away, and the same command makes it anew')


def summarize(job: Job, records: list[dict], shards: dict[str, list]) -> dict:
    """Sum up a data set: what `stats.json` holds.

    Args:
        shards: what the index of each split says of its shards.

    Returns:
        For each split: documents, characters, rows, tokens (in rows), dropped tokens, documents of which some or
        all tokens were dropped, unknown tokens, tokens per document, shards, and bytes (of the shards as stored);
        and the length of rows, the vocabulary and the bad documents.
    """
    splits = {}
    for name, entries in shards.items():
        count = Counter(dict.fromkeys(COUNTED, 0))
        for record in records:
            count.update(record['counts'][name])
        documents, tokens = count['documents'], count['rows'] * job.settings.seq_len
        splits[name] = {
            **{key: count[key] for key in COUNTED if key != 'ends'},
            'tokens': tokens,
            'cut_documents': documents - count['ends'],
            'tokens_per_document': round((tokens + count['dropped_tokens']) / documents, 2) if documents else 0.0,
            'shards': len(entries),
            'bytes': sum((entry['zip_data'] or entry['raw_data'])['bytes'] for entry in entries),
        }
    return {
        'seq_len': job.settings.seq_len,
        'vocab_size': job.tokenizer.vocab_size,
        'eos_token_id': job.tokenizer.eos_id,
        'bad_documents': sum(len(record['bad']) for record in records),
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
    length = stats['seq_len']
    name = json.dumps(tokenizer)
    lines = [f'max_seq_len: {length}', f'tokenizer: {{name: {name}, kwargs: {{model_max_length: {length}}}}}']
    where = f'remote: {json.dumps(path)}, local: /tmp/mds-cache' if is_s3(path) else f'local: {json.dumps(path)}'
    splits = {name: split['rows'] for name, split in stats['splits'].items() if split['rows']}
    # The split named train, or the largest; and another one to evaluate on.
    order = sorted(splits, key=lambda name: (name != 'train', -splits[name]))
    for loader, split, is_train in zip(('train_loader', 'eval_loader'), order, ('true', 'false'), strict=False):
        dataset = f'{{{where}, split: {split}, max_seq_len: {length}, shuffle: {is_train}}}'
        lines += [f'{loader}:', '  name: text', f'  dataset: {dataset}', f'  drop_last: {is_train}', '  num_workers: 8']
    return '\n'.join(['to train on it:', *lines])
