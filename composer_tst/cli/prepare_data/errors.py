"""The one error that users see, and the words for the failures of disks and object stores."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from composer_tst.cli.main import CommandError

# What disks and object stores raise.
FAILURES = (OSError, BotoCoreError, ClientError, HTTPError)


class ChangedError(CommandError):
    """An input that is no longer what was listed."""


def shown(text: str) -> str:
    """A text that may hold anything, as names of files may, on one line of UTF-8."""
    return text if text.isprintable() else ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@contextmanager
def explained(action: str, path: str) -> Iterator[None]:
    """Turn a failure of the file system or of S3 into one sentence.

    Args:
        action: what was being done, as in `cannot {action} {path}: no such file`.
        path: the file, folder, key, or bucket concerned.

    Raises:
        CommandError: in place of an OSError or of an error of the S3 client.
    """
    try:
        yield
    except FAILURES as error:
        raise CommandError(f'cannot {action} {path}: {reason(error)}') from error


def reason(error: BaseException) -> str:
    """Say in a few words, on one line, why a read or a write failed."""
    if isinstance(error, ClientError):
        code = error.response.get('Error', {}).get('Code', '')
        if code == 'NoSuchBucket':
            return 'there is no such bucket'
        status = error.response.get('ResponseMetadata', {}).get('HTTPStatusCode')
        if status in (403, 404):
            return 'access denied' if status == 403 else 'it is not there'
    if isinstance(error, PermissionError):
        return 'access denied'
    if isinstance(error, FileNotFoundError):
        return 'it is not there'
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return ' '.join(str(error).split()).rstrip('.') or type(error).__name__
