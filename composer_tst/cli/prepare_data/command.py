"""Raw text, on disk or on S3, to tokenised MDS shards that training streams."""

from enum import Enum
from typing import Annotated

import typer

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.errors import reason, shown
from composer_tst.cli.prepare_data.parts import Settings, parse_splits
from composer_tst.cli.prepare_data.run import prepare

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Engine(str, Enum):
    """What runs the conversion."""

    local = 'local'
    spark = 'spark'


class Format(str, Enum):
    """What a file is read as."""

    text = 'text'
    jsonl = 'jsonl'
    parquet = 'parquet'


@app.command()
def main(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar='INPUT...',
            help='Files, folders, patterns or s3:// addresses of plain text (.txt, a document a file), JSON lines '
            '(.jsonl, .ndjson, .json, .jl, .jsonlines, .ldjson) or .parquet, each also .gz, .zst, .bz2 or .xz.',
        ),
    ] = None,
    output: Annotated[str, typer.Option(help='An empty or a new folder, or an s3:// address.')] = '',
    seq_len: Annotated[int, typer.Option(help='Tokens of a row.')] = 2048,
    tokenizer: Annotated[str | None, typer.Option(help='A local folder or a hub name.')] = None,
    train_tokenizer: Annotated[
        int | None, typer.Option(metavar='VOCAB_SIZE', help='Train byte-level BPE on a sample instead.')
    ] = None,
    split: Annotated[
        str, typer.Option(help='Shares of the documents, by a hash of their text.')
    ] = 'train=0.99,val=0.01',
    text_key: Annotated[str, typer.Option(help='The JSON field or Parquet column of the text.')] = 'text',
    form: Annotated[
        Format | None, typer.Option('--format', help='What files are that have no format in their names.')
    ] = None,
    compression: Annotated[str | None, typer.Option(help='Of shards: zstd, zstd:7, gz, ...')] = None,
    hashes: Annotated[str, typer.Option(help='Of shards, with commas between: sha1,xxh64, ...')] = '',
    skip_bad: Annotated[bool, typer.Option('--skip-bad', help='List bad documents and go on.')] = False,
    verify: Annotated[bool, typer.Option('--verify', help='Read every shard back, of a finished output too.')] = False,
    engine: Annotated[Engine, typer.Option(help='This machine, or Spark.')] = Engine.local,
) -> None:
    """Make a data set for `llmfoundry train`: OUTPUT/train, OUTPUT/val and OUTPUT/stats.json.

    Killed and run again with the same arguments, it goes on from the finished parts. Nothing is ever deleted.
    """
    try:
        names = tuple(sorted({name for name in hashes.split(',') if name}))
        settings = Settings(seq_len, parse_splits(split), text_key, skip_bad, compression or None, names)
        of = form.value if form else ''
        prepare(inputs or [], output, settings, tokenizer, train_tokenizer, engine.value, verify, of)
    except CommandError as error:
        typer.echo(f'error: {shown(str(error))}', err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        what = f'cannot use {shown(str(error.filename))}: ' if error.filename else ''
        typer.echo(f'error: {what}{reason(error)}: mend that, and the same command goes on from here', err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo('interrupted: the same command goes on from here', err=True)
        raise typer.Exit(130) from None
