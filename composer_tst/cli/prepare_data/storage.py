"""Files on a disk and objects in buckets, whose failures are sentences.

Nothing here deletes or replaces what this program did not make.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from composer_tst.cli.main import CommandError

# What is said of a file that is in the way.
NOT_OURS = '{} is there already and is not what this run writes: move it away, and the same command goes on from here'


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
    """Say in a few words why a read or a write failed."""
    if isinstance(error, PermissionError):
        return 'access denied'
    if isinstance(error, FileNotFoundError):
        return 'it is not there'
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


def is_s3(path: str) -> bool:
    """Whether a path is an address in a bucket."""
    return path.startswith('s3://')


@cache
def s3() -> Any:
    """The module of buckets, whose import a run on a disk does without."""
    from composer_tst.cli.prepare_data import s3 as module

    return module


def read(path: str) -> bytes | None:
    """Read a whole file; None if there is none."""
    if is_s3(path):
        return s3().read(path)
    with explained('read', path):
        try:
            with open(path, 'rb') as file:
                return file.read()
        except FileNotFoundError:
            return None


def sizes(folder: str) -> dict[str, int]:
    """The sizes of all files below a folder, by their path from there."""
    start = len(folder.rstrip('/')) + 1
    if is_s3(folder):
        return {path[start:]: size for path, (size, _) in s3().listing(folder.rstrip('/') + '/').items()}
    found = {}
    with explained('read', folder):
        for where, _, names in os.walk(folder, onerror=_raise_unless_gone):
            for path in (os.path.join(where, name) for name in names):
                if os.path.lexists(path):
                    found[path[start:]] = os.lstat(path).st_size
    return found


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def names(folder: str) -> set[str]:
    """The names of what is in a folder."""
    if is_s3(folder):
        return {path.split('/')[0] for path in sizes(folder) if path}
    with explained('read', folder):
        return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def replace(path: str, data: bytes) -> None:
    """Write a record of this program, whole or not at all, in the place of an older one."""
    if is_s3(path):
        s3().write(path, data)
        return
    folder, name = os.path.split(path)
    with explained('write', path):
        os.makedirs(folder, exist_ok=True)
        new = os.path.join(folder, f'.{name}.new')
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666), 'wb') as file:
            file.write(data)
        _move(new, path)


def publish(path: str, data: bytes, ours: bytes | None = None) -> None:
    """Write a file, whole or not at all, where there is none, the same, or `ours`.

    Raises:
        CommandError: if something else is there.
    """
    if is_s3(path) or os.path.lexists(path):
        found = b'' if os.path.islink(path) else read(path)
        if found not in (None, data) and (ours is None or found != ours):
            raise CommandError(NOT_OURS.format(path))
        if found == data:
            return
    replace(path, data)


def move_in(source: str, path: str) -> None:
    """Bring a finished file of this machine to its place, where there is none or the same."""
    if is_s3(path) or os.path.lexists(path):
        with explained('read', source), open(source, 'rb') as file:
            publish(path, file.read())
        return
    with explained('write', path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _move(source, path)


def _move(source: str, path: str) -> None:
    """Rename a file such that it survives a loss of power."""
    for name, then in ((source, lambda: os.replace(source, path)), (os.path.dirname(path), lambda: None)):
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        then()
