"""Objects in buckets, through boto3, which takes every key as it is; the layers above it read patterns into keys."""

import os
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from botocore.exceptions import ClientError

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.errors import FAILURES, ChangedError, explained, reason
from composer_tst.cli.prepare_data.inputs import NOT_OURS, Input

# What is fetched from S3 at once, in bytes.
BLOCK_BYTES = 8 << 20
# How often a fetch that was cut short is tried, with pauses that double, in seconds.
FETCHES = 5
FIRST_PAUSE = 0.5
# How long an answer is waited for.
READ_SECONDS = 60
# How many threads read records at once, beside that of the lock; urllib3 warns of more connections than it was told of.
THREADS = 32


class S3:
    """Objects in buckets."""

    def read(self, path: str) -> bytes | None:
        """A whole object, or None if there is none."""
        with explained('read', path):
            for left in reversed(range(FETCHES)):
                try:
                    return S3Input(path, *self.head(path)).readall()
                except FileNotFoundError:
                    return None
                except ChangedError:  # as a lock does, which its owner renews or deletes
                    if not left:
                        raise

    def head(self, path: str) -> tuple[int, str]:
        """The size and the stamp of an object.

        Raises:
            FileNotFoundError: if there is none.
        """
        bucket, key = _bucket_and_key(path)
        try:
            found = client().head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response['ResponseMetadata']['HTTPStatusCode'] == 404:
                raise FileNotFoundError(path) from error
            raise
        return found['ContentLength'], found['ETag']

    def list(self, path: str) -> Iterator[dict]:
        """The objects whose addresses begin with `path`, as S3 lists them."""
        bucket, prefix = _bucket_and_key(path)
        with explained('read', path):
            for page in client().get_paginator('list_objects_v2').paginate(Bucket=bucket, Prefix=prefix):
                yield from page.get('Contents', [])

    def names(self, folder: str) -> Iterator[str]:
        """The names of what is in a folder, some more than once."""
        folder = folder.rstrip('/') + '/'
        start = len(_bucket_and_key(folder)[1])
        names = (item['Key'][start:].split('/')[0] for item in self.list(folder))
        return (name for name in names if name)  # an object that marks the folder itself has none

    def sizes(self, folder: str) -> dict[str, int]:
        """The sizes of the objects below a prefix, by what follows it."""
        start = len(_bucket_and_key(folder)[1]) + 1
        return {item['Key'][start:]: item['Size'] for item in self.list(f'{folder}/')}

    def create(self, path: str, data: bytes) -> None:
        """Write an object.

        Raises:
            CommandError: if something else is there.
        """
        if self._same(path, data):
            return
        try:
            self.put(path, data, {'If-None-Match': '*'})
        except FileExistsError:
            if not self._same(path, data):
                raise CommandError(NOT_OURS.format(path)) from None

    publish = create

    def _same(self, path: str, data: bytes) -> bool:
        with explained('read', path):
            try:
                size, _ = self.head(path)
            except FileNotFoundError:
                return False
        if size != len(data) or self.read(path) != data:
            raise CommandError(NOT_OURS.format(path))
        return True

    def replace(self, path: str, data: bytes) -> None:
        """Write a record in the place of an older or a damaged one."""
        self.put(path, data, {})

    def put(self, path: str, data: bytes, condition: dict[str, str]) -> str:
        """Write an object where a condition holds, for the stores that know it; return its stamp.

        Raises:
            FileExistsError: if the condition does not hold.
        """
        bucket, key = _bucket_and_key(path)
        with explained('write', path):
            try:
                return client().put_object(Bucket=bucket, Key=key, Body=data, Condition=condition)['ETag']
            except ClientError as error:
                code = error.response['ResponseMetadata']['HTTPStatusCode']
                if code == 501 and condition:
                    return client().put_object(Bucket=bucket, Key=key, Body=data)['ETag']
                if code not in (409, 412):
                    raise
        raise FileExistsError(path)

    def delete(self, path: str) -> None:
        """Delete one object."""
        bucket, key = _bucket_and_key(path)
        with explained('delete', path):
            client().delete_object(Bucket=bucket, Key=key)

    def open(self, path: str, size: int, stamp: str) -> 'S3Input':
        """Open an input that was listed with this size and stamp."""
        return S3Input(path, size, stamp)


class S3Input(Input):
    """An input on S3, fetched in blocks of the very object that was listed."""

    def __init__(self, path: str, size: int, stamp: str):
        super().__init__(path, size, stamp)
        self.start, self.block = 0, b''

    def readinto(self, buffer: Any) -> int:
        """Read up to the buffer's size."""
        if self.position >= self.size:
            return 0
        if not self.start <= self.position < self.start + len(self.block):
            end = min(self.position + BLOCK_BYTES, self.size)
            self.start, self.block = self.position, self._fetch(self.position, end)
        at = self.position - self.start
        count = min(len(buffer), len(self.block) - at)
        buffer[:count] = memoryview(self.block)[at : at + count]
        self.position += count
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a byte."""
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def _fetch(self, start: int, end: int) -> bytes:
        bucket, key = _bucket_and_key(self.path)
        pause = FIRST_PAUSE
        for left in reversed(range(FETCHES)):
            try:
                answer = client().get_object(
                    Bucket=bucket, Key=key, Range=f'bytes={start}-{end - 1}', IfMatch=self.stamp
                )
                if answer['ETag'] != self.stamp:
                    raise self.changed()
                data = answer['Body'].read()
                if len(data) != end - start:
                    raise OSError(f'{len(data):,} of {end - start:,} bytes came')
                return data
            except ClientError as error:
                if error.response['ResponseMetadata']['HTTPStatusCode'] in (404, 412, 416):
                    raise self.changed() from error
                if error.response['ResponseMetadata']['HTTPStatusCode'] < 500 or not left:
                    raise CommandError(f'cannot read {self.path}: {reason(error)}') from error
            except FAILURES as error:
                if not left:
                    raise CommandError(
                        f'cannot read {self.path}: {reason(error)}, {FETCHES} times; '
                        'when it can be reached, the same command goes on from here'
                    ) from error
            time.sleep(pause)
            pause *= 2
        raise AssertionError


def _bucket_and_key(path: str) -> tuple[str, str]:
    bucket, _, key = path.removeprefix('s3://').partition('/')
    return bucket, key


def client() -> Any:
    """The S3 client of this process, at `S3_ENDPOINT_URL` where that is set."""
    return _client(os.environ.get('S3_ENDPOINT_URL'), os.getpid())


@lru_cache(2)
def _client(endpoint: str | None, process: int) -> Any:
    from boto3 import session
    from botocore.config import Config

    settings = {'retries': {'mode': 'standard'}, 'read_timeout': READ_SECONDS, 'max_pool_connections': 2 * THREADS}
    try:
        made = session.Session().client('s3', endpoint_url=endpoint, config=Config(**settings))
    except ValueError as error:  # what boto reads from the environment and its own files
        where = f'S3_ENDPOINT_URL={endpoint} or ' if endpoint else ''
        raise CommandError(f'cannot use S3 with {where}the settings of AWS: {error}') from error

    # This version of boto knows no conditions of a put, but S3 does.
    def add_condition(params: dict, context: dict, **rest: Any) -> None:
        params['headers'].update(context.get('headers', {}))

    def keep_condition(params: dict, context: dict, **rest: Any) -> None:
        context['headers'] = params.pop('Condition', {})

    made.meta.events.register('provide-client-params.s3.PutObject', keep_condition)
    made.meta.events.register('before-call.s3.PutObject', add_condition)
    return made
