"""The steps from raw text to a data set, in order."""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.convert import Engine, Job, convert, convert_locally
from composer_tst.cli.prepare_data.documents import look
from composer_tst.cli.prepare_data.inputs import Address, list_sources, parse_address
from composer_tst.cli.prepare_data.output import BEGUN, TOKENIZER, Output, check_output, locked, part_folder, versions
from composer_tst.cli.prepare_data.parts import Part, Settings, plan_parts, size_of
from composer_tst.cli.prepare_data.shards import INDEX, LONGEST_ROW, ShardOptions, check_options, entries_of, merge
from composer_tst.cli.prepare_data.storage import explained, is_s3, s3
from composer_tst.cli.prepare_data.tokenizer import (
    TextTokenizer,
    check_vocabulary,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from composer_tst.cli.prepare_data.training import sample_texts
from composer_tst.cli.prepare_data.verify import describe, describe_loaders, summarize, verify
from composer_tst.cli.prepare_data.workers import in_worker, preload

# Changes whenever the same arguments would make other rows than before.
FORMAT = 3
# Of text, for an estimate.
BYTES_A_TOKEN = 4
# Bad documents named on the screen; all of them are in `bad_documents.txt`.
BAD_SHOWN = 10


def prepare(
    inputs: list[str],
    out: str,
    settings: Settings,
    shard_options: ShardOptions,
    tokenizer_name: str | None = None,
    vocab_size: int | None = None,
    engine: str = 'local',
    check: bool = False,
    form: str | None = None,
) -> None:
    """Do what the command says.

    Args:
        tokenizer_name: a local folder or a hub name; or else
        vocab_size: the size of a vocabulary to train.
        engine: `local` or `spark`.
        check: read every shard back before the data set becomes visible, or now if it is finished.
        form: what files are read as that have no format in their names.

    Raises:
        CommandError: for anything that the user can act on.
    """
    if not 1 <= settings.seq_len <= LONGEST_ROW:
        raise CommandError(f'--seq-len {settings.seq_len}: a row needs at least one token and at most {LONGEST_ROW:,}')
    if not out:
        raise CommandError('--output is missing: name a folder or an s3:// address')
    if (tokenizer_name is None) == (vocab_size is None):
        raise CommandError('give one of --tokenizer and --train-tokenizer')
    if vocab_size is not None:
        check_vocabulary(vocab_size)
    address = parse_address(out)
    _check_place(address)
    run = _engine(engine)
    preload()
    sources, left_out = list_sources(inputs, address, _own_files(settings, shard_options.compression), form)
    look(sources, settings.text_key, settings.skip_bad)
    if shard_options.compression or shard_options.hashes:
        in_worker(check_options, shard_options)
    loaded = None if tokenizer_name is None else in_worker(load_tokenizer, tokenizer_name)
    parts = plan_parts(sources)
    fingerprint = {
        'version of this program': FORMAT,
        **versions(),
        '--seq-len': settings.seq_len,
        '--tokenizer': loaded and _digest([loaded.definition, loaded.eos_id]),
        '--train-tokenizer': vocab_size,
        '--split': settings.splits,
        '--text-key': settings.text_key,
        '--format': sorted({source.format for source in sources}),
        '--compression': shard_options.compression,
        '--hashes': shard_options.hashes,
        'listing of INPUT (names, sizes and times)': _digest([(s.path, s.size, s.stamp, s.format) for s in sources]),
        'plan of parts': _digest([[(p.source.path, p.start, p.end) for p in part] for part in parts]),
    }
    # Before anything is written there, be it a lock; and again under the lock.
    check_output(Output(address.path, ''), fingerprint)
    _warn_of_small_splits(parts, settings)
    with locked(address.path) as scratch:
        output = Output(address.path, scratch)
        if not check_output(output, fingerprint):
            output.record(BEGUN, fingerprint)
        tokenizer = loaded or _trained(output, parts, settings, vocab_size or 0, _digest(fingerprint))
        job = Job(tokenizer, settings, shard_options, output)
        records = convert(parts, job, run)
        indexes = {
            name: {part_folder(r['part']): r['splits'][name]['index'] for r in records if name in r['splits']}
            for name, _ in settings.splits
        }
        if not any(indexes.values()):
            raise _nothing(records, settings)
        if check:
            verify(job, records)
        merged = {name: in_worker(merge, some) for name, some in indexes.items() if some}
        shards = {name: entries_of(merged[name]) if name in merged else [] for name in indexes}
        stats = summarize(job, records, shards)
        # What is not a shard, the indexes last.
        bad = [line for record in records for line in record['bad']]
        if bad:
            output.publish(''.join(f'{line}\n' for line in bad).encode(), 'bad_documents.txt')
        output.publish(json.dumps(stats, indent=2).encode(), 'stats.json')
        for name, index in merged.items():
            output.publish(index.encode(), name, INDEX)
    with explained('write', 'to the screen what was done, which is whole'):
        _report(stats, bad, left_out)
        copied = f'copy {output.at(TOKENIZER)} here' if is_s3(output.path) else output.at(TOKENIZER)
        print(describe_loaders(stats, output.path, tokenizer_name or copied))
        sys.stdout.flush()


def _warn_of_small_splits(parts: Sequence[Part], settings: Settings) -> None:
    """Say, before the hours that it takes, which splits will lose most of their text."""
    sources = [piece.source for part in parts for piece in part]
    if len(parts) < 2 or any(source.compression for source in sources):
        return  # of compressed bytes it cannot be told
    tokens = sum(map(size_of, parts)) / len(parts) / BYTES_A_TOKEN
    for name, share in settings.splits:
        if tokens * share < settings.seq_len:
            print(
                f'warning: split {name} has some {tokens * share:,.0f} tokens in each part of the input, less than a '
                f'row of --seq-len {settings.seq_len}, and what fills no row of a part is dropped: give it a share of '
                f'{min(1.0, 4 * settings.seq_len / tokens):.1g} or more with --split',
                file=sys.stderr,
            )


def _own_files(settings: Settings, compression: str | None) -> list[str]:
    """Files that the output will have, one of each kind."""
    shard = f'{part_folder(0)}/shard.00000.mds'
    shards = [shard, f'{shard}.{compression.split(":")[0]}'] if compression else [shard]
    return [
        *('stats.json', 'bad_documents.txt', f'{TOKENIZER}/tokenizer.json'),
        *(f'{split}/{name}' for split, _ in settings.splits for name in (INDEX, f'{part_folder(0)}/{INDEX}', *shards)),
    ]


def _check_place(address: Address) -> None:
    if is_s3(address.path):
        s3().check_bucket(address.path)
    elif os.path.lexists(address.path) and not os.path.isdir(address.path):
        raise CommandError(f'output {address.path} exists and is no folder: name another')


def _engine(name: str) -> Engine:
    if name == 'local':
        return convert_locally
    try:
        from composer_tst.cli.prepare_data.spark import convert_with_spark
    except ImportError as error:
        raise CommandError('--engine spark needs pyspark: pip install "composer-tst[spark]"') from error
    return convert_with_spark


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _trained(output: Output, parts: Sequence[Part], settings: Settings, vocab_size: int, begun: str) -> TextTokenizer:
    """Train the tokenizer and save it beside the shards, or take the one that an interrupted run trained."""
    state = output.recorded('tokenizer.json')
    if not isinstance(state, dict) or state.get('begun') != begun:
        print(f'training a tokenizer of {vocab_size:,} tokens on a sample', file=sys.stderr)
        tokenizer = train_tokenizer(sample_texts(parts, settings), vocab_size)
        with explained('write', 'the temporary folder'), tempfile.TemporaryDirectory() as folder:
            in_worker(save_tokenizer, tokenizer, folder)
            files = {}
            for name in sorted(os.listdir(folder)):
                with open(os.path.join(folder, name), encoding='utf-8') as file:
                    files[name] = file.read()
        # What a run trained that only began the output is replaced.
        ours = state.get('files', {}) if isinstance(state, dict) else {}
        state = {'begun': begun, 'tokenizer': asdict(tokenizer), 'files': files, 'ours': ours}
        output.record('tokenizer.json', state)
    for name, text in state['files'].items():
        ours = state['ours'].get(name)
        output.publish(text.encode(), TOKENIZER, name, ours=ours and ours.encode())
    return TextTokenizer(**state['tokenizer'])


def _nothing(records: list[dict], settings: Settings) -> CommandError:
    documents = sum(count['documents'] for record in records for count in record['counts'].values())
    bad = [line for record in records for line in record['bad']]
    if bad and not documents:
        return CommandError(f'none of {len(bad):,} documents is good; the first: {bad[0]}')
    also = f' and {len(bad):,} bad ones, the first: {bad[0]}' if bad else ''
    return CommandError(
        f'the input is too small: no split fills a row of --seq-len {settings.seq_len} ({documents:,} documents{also})'
    )


def _report(stats: dict, bad: list[str], left_out: str) -> None:
    print(describe(stats))
    if left_out:
        print(f'left out: {left_out}')
    for line in bad[:BAD_SHOWN]:
        print(f'skipped {line}', file=sys.stderr)
    if len(bad) > BAD_SHOWN:
        print(f'and {len(bad) - BAD_SHOWN:,} more, see bad_documents.txt', file=sys.stderr)
    for name, split in stats['splits'].items():
        tokens = split['tokens'] + split['dropped_tokens']
        if not split['rows']:
            print(f'warning: split {name} has no rows: give it a larger share with --split', file=sys.stderr)
        if split['unknown_tokens']:
            share = split['unknown_tokens'] / tokens
            print(f'warning: {share:.2%} of the tokens of split {name} are the unknown token', file=sys.stderr)
