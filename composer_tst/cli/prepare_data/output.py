"""Where a data set goes, and the records of what of it is finished.

The folder `.records` says with what the output was begun and which parts are finished, with their files. It stays when
all is done, so that a data set can be verified and mended at any time. A part is written beside it first, and brought
to its place when it is whole; the index of a split, without which there is no data set, comes last.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from filelock import FileLock, Timeout

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.storage import (
    NOT_OURS,
    explained,
    is_s3,
    move_in,
    names,
    publish,
    read,
    replace,
    shown,
    sizes,
)

RECORDS = '.records'
BEGUN = 'begun.json'
TOKENIZER = 'tokenizer'
# What the making of a file system leaves in it.
LOST_AND_FOUND = 'lost+found'
# Whose versions decide the rows and the shards.
LIBRARIES = ('mosaicml-streaming', 'tokenizers', 'pyarrow')
# How many records are read at once from a bucket.
THREADS = 32
# Workers of a run that was killed need a moment to see it, in seconds.
GRACE = 3.0


@dataclass(frozen=True)
class Output:
    """An output, finished or under way.

    Args:
        path: its address.
        scratch: a folder of this machine for what is not whole yet.
    """

    path: str
    scratch: str

    def at(self, *parts: str) -> str:
        """The address of something in it."""
        return '/'.join((self.path.rstrip('/'), *parts))

    def publish(self, data: bytes, *parts: str, ours: bytes | None = None) -> None:
        """Write a file that is there whole or not at all."""
        publish(self.at(*parts), data, ours)

    def record(self, name: str, record: Any) -> None:
        """Write a record."""
        replace(self.at(RECORDS, name), json.dumps(record).encode())

    def recorded(self, name: str) -> Any:
        """Read a record; None if there is none, or if it is damaged."""
        try:
            return json.loads(read(self.at(RECORDS, name)) or b'')
        except ValueError:
            return None

    def finish_part(self, folder: str, record: dict[str, Any]) -> None:
        """Bring the files of a part to their place, the index of each split last, then its record."""
        for split, made in record['splits'].items():
            for name in made['files']:
                move_in(os.path.join(folder, split, name), self.at(split, part_folder(record['part']), name))
        self.record(part_name(record['part']), record)

    def part_records(self, parts: int, splits: Iterable[str]) -> dict[int, dict]:
        """The records of finished parts all of whose files are there, by the number of the part."""
        there = sizes(self.at(RECORDS))
        numbers = [number for number in range(parts) if part_name(number) in there]
        found = {split: sizes(self.at(split)) for split in splits}
        # Many at once: thousands of requests to S3, one after another, would take minutes.
        with ThreadPoolExecutor(THREADS) as pool:
            records = list(pool.map(lambda number: self.recorded(part_name(number)), numbers))
        return {
            number: record
            for number, record in zip(numbers, records, strict=True)
            if isinstance(record, dict) and record.get('part') == number
            and all(
                found[split].get(f'{part_folder(number)}/{name}') == size
                for split, made in record['splits'].items()
                for name, (size, _) in made['files'].items()
            )
        }  # fmt: skip


def part_name(number: int) -> str:
    """The name of the record of a part."""
    return f'part.{number:06}.json'


def part_folder(number: int) -> str:
    """The name of the folder of a part, in that of its split."""
    return f'{number:05}'


def versions() -> dict[str, str]:
    """The versions that an output is begun with, by the words that a refusal uses."""
    return {f'version of {name}': version(name) for name in LIBRARIES}


def check_output(output: Output, fingerprint: dict[str, Any]) -> bool:
    """Look whether an output is new or was begun by the same command; return whether it was begun.

    One that was only begun, in which nothing is but a tokenizer, is as new.

    Args:
        output: is not written to.
        fingerprint: what decides the rows, by the words that a refusal uses for it.

    Raises:
        CommandError: if the output holds anything of others, or was begun with another fingerprint.
    """
    there = {name for name in names(output.path) if not name.startswith('.') and name != LOST_AND_FOUND}
    begun = output.recorded(BEGUN)
    if not isinstance(begun, dict):
        for name in sorted(there):
            raise CommandError(
                f'output {output.path} holds {shown(name)} and was not begun by this command: '
                'name an empty or a new folder'
            )
        return False
    if 'record' in begun:
        raise CommandError(
            f'{output.path} was made by an earlier version of this command: training reads it as it is; to verify it '
            'or go on with it, make it anew with the same command and another --output'
        )
    fingerprint = json.loads(json.dumps(fingerprint))
    if begun == fingerprint:
        return True
    if there <= {TOKENIZER} and not any(name.startswith('part.') for name in names(output.at(RECORDS))):
        return False
    changed = [
        key + (f' ({begun.get(key)}, now {value})' if key.startswith('version') else '')
        for key, value in fingerprint.items()
        if begun.get(key) != value
    ]
    raise CommandError(
        f'{output.path} was begun with another {" and ".join(changed)}: run with the same, or name another output'
    )


@contextlib.contextmanager
def locked(path: str) -> Iterator[str]:
    """Hold the lock of an output; give a folder of this machine for what is not whole yet, which goes at the end.

    On S3 there is no lock: two runs of one command write the same shards under the same names.

    Raises:
        CommandError: if another run holds the lock.
    """
    if is_s3(path):
        with explained('write', f'the temporary folder {tempfile.gettempdir()}'):
            scratch = tempfile.mkdtemp(prefix='composer-tst-')
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return
    records = os.path.join(path, RECORDS)
    name, scratch = os.path.join(records, 'lock'), os.path.join(records, 'scratch')
    with explained('write', path):
        os.makedirs(records, exist_ok=True)
        if os.path.islink(name) or (os.path.exists(name) and os.path.getsize(name)):
            raise CommandError(NOT_OURS.format(name))
    lock = FileLock(name, timeout=GRACE)
    try:
        lock.acquire()
    except Timeout as error:
        raise CommandError(f'another run is writing to {path}: wait for its end, or name another output') from error
    except (OSError, NotImplementedError) as error:
        if getattr(error, 'errno', None) not in (None, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
            with explained('write', name):
                raise
        print(f'the disk of {shown(path)} has no locks: see to it that no second run writes there', file=sys.stderr)
    try:
        with explained('write', scratch):
            if os.path.islink(scratch):
                raise CommandError(NOT_OURS.format(scratch))
            shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
            os.makedirs(scratch, exist_ok=True)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        lock.release()
