"""Where a data set goes, and the records of what of it is finished.

The folder `.records` says with what the output was begun and which parts are finished, with their files. It stays when
all is done, so that a data set can be verified and mended at any time. What is written on a disk is written there
first, in `scratch`, and brought to its place when it is whole; the index of a split, without which there is no data
set, comes last. Nothing but records is replaced, and nothing outside `scratch` deleted.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data import s3
from composer_tst.cli.prepare_data.errors import explained, shown
from composer_tst.cli.prepare_data.s3 import is_s3

RECORDS = '.records'
BEGUN = 'begun.json'
# What the making of a file system leaves in it.
LOST_AND_FOUND = 'lost+found'
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
    scratch: str = ''

    def at(self, *parts: str) -> str:
        """The address of something in it."""
        return '/'.join((self.path.rstrip('/'), *parts))

    def read(self, *parts: str) -> bytes | None:
        """Read a whole file; None if there is none."""
        path = self.at(*parts)
        if is_s3(path):
            return s3.read(path)
        try:
            with open(path, 'rb') as file:
                return file.read()
        except FileNotFoundError:
            return None

    def sizes(self, *parts: str) -> dict[str, int]:
        """The sizes of all files below a folder, by their path from there."""
        folder = self.at(*parts)
        if is_s3(folder):
            return {path[len(folder) + 1 :]: size for path, (size, _) in s3.listing(f'{folder}/').items()}
        paths = [os.path.join(where, name) for where, _, names in os.walk(folder) for name in names]
        return {os.path.relpath(path, folder): os.lstat(path).st_size for path in paths if os.path.lexists(path)}

    def write(self, data: bytes, *parts: str) -> None:
        """Write a file, whole or not at all, in the place of an older one."""
        path = self.at(*parts)
        if is_s3(path):
            s3.write(path, data)
            return
        with explained('write', path):
            new = os.path.join(self.scratch, uuid.uuid4().hex)
            with open(new, 'wb') as file:
                file.write(data)
            _move(new, path)

    def publish(self, data: bytes, *parts: str) -> None:
        """Write a file if there is none.

        Raises:
            CommandError: if there is one of other content.
        """
        path = self.at(*parts)
        found = self.read(*parts)
        if found is None and (is_s3(path) or not os.path.lexists(path)):
            self.write(data, *parts)
        elif found != data:
            raise CommandError(
                f'{path} is there already and is not what this run writes: move it away, and the same command goes '
                'on from here'
            )

    def record(self, name: str, record: Any) -> None:
        """Write a record."""
        self.write(json.dumps(record).encode(), RECORDS, name)

    def recorded(self, name: str) -> dict[str, Any]:
        """Read a record; empty if there is none, or if it is damaged."""
        try:
            record = json.loads(self.read(RECORDS, name) or b'')
        except ValueError:
            return {}
        return record if isinstance(record, dict) else {}

    def part_records(self, parts: int, splits: Iterable[str]) -> dict[int, dict]:
        """The records of finished parts all of whose files are there, by the number of the part."""
        there = self.sizes(RECORDS)
        numbers = [number for number in range(parts) if part_record(number) in there]
        found = {split: self.sizes(split) for split in splits}
        # Many at once: thousands of requests to S3, one after another, would take minutes.
        with ThreadPoolExecutor(THREADS) as pool:
            records = pool.map(lambda number: self.recorded(part_record(number)), numbers)
        return {
            number: record
            for number, record in zip(numbers, records, strict=True)
            if record.get('part') == number
            and all(
                found[split].get(f'{part_folder(number)}/{name}') == size
                for split, made in record['splits'].items()
                for name, (size, _) in made['files'].items()
            )
        }


def part_folder(number: int) -> str:
    """The name of the folder of a part, in that of its split."""
    return f'{number:05}'


def part_record(number: int) -> str:
    """The name of the record of a part."""
    return f'part.{number:05}.json'


def begun_with(output: Output, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Look whether an output was begun by the same command; return what that recorded, empty if it is new.

    One that was only begun, without a finished part, is as new.

    Args:
        output: is not written to.
        fingerprint: what decides the rows, by the words that a refusal uses for it.

    Raises:
        CommandError: if the output holds anything of others, or was begun with another fingerprint.
    """
    if is_s3(output.path):
        s3.check_bucket(output.path)
        names = {path.split('/')[0] for path in output.sizes() if path}
    elif os.path.lexists(output.path) and not os.path.isdir(output.path):
        raise CommandError(f'output {output.path} exists and is no folder: name another')
    else:
        names = set(os.listdir(output.path)) if os.path.isdir(output.path) else set()
    visible = sorted(name for name in names if not name.startswith('.') and name != LOST_AND_FOUND)
    begun = output.recorded(BEGUN)
    if begun and 'with' not in begun:
        raise CommandError(
            f'{output.path} was made by an earlier version of this command: training reads it as it is; to verify it '
            'or go on with it, make it anew with the same command and another --output'
        )
    if visible and not begun:
        raise CommandError(
            f'output {output.path} holds {shown(visible[0])} and was not begun by this command: '
            'name an empty or a new folder'
        )
    changed = [
        key + (f' ({begun["with"].get(key)}, now {value})' if key.startswith('version') else '')
        for key, value in json.loads(json.dumps(fingerprint)).items()
        if begun and begun['with'].get(key) != value
    ]
    if changed and (visible or any(name.startswith('part.') for name in output.sizes(RECORDS))):
        raise CommandError(
            f'{output.path} was begun with another {" and ".join(changed)}: run with the same, or name another output'
        )
    return {} if changed else begun


@contextlib.contextmanager
def locked(path: str) -> Iterator[Output]:
    """Give the output at an address, with a folder for what is not whole yet; on a disk, hold its lock.

    On S3 there is no lock: two runs of one command write the same shards under the same names.

    Raises:
        CommandError: if another run holds the lock.
    """
    if is_s3(path):
        with tempfile.TemporaryDirectory(prefix='composer-tst-') as scratch:
            yield Output(path, scratch)
        return
    scratch = os.path.join(path, RECORDS, 'scratch')
    with explained('write', path):
        os.makedirs(os.path.dirname(scratch), exist_ok=True)
    lock = FileLock(os.path.join(path, RECORDS, 'lock'), timeout=GRACE)
    try:
        lock.acquire()
    except Timeout as error:
        raise CommandError(f'another run is writing to {path}: wait for its end, or name another output') from error
    except (OSError, NotImplementedError) as error:
        if getattr(error, 'errno', None) not in (None, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
            raise
        print(f'the disk of {shown(path)} has no locks: see to it that no second run writes there', file=sys.stderr)
    try:
        with explained('write', scratch):
            shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
            os.makedirs(scratch, exist_ok=True)
        yield Output(path, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        lock.release()


def _move(source: str, path: str) -> None:
    """Rename a file such that it survives a loss of power."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    for name, then in ((source, lambda: os.replace(source, path)), (os.path.dirname(path), lambda: None)):
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        then()
