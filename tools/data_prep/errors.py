"""The one error that users see, and the words for the failures of disks and object stores."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import BotoCoreError, ClientError


class PrepareError(Exception):
    """A failure the user can act on: one sentence that names the file, the line, or the setting."""


@contextmanager
def explained(action: str, path: str) -> Iterator[None]:
    """Turn a failure of the file system or of S3 into one sentence.

    Args:
        action: what was being done, as in `cannot {action} {path}: no such file`.
        path: the file, folder, key, or bucket concerned.

    Raises:
        PrepareError: in place of an OSError or of an error of the S3 client.
    """
    try:
        yield
    except (OSError, BotoCoreError, ClientError) as error:
        raise PrepareError(f'cannot {action} {path}: {reason(error)}') from error


def reason(error: BaseException) -> str:
    """Say in a few words, on one line, why a read or a write failed."""
    if isinstance(error, PermissionError):
        return 'access denied'
    if isinstance(error, FileNotFoundError):
        return 'it is not there'
    if isinstance(error, OSError) and error.errno is not None:
        # s3fs makes up errno and puts the server's words in strerror; the disk's words are libc's.
        return error.strerror or os.strerror(error.errno)
    return ' '.join(str(error).split()).rstrip('.') or type(error).__name__
