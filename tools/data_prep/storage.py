"""One way to reach local disk and S3: fsspec, with the S3 endpoint that streaming and Composer read."""

import os

import fsspec
from fsspec import AbstractFileSystem

# Blocks fetched from S3 by sequential readers, in bytes; s3fs keeps one at a time.
BLOCK_BYTES = 8 << 20


def is_s3(path: str) -> bool:
    """Whether `path` is an S3 address."""
    return path.startswith('s3://')


def filesystem(path: str) -> AbstractFileSystem:
    """The file system that holds `path`: local disk, or S3 at `S3_ENDPOINT_URL` where that is set."""
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
