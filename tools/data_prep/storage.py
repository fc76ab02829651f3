"""One way to reach local disk and S3: fsspec, with the S3 endpoint that streaming and Composer read."""

import os
from typing import Any

import fsspec

from .errors import PrepareError, explained

# Blocks fetched from S3 by sequential readers, in bytes; s3fs keeps one at a time.
BLOCK_BYTES = 8 << 20


def is_s3(path: str) -> bool:
    """Whether `path` is an S3 address."""
    return path.startswith('s3://')


def check_bucket(path: str) -> None:
    """Make sure that the bucket of an S3 address is there and that we may use it.

    Raises:
        PrepareError: in so many words; a listing of a bucket that is not there is merely empty.
    """
    bucket = path.removeprefix('s3://').split('/')[0]
    with explained('use', path):
        try:
            filesystem(path).call_s3('head_bucket', Bucket=bucket)
        except FileNotFoundError as error:
            raise PrepareError(f'cannot use {path}: there is no bucket {bucket}') from error


def filesystem(path: str) -> Any:
    """The fsspec file system that holds `path`: local disk, or S3, at `S3_ENDPOINT_URL` where that is set."""
    if not is_s3(path):
        return fsspec.filesystem('file')
    return fsspec.filesystem(
        's3',
        client_kwargs={'endpoint_url': os.environ.get('S3_ENDPOINT_URL')},
        default_block_size=BLOCK_BYTES,
        default_cache_type='readahead',
        # A listing kept from before our own writes would hide them.
        use_listings_cache=False,
    )
