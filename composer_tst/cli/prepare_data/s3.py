"""Objects in buckets, by s3fs. A store is asked again until its answer is whole."""

import os
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.errors import ChangedError, reason

# What is fetched of an object at once, in bytes.
BLOCK_BYTES = 8 << 20
# How often a store is asked, with pauses that double, in seconds.
TRIES = 5
FIRST_PAUSE = 0.5
# How long an answer is waited for.
READ_SECONDS = 60

T = TypeVar('T')


def is_s3(path: str) -> bool:
    """Whether a path is an address in a bucket."""
    return path.startswith('s3://')


def filesystem() -> Any:
    """The file system of this process, at `S3_ENDPOINT_URL` if that is set."""
    return _filesystem(os.environ.get('S3_ENDPOINT_URL'), os.getpid())


@lru_cache(2)
def _filesystem(endpoint: str | None, process: int) -> Any:
    from s3fs import S3FileSystem  # only for those who use a bucket

    class S3(S3FileSystem):
        """One that takes every key as it is, with slashes at its end and `?versionId=` in it."""

        retries = 1  # `asked` does it, for bodies and listings too

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path.removeprefix('s3://')

        def split_path(self, path: str) -> tuple[str, str, None]:
            bucket, _, key = self._strip_protocol(path).partition('/')
            return bucket, key, None

    settings = {'retries': {'mode': 'standard'}, 'read_timeout': READ_SECONDS}
    return S3(endpoint_url=endpoint, use_listings_cache=False, skip_instance_cache=True, config_kwargs=settings)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an answer, which s3fs hands on as the cause of its own errors."""
    while error is not None:
        if response := getattr(error, 'response', None):
            return response.get('ResponseMetadata', {}).get('HTTPStatusCode')
        error = error.__cause__
    return None


def asked(action: str, path: str, call: Callable[[], T]) -> T:
    """Call until there is an answer.

    Raises:
        FileNotFoundError: if what is asked for is not there.
        ChangedError: if it is not what it was.
        CommandError: if the store refuses, has no whole answer in `TRIES` times, or the settings of AWS are none.
    """
    last = None
    for number in range(TRIES):
        if last:
            time.sleep(FIRST_PAUSE * 2 ** (number - 1))
        try:
            return call()
        except Exception as error:  # of s3fs, aiobotocore, aiohttp, asyncio
            status = _status(error)
            if status == 404 or isinstance(error, FileNotFoundError):
                raise FileNotFoundError(path) from error
            if status in (412, 416):
                raise ChangedError(path) from error
            refused = status is not None and status < 500 and status not in (408, 429)
            if refused or isinstance(error, (PermissionError, ValueError)):
                raise CommandError(f'cannot {action} {path}: {reason(error)}') from error
            last = error
    assert last is not None
    raise CommandError(
        f'cannot {action} {path}: {reason(last)}, {TRIES} times; when it can be reached, the same command goes on '
        'from here'
    ) from last


def check_bucket(path: str) -> None:
    """Refuse a bucket that is not there or not ours to use: its listing might be merely empty."""
    bucket = path.split('/')[2]
    try:
        asked('use', path, lambda: filesystem().call_s3('head_bucket', Bucket=bucket))
    except FileNotFoundError as error:
        raise CommandError(f'cannot use {path}: there is no bucket {bucket}') from error


def listing(prefix: str) -> dict[str, tuple[int, str]]:
    """The size and the ETag of all objects whose addresses begin with `prefix`."""

    def find() -> dict[str, Any]:
        bucket, key, _ = filesystem().split_path(prefix)
        return filesystem().find(bucket, prefix=key, detail=True)

    return {f's3://{name}': (item['size'], item['ETag']) for name, item in asked('list', prefix, find).items()}


def read(path: str) -> bytes | None:
    """A whole object; None if there is none."""
    try:
        return asked('read', path, lambda: filesystem().cat_file(path))
    except FileNotFoundError:
        return None


def write(path: str, data: bytes) -> None:
    """Write an object."""
    asked('write', path, lambda: filesystem().pipe_file(path, data))
