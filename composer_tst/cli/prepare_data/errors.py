"""Failures as sentences."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

import typer

from composer_tst.cli.main import CommandError

# How much of what a library says is told, in characters: transformers lists all models there are.
LONGEST_REASON = 300
# Failures that end in a sentence. Others are faults of the program.
TOLD = (CommandError, OSError, MemoryError)


class BadDocument(Exception):
    """Why something that should have been a document is none, the cure if it is wrong with all of a file, and where."""

    def __init__(self, why: str, cure: str = ''):
        self.why, self.cure, self.where = why, cure, ''

    def __str__(self) -> str:
        return shown(f'{self.where}: {self.why}')


def changed(path: str) -> CommandError:
    """An input is no longer what was listed."""
    return CommandError(
        f'{path} changed after it was listed: give it time to be complete, then name another output, '
        'since this one was begun with the file as it was'
    )


def shown(text: str) -> str:
    """Write a text that may hold anything, as names of files may, on one line of UTF-8."""
    return text if text.isprintable() else ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def reason(error: BaseException) -> str:
    """Say in a few words why something failed."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return shorten(str(error), LONGEST_REASON, placeholder=' ...').rstrip('.') or type(error).__name__


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Have a failure of the disk name what it concerns, as that of a full one does not by itself."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and not error.filename:
            error.filename = path
        raise


def sentence_of(error: BaseException) -> str:
    """What is told of a failure that is one of `TOLD`."""
    if isinstance(error, CommandError):
        return str(error)
    if isinstance(error, MemoryError):
        return 'there is not enough memory: give it more, and the same command goes on from here'
    name = getattr(error, 'filename', None)
    what = f'cannot use {name}: ' if name else ''
    return f'{what}{reason(error)}: mend that, and the same command goes on from here'


@contextmanager
def told() -> Iterator[None]:
    """End the command with a sentence where it fails."""
    try:
        yield
        return
    except KeyboardInterrupt:
        typer.echo('interrupted: the same command goes on from here', err=True)
        raise typer.Exit(130) from None
    except TOLD as error:
        sentence = sentence_of(error)
    typer.echo(f'error: {shown(sentence)}', err=True)
    raise typer.Exit(1)
