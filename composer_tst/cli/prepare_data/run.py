"""The steps from raw text to a data set, in order."""

import hashlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.convert import Job, convert, convert_part
from composer_tst.cli.prepare_data.documents import look
from composer_tst.cli.prepare_data.errors import explained
from composer_tst.cli.prepare_data.inputs import list_sources, parse_address
from composer_tst.cli.prepare_data.output import BEGUN, Output, begun_with, locked, part_folder
from composer_tst.cli.prepare_data.parts import Part, Settings, plan_parts, sample_texts
from composer_tst.cli.prepare_data.report import describe, describe_loaders, summarize, verify
from composer_tst.cli.prepare_data.s3 import is_s3
from composer_tst.cli.prepare_data.shards import INDEX, LONGEST_ROW, check_options, merge
from composer_tst.cli.prepare_data.tokenizer import (
    VOCABULARY,
    TextTokenizer,
    files_of,
    load_tokenizer,
    train_tokenizer,
)
from composer_tst.cli.prepare_data.workers import in_worker, parallel

# Changes whenever the same arguments would make other rows or records than before.
FORMAT = 4
# Whose versions decide the rows and the shards.
LIBRARIES = ('mosaicml-streaming', 'tokenizers', 'pyarrow')
TOKENIZER = 'tokenizer'


def prepare(
    inputs: list[str],
    out: str,
    settings: Settings,
    tokenizer_name: str | None = None,
    vocab_size: int | None = None,
    engine: str = 'local',
    check: bool = False,
    form: str = '',
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
    if vocab_size is not None and vocab_size not in VOCABULARY:
        raise CommandError(
            f'--train-tokenizer {vocab_size}: give {VOCABULARY[0]} to {VOCABULARY[-1]:,}, for all bytes are tokens'
        )
    path = parse_address(out)
    if engine == 'spark':
        from composer_tst.cli.prepare_data.spark import convert_with_spark as convert_with
    else:
        convert_with = partial(parallel, convert_part)
    sources, left_out = list_sources(inputs, path, form)
    look(sources, settings.text_key, settings.skip_bad)
    if settings.compression or settings.hashes:
        in_worker(check_options, settings)
    tokenizer = in_worker(load_tokenizer, tokenizer_name) if tokenizer_name else None
    fingerprint = {
        'version of this program': FORMAT,
        **{f'version of {name}': version(name) for name in LIBRARIES},
        '--seq-len': settings.seq_len,
        '--tokenizer': tokenizer and _digest([tokenizer.definition, tokenizer.eos_id]),
        '--train-tokenizer': vocab_size,
        '--split': settings.splits,
        '--text-key': settings.text_key,
        '--compression': settings.compression,
        '--hashes': settings.hashes,
        'listing of INPUT (names, sizes, times and formats)': _digest(
            [(source.path, source.size, source.stamp, source.format) for source in sources]
        ),
    }
    # Before anything is written there, be it a lock; and again under the lock.
    begun_with(Output(path), fingerprint)
    parts = plan_parts(sources)
    with locked(path) as output:
        begun = begun_with(output, fingerprint)
        if not begun:
            trained = None if tokenizer else _train(parts, settings, vocab_size or 0)
            begun = {'with': fingerprint, 'trained': trained}
            output.record(BEGUN, begun)
        job = Job(tokenizer or TextTokenizer(*begun['trained']['tokenizer']), settings, output)
        records = convert(parts, job, convert_with)
        bad = [line for record in records for line in record['bad']]
        if not any(record['splits'] for record in records):
            first = f' and {len(bad):,} bad ones, the first: {bad[0]}' if bad else ''
            good = sum(count['documents'] for record in records for count in record['counts'].values())
            raise CommandError(
                f'the input is too small: no split fills a row of --seq-len {settings.seq_len} ({good:,} documents'
                f'{first})'
            )
        if check:
            verify(job, records)
        indexes = {
            split: in_worker(merge, some)
            for split, _ in settings.splits
            if (some := {part_folder(r['part']): r['splits'][split]['index'] for r in records if split in r['splits']})
        }
        stats = summarize(job, records, indexes)
        # What is not a shard, the indexes last.
        for name, text in begun['trained']['files'].items() if begun['trained'] else ():
            output.publish(text.encode(), TOKENIZER, name)
        if bad:
            output.publish(''.join(f'{line}\n' for line in bad).encode(), 'bad_documents.txt')
        output.publish(json.dumps(stats, indent=2).encode(), 'stats.json')
        for split, index in indexes.items():
            output.publish(index.encode(), split, INDEX)
    with explained('write', 'to the screen what was done, which is whole'):
        print(describe(stats, left_out))
        saved = output.at(TOKENIZER)
        print(describe_loaders(stats, path, tokenizer_name or (f'copy {saved} here' if is_s3(path) else saved)))
        sys.stdout.flush()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _train(parts: Sequence[Part], settings: Settings, vocab_size: int) -> dict:
    """Train a tokenizer: it, and the files by which others load it."""
    print(f'training a tokenizer of {vocab_size:,} tokens on a sample', file=sys.stderr)
    tokenizer = train_tokenizer(sample_texts(parts, settings), vocab_size)
    return {'tokenizer': [tokenizer.definition, tokenizer.eos_id], 'files': in_worker(files_of, tokenizer)}
