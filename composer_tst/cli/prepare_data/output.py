"""Where a data set goes, and the records of what of it is finished.

The folder `.records` says with what the output was begun and which parts are finished, with their files. It stays when
all is done, so that a data set can be verified and mended at any time. What is written on a disk is written there
first, in `scratch`, and brought to its place when it is whole; the index of a split, without which there is no data
set, comes last. Nothing but records is replaced, and nothing outside `scratch` deleted.
"""

import contextlib
import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from filelock import FileLock, Timeout

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data import s3
from composer_tst.cli.prepare_data.errors import naming, reason, shown
from composer_tst.cli.prepare_data.s3 import is_s3
from composer_tst.cli.progress_bar import progress

RECORDS = '.records'
BEGUN = 'begun.json'
# Changes whenever the same arguments would make other rows or records than before, and is kept as:
FORMAT = 7
VERSION = 'version of this program'
# What the making of a file system leaves in it.
LOST_AND_FOUND = 'lost+found'
# How many files are read at once.
THREADS = 32
# How long a run that is being stopped may take to let the output go, in seconds.
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
        with naming(path):
            new = os.path.join(self.scratch, uuid.uuid4().hex)
            with open(new, 'wb') as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
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
        found = {f'{split}/{path}': size for split in splits for path, size in self.sizes(split).items()}
        # Many at once: thousands of requests to S3, one after another, would take minutes.
        with ThreadPoolExecutor(THREADS) as pool:
            records = pool.map(lambda number: self.recorded(part_record(number)), numbers)
        return {
            number: record
            for number, record in zip(numbers, records, strict=True)
            if record.get('part') == number
            and all(found.get(path) == size for path, (size, _) in _files_of(record).items())
        }

    def verify(self, records: list[dict]) -> None:
        """Read every file back and compare it with its record.

        Raises:
            CommandError: at the first file that is missing, damaged, or holds something else.
        """
        files = {path: file for record in records for path, file in _files_of(record).items()}
        total = sum(size for size, _ in files.values())
        with progress(total, 'bytes', 'verify', delay=5, unit_scale=True) as bar, ThreadPoolExecutor() as pool:
            digests = pool.map(lambda path: sha256(self.read(path) or b'').hexdigest(), files)
            for (path, (size, digest)), found in zip(files.items(), digests, strict=True):
                if found != digest:
                    advice = 'move it away, and the same command makes it anew'
                    raise CommandError(f'verify: {self.at(path)} is gone or does not hold what was written: {advice}')
                bar.update(size)


def part_folder(number: int) -> str:
    """The name of the folder of a part, in that of its split."""
    return f'{number:05}'


def part_record(number: int) -> str:
    """The name of the record of a part."""
    return f'part.{number:05}.json'


def _files_of(record: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """The size and the digest of each file of a part, by its path in the output."""
    return {
        f'{split}/{part_folder(record["part"])}/{name}': file
        for split, made in record['splits'].items()
        for name, file in made['files'].items()
    }


def begun_with(output: Output, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Look whether an output was begun by the same command; return what that recorded, empty if it is new.

    One that was only begun, without a shard, is as new.

    Args:
        output: is not written to.
        fingerprint: what decides the rows, by the words that a refusal uses for it.

    Raises:
        CommandError: if the output holds anything of others, or was begun with another fingerprint.
    """
    if is_s3(output.path):
        names = {path.split('/')[0] for path in output.sizes() if path}
    else:
        names = set(os.listdir(output.path)) if os.path.lexists(output.path) else set()
    visible = sorted(name for name in names if not name.startswith('.') and name != LOST_AND_FOUND)
    begun = output.recorded(BEGUN)
    if visible and not begun:
        raise CommandError(
            f'output {output.path} holds {shown(visible[0])} and was not begun by this command: '
            'name an empty or a new folder'
        )
    before = begun.get('with', {VERSION: 'earlier'})
    changed = [
        key + (f' ({before.get(key)}, now {value})' if key.startswith('version') else '')
        for key, value in json.loads(json.dumps(fingerprint)).items()
        if begun and before.get(key) != value
    ]
    if changed and visible:
        # What another version recorded cannot be compared.
        another = ' and '.join(changed if before.get(VERSION) == FORMAT else changed[:1])
        raise CommandError(
            f'{output.path} was begun with another {another}: run with the same, or make it anew with another --output'
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
    os.makedirs(os.path.dirname(scratch), exist_ok=True)
    lock = FileLock(os.path.join(path, RECORDS, 'lock'), timeout=GRACE)
    try:
        lock.acquire()
    except Timeout as error:
        raise CommandError(f'another run is writing to {path}: wait for its end, or name another output') from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, PermissionError):
            raise
        no_lock = f'there is no lock on {shown(path)} ({reason(error)})'
        print(f'{no_lock}: see to it that no second run writes there', file=sys.stderr)
    try:
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
        os.makedirs(scratch, exist_ok=True)
        yield Output(path, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        lock.release()


def _move(source: str, path: str) -> None:
    """Rename a file such that it survives a loss of power."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.replace(source, path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
