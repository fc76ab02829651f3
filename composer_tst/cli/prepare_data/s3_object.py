"""An object in a bucket as a file."""

from typing import Any

from s3fs.core import S3File

from composer_tst.cli.prepare_data import s3
from composer_tst.cli.prepare_data.errors import ChangedError


class S3Object(S3File):
    """An object as it was listed, read in ranges."""

    def __init__(self, path: str, size: int, etag: str):
        self.details = {'name': path, 'size': size, 'ETag': etag}
        super().__init__(s3.filesystem(), path, block_size=s3.BLOCK_BYTES)

    def _fetch_range(self, start: int, end: int) -> bytes:
        def fetch() -> Any:
            data: Any = super(S3Object, self)._fetch_range(start, end)
            if len(data) != end - start:
                raise OSError(f'{len(data):,} of {end - start:,} bytes came')
            return data

        try:
            return s3.asked('read', self.details['name'], fetch)
        except FileNotFoundError as error:
            raise ChangedError(self.details['name']) from error
