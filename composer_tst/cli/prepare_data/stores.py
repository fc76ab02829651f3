"""The two places where files are, a disk and S3, with the few things that are done there.

Nothing there deletes or replaces what it did not make: a file is created, or found to be the same already,
or left alone.
"""

from composer_tst.cli.prepare_data.disk import Disk
from composer_tst.cli.prepare_data.s3 import S3


def store_of(path: str) -> Disk | S3:
    """The place where a path is."""
    return S3() if path.startswith('s3://') else Disk()
