"""Objects in buckets, by s3fs. A store is asked again until its answer is whole."""

import errno
import os
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.errors import changed, reason

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
    return _filesystem(os.environ.get('S3_ENDPOINT_URL') or None, os.getpid())


@lru_cache(2)
def _filesystem(endpoint: str | None, process: int) -> Any:
    from s3fs.core import S3File, S3FileSystem  # only for those who use a bucket

    class Object(S3File):
        """An object as it was listed, read in ranges."""

        def __init__(self, path: str, size: int, etag: str):
            self.details = {'name': path, 'size': size, 'ETag': etag}
            super().__init__(files, path, block_size=BLOCK_BYTES)

        def _fetch_range(self, start: int, end: int) -> bytes:
            def fetch() -> Any:
                data: Any = super(Object, self)._fetch_range(start, end)
                if len(data) != end - start:
                    raise OSError(f'{len(data):,} of {end - start:,} bytes came')
                return data

            return asked('read', self.details['name'], fetch)

    class S3(S3FileSystem):
        """One that takes every key as it is, with slashes at its end and `?versionId=` in it."""

        retries = 1  # `asked` does it, for bodies and listings too
        opened = Object

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return path.removeprefix('s3://')

        def split_path(self, path: str) -> tuple[str, str, None]:
            bucket, _, key = self._strip_protocol(path).partition('/')
            return bucket, key, None

    settings = {'retries': {'mode': 'standard'}, 'read_timeout': READ_SECONDS}
    files = S3(endpoint_url=endpoint, use_listings_cache=False, skip_instance_cache=True, config_kwargs=settings)
    return files


def asked(action: str, path: str, call: Callable[[], T]) -> T:
    """Call until there is an answer.

    Raises:
        FileNotFoundError: if what is asked for is not there.
        CommandError: if it is not what it was; if the store refuses, or has no whole answer in `TRIES` times.
    """
    from s3fs.utils import FileExpired

    tries, pause = 1, FIRST_PAUSE
    while True:
        try:
            return call()
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
        except FileExpired as error:
            raise changed(path) from error
        except Exception as error:  # of s3fs, aiobotocore, aiohttp, asyncio
            is_refused = isinstance(error, (PermissionError, ValueError))
            if is_refused or tries == TRIES:
                again = f', {TRIES} times; when it can be reached, the same command goes on from here'
                raise CommandError(f'cannot {action} {path}: {reason(error)}{"" if is_refused else again}') from error
        time.sleep(pause)
        tries, pause = tries + 1, pause * 2


def listing(prefix: str) -> dict[str, tuple[int, str]]:
    """The size and the ETag of all objects whose addresses begin with `prefix`."""

    def find() -> dict[str, Any]:
        bucket, key, _ = filesystem().split_path(prefix)
        return filesystem().find(bucket, prefix=key, detail=True)

    try:
        found = asked('list', prefix, find)
    except FileNotFoundError as error:
        raise CommandError(f'cannot use {prefix}: there is no bucket of this name') from error
    return {f's3://{name}': (item['size'], item['ETag']) for name, item in found.items()}


def opened(path: str, size: int, etag: str) -> Any:
    """An object as a file, which must be as it was listed."""
    return filesystem().opened(path, size, etag)


def read(path: str) -> bytes | None:
    """A whole object; None if there is none."""
    try:
        return asked('read', path, lambda: filesystem().cat_file(path))
    except FileNotFoundError:
        return None


def write(path: str, data: bytes) -> None:
    """Write an object."""
    asked('write', path, lambda: filesystem().pipe_file(path, data))
