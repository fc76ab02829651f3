"""Failures as sentences."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from composer_tst.cli.main import CommandError


class ChangedError(CommandError):
    """An input that is no longer what was listed."""

    def __init__(self, path: str):
        super().__init__(
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
    return ' '.join(str(error).split()).rstrip('.') or type(error).__name__


@contextmanager
def explained(action: str, path: str) -> Iterator[None]:
    """Turn a failure of the disk into a sentence: cannot {action} {path}: no such file."""
    try:
        yield
    except OSError as error:
        raise CommandError(f'cannot {action} {path}: {reason(error)}') from error
