"""The end of a run: what is not a shard, and what there is, in numbers and in words."""

import json
from hashlib import sha256

import yaml

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.convert import Job
from composer_tst.cli.prepare_data.output import part_folder
from composer_tst.cli.prepare_data.s3 import is_s3
from composer_tst.cli.prepare_data.shards import INDEX, merge
from composer_tst.cli.prepare_data.workers import in_worker

TOKENIZER = 'tokenizer'


def finish(job: Job, records: list[dict], tokenizer: dict[str, str]) -> dict:
    """Write what is not a shard, the index of each split that has rows last; return what `stats.json` holds.

    `tokenizer` are the files of one that was trained, by name.

    It holds for each split: documents, documents of which some or all tokens were dropped, rows, tokens (in rows),
    dropped tokens, shards, and bytes (of the shards as stored); and the length of rows, the vocabulary and the bad
    documents.

    Raises:
        CommandError: if there is no row.
    """
    bad = [line for record in records for line in record['bad']]
    indexes, splits = {}, {}
    for name, _ in job.settings.splits:
        parts = {part_folder(record['part']): record['splits'][name] for record in records}
        if some := {folder: part['index'] for folder, part in parts.items() if part['index']}:
            indexes[name] = in_worker(merge, some)
        shards = json.loads(indexes[name])['shards'] if some else []
        counts = [part['counts'] for part in parts.values()]
        splits[name] = {
            **{key: sum(count[key] for count in counts) for key in counts[0]},
            'shards': len(shards),
            'bytes': sum((shard['zip_data'] or shard['raw_data'])['bytes'] for shard in shards),
        }
    if not indexes:
        first = f' (of {len(bad):,} bad documents the first: {bad[0]})' if bad else ''
        problem = f'the input is too small: no split fills a row of --seq-len {job.settings.seq_len}{first}'
        raise CommandError(f'{problem}: give more text, or a smaller --seq-len')
    stats = {
        'seq_len': job.settings.seq_len,
        'vocab_size': max(job.tokenizer.backend.get_vocab(with_added_tokens=True).values()) + 1,
        'eos_token_id': job.tokenizer.eos_id,
        'bad_documents': len(bad),
        'splits': splits,
    }
    for name, text in tokenizer.items():
        job.output.publish(text.encode(), TOKENIZER, name)
    if bad:
        job.output.publish(''.join(f'{line}\n' for line in bad).encode(), 'bad_documents.txt')
    job.output.publish(json.dumps(stats, indent=2).encode(), 'stats.json')
    for split, index in indexes.items():
        job.output.publish(index.encode(), split, INDEX)
    return stats


def describe(stats: dict, left_out: str, path: str, tokenizer: str) -> str:
    """The summary in lines for people, what is not in the data set, and the YAML for llm-foundry that trains on it."""
    length, splits = stats['seq_len'], stats['splits']
    lines = []
    for name, split in splits.items():
        lines.append(f'{name}: ' + ', '.join(f'{key.replace("_", " ")} {count:,}' for key, count in split.items()))
        if not split['rows']:
            lines.append(f'warning: split {name} has no rows: give it a larger share with --split')
    if stats['bad_documents']:
        lines.append(f'bad documents, listed in bad_documents.txt: {stats["bad_documents"]:,}')
    if left_out:
        lines.append(f'left out: {left_out}')
    config: dict = {'max_seq_len': length, 'tokenizer': {'name': tokenizer, 'kwargs': {'model_max_length': length}}}
    # A cache of its own: streaming takes what lies in one for what it is to read.
    cache = f'/tmp/mds-cache/{sha256(json.dumps([path, stats]).encode()).hexdigest()[:8]}'
    place = {'remote': path, 'local': cache} if is_s3(path) else {'local': path}
    # The split named train, or the largest; and another one to evaluate on.
    rows = {name: split['rows'] for name, split in splits.items() if split['rows']}
    order = sorted(rows, key=lambda name: (name != 'train', -rows[name]))
    for loader, split, is_train in zip(('train_loader', 'eval_loader'), order, (True, False), strict=False):
        dataset = {**place, 'split': split, 'max_seq_len': length, 'shuffle': is_train}
        config[loader] = {'name': 'text', 'dataset': dataset, 'drop_last': is_train, 'num_workers': 8}
    return '\n'.join([*lines, 'to train on it:', yaml.safe_dump(config, sort_keys=False)])
