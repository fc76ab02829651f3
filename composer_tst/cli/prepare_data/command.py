"""Raw text, on disk or on S3, to tokenised MDS shards that training streams."""

import hashlib
import json
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.convert import Job, convert, convert_part
from composer_tst.cli.prepare_data.documents import look
from composer_tst.cli.prepare_data.errors import told
from composer_tst.cli.prepare_data.inputs import list_sources, parse_address
from composer_tst.cli.prepare_data.output import BEGUN, FORMAT, RECORDS, VERSION, Output, begun_with, locked
from composer_tst.cli.prepare_data.parts import Settings, parse_splits, plan_parts, sample_texts
from composer_tst.cli.prepare_data.report import TOKENIZER, describe, finish
from composer_tst.cli.prepare_data.s3 import is_s3
from composer_tst.cli.prepare_data.shards import LONGEST_ROW, check_options
from composer_tst.cli.prepare_data.tokenizer import TextTokenizer, files_of, load_tokenizer
from composer_tst.cli.prepare_data.tokenizer import train_tokenizer as train
from composer_tst.cli.prepare_data.workers import in_worker, parallel

# Whose versions decide the rows and the shards.
LIBRARIES = ('mosaicml-streaming', 'tokenizers', 'pyarrow')

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar='INPUT',
            help='Files, folders, patterns or s3:// addresses of plain text (.txt, a document a file), JSON lines '
            '(.jsonl, .ndjson, .json, .jl, .jsonlines, .ldjson) or .parquet, each also .gz, .zst, .bz2 or .xz.',
        ),
    ],
    output: Annotated[str, typer.Option(help='An empty or a new folder, or an s3:// address.')],
    seq_len: Annotated[int, typer.Option(min=1, max=LONGEST_ROW, help='Tokens of a row.')] = 2048,
    tokenizer: Annotated[str | None, typer.Option(help='A local folder or a hub name.')] = None,
    # The least tokens are the bytes, end-of-text and padding.
    train_tokenizer: Annotated[
        int | None, typer.Option(metavar='VOCAB_SIZE', min=258, max=1_000_000, help='Train byte-level BPE instead.')
    ] = None,
    split: Annotated[str, typer.Option(help='Shares of the documents, by a hash.')] = 'train=0.99,val=0.01',
    text_key: Annotated[str, typer.Option(help='The JSON field or Parquet column of the text.')] = 'text',
    format: Annotated[
        Literal['text', 'jsonl', 'parquet'] | None, typer.Option(help='Of files that have none in their names.')
    ] = None,
    compression: Annotated[str | None, typer.Option(help='Of shards: zstd, zstd:7, gz, ...')] = None,
    hashes: Annotated[str, typer.Option(help='Of shards, with commas between: sha1,xxh64, ...')] = '',
    skip_bad: Annotated[bool, typer.Option('--skip-bad', help='List bad documents and go on.')] = False,
    verify: Annotated[bool, typer.Option('--verify', help='Read every shard back, of a finished output too.')] = False,
    engine: Annotated[Literal['local', 'spark'], typer.Option(help='This machine, or Spark.')] = 'local',
) -> None:
    """Make a data set for `llmfoundry train`: OUTPUT/train, OUTPUT/val and OUTPUT/stats.json.

    Killed and run again with the same arguments, it goes on from the finished parts. Nothing is ever deleted.
    """
    with told():
        if bool(tokenizer) == bool(train_tokenizer):
            raise CommandError('give one of --tokenizer and --train-tokenizer')
        of_shards = tuple(sorted({name for name in hashes.split(',') if name}))
        settings = Settings(seq_len, parse_splits(split), text_key, skip_bad, compression or None, of_shards)
        path = parse_address(output)
        if engine == 'spark':
            from composer_tst.cli.prepare_data.spark import convert_with_spark as convert_with
        else:
            convert_with = partial(parallel, convert_part)
        # What is wrong is said before anything is written, be it a lock.
        sources, left_out = list_sources(inputs, path, format or '')
        look(sources, text_key, skip_bad)
        if settings.compression or settings.hashes:
            in_worker(check_options, settings)
        loaded = in_worker(load_tokenizer, tokenizer) if tokenizer else None
        fingerprint = {
            VERSION: FORMAT,
            **{f'version of {name}': version(name) for name in LIBRARIES},
            '--seq-len': seq_len,
            '--tokenizer': loaded and _digest([loaded.definition, loaded.eos_id]),
            '--train-tokenizer': train_tokenizer,
            '--split': settings.splits,
            '--text-key': text_key,
            '--compression': settings.compression,
            '--hashes': settings.hashes,
            'listing of INPUT (names, sizes, times and formats)': _digest(
                [(source.path, source.size, source.stamp, source.format) for source in sources]
            ),
        }
        begun_with(Output(path), fingerprint)
        parts = plan_parts(sources)
        with locked(path) as out:
            begun = begun_with(out, fingerprint)
            if not begun:
                trained = None
                if train_tokenizer:
                    print(f'training a tokenizer of {train_tokenizer:,} tokens on a sample', file=sys.stderr)
                    trained = train(sample_texts(parts, settings), train_tokenizer)
                begun = {'with': fingerprint, 'trained': trained and [trained.definition, trained.eos_id]}
                for name in out.sizes(RECORDS):
                    if name.startswith('part.'):
                        out.record(name, {})  # of other settings, and without a shard
                out.record(BEGUN, begun)
            job = Job(loaded or TextTokenizer(*begun['trained']), settings, out)
            records = convert(parts, job, convert_with)
            if verify:
                out.verify(records)
            stats = finish(job, records, {} if loaded else files_of(job.tokenizer))
        saved = f'copy {out.at(TOKENIZER)} here' if is_s3(path) else out.at(TOKENIZER)
        if tokenizer and (folder := Path(tokenizer).expanduser()).is_dir():
            tokenizer = str(folder.resolve())
        print(describe(stats, left_out, path, tokenizer or saved), flush=True)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
