"""The steps from raw text to a published data set, in order."""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence

from .documents import list_sources
from .errors import PrepareError, explained
from .local import Job, ShardOptions, check_shard_options, convert
from .output import STATE, Output, open_output
from .parts import Part, Settings, plan_parts
from .sample import sample_texts
from .storage import is_s3
from .tokenizer import TextTokenizer, check_vocabulary, load_tokenizer, save_tokenizer, train_tokenizer
from .verify import describe, summarize, verify
from .workers import in_worker, preload

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
) -> None:
    """Do what the command says.

    Args:
        tokenizer_name: a local folder or a hub name; or else
        vocab_size: the size of a vocabulary to train.
        engine: `local` or `spark`.
        check: read every shard back before the data set becomes visible.

    Raises:
        PrepareError: for anything that the user can act on.
    """
    if settings.seq_len < 1:
        raise PrepareError(f'--seq-len {settings.seq_len}: a row needs at least one token')
    if not out:
        raise PrepareError('--output is missing: name a folder or an s3:// prefix')
    if (tokenizer_name is None) == (vocab_size is None):
        raise PrepareError('give one of --tokenizer and --train-tokenizer')
    if vocab_size is not None:
        check_vocabulary(vocab_size)
    preload()
    sources = list_sources(inputs)
    in_worker(check_shard_options, shard_options)
    loaded = None if tokenizer_name is None else in_worker(load_tokenizer, tokenizer_name)
    arguments = {
        'INPUT': sorted({text if is_s3(text) else os.path.abspath(text) for text in inputs}),
        '--seq-len': settings.seq_len,
        '--tokenizer': loaded and hashlib.sha256(loaded.definition.encode()).hexdigest(),
        '--train-tokenizer': vocab_size,
        '--split': [list(split) for split in settings.splits],
        '--text-key': settings.text_key,
        '--skip-bad': settings.skip_bad,
        '--compression': shard_options.compression,
        '--hashes': shard_options.hashes,
        '--engine': engine,
    }
    output = open_output(out, arguments, sources)
    parts = plan_parts(sources)
    tokenizer = loaded or _trained(output, parts, settings, vocab_size or 0)
    job = Job(tokenizer, settings, shard_options, output)
    if engine == 'spark':
        try:
            from .spark import convert_with_spark
        except ImportError as error:
            raise PrepareError('--engine spark needs pyspark: pip install "composer-tst[spark]"') from error
        shards, count = convert_with_spark(parts, job)
    else:
        shards, count = convert(parts, job)
    if not any(shards.values()):
        raise PrepareError(f'the input is too small: no split fills a row of --seq-len {settings.seq_len}')
    stats = summarize(shards, count, settings, tokenizer)
    if check:
        verify(output, shards, count, stats)
    if count.bad:
        output.write(''.join(f'{line}\n' for line in count.bad).encode(), 'bad_documents.txt')
    output.write(json.dumps(stats, indent=2).encode(), 'stats.json')
    for name, entries in shards.items():
        if entries:
            index = {'version': 2, 'shards': entries}
            output.write(json.dumps(index, sort_keys=True).encode(), name, 'index.json')
    output.publish()
    print(describe(stats))
    for line in count.bad[:BAD_SHOWN]:
        print(f'skipped {line}', file=sys.stderr)
    if len(count.bad) > BAD_SHOWN:
        print(f'and {len(count.bad) - BAD_SHOWN:,} more, see bad_documents.txt', file=sys.stderr)
    for name, entries in shards.items():
        if not entries:
            print(f'warning: split {name} has no rows: give it a larger share with --split', file=sys.stderr)


def _trained(output: Output, parts: Sequence[Part], settings: Settings, vocab_size: int) -> TextTokenizer:
    """Train the tokenizer and save it beside the shards, or take the one that an interrupted run trained."""
    if output.exists(STATE, 'tokenizer.json'):
        return TextTokenizer(**json.loads(output.read(STATE, 'tokenizer.json')))
    print(f'training a tokenizer of {vocab_size:,} tokens on a sample', file=sys.stderr)
    tokenizer = train_tokenizer(sample_texts(parts, settings), vocab_size)
    with explained('write', output.path), tempfile.TemporaryDirectory() as folder:
        in_worker(save_tokenizer, tokenizer, folder)
        for name in sorted(os.listdir(folder)):
            with open(os.path.join(folder, name), 'rb') as file:
                output.write(file.read(), 'tokenizer', name)
    state = {'definition': tokenizer.definition, 'eos_id': tokenizer.eos_id}
    output.write(json.dumps(state).encode(), STATE, 'tokenizer.json')
    return tokenizer
