"""Where a data set goes, and the records of what of it is finished.

Everything is written in place, under its own name; the indexes, without which there is no data set, come
last. The folder `.records` says with what the output was begun, which parts are finished, and which files
are theirs. It stays when all is done, so that a data set can be verified and mended at any time. Nothing
is ever deleted.
"""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.disk import Disk
from composer_tst.cli.prepare_data.errors import shown
from composer_tst.cli.prepare_data.s3 import S3, THREADS
from composer_tst.cli.prepare_data.stores import store_of

RECORDS = '.records'
BEGUN = 'begun.json'
# What the making of a file system leaves in it.
LOST_AND_FOUND = 'lost+found'


@dataclass(frozen=True)
class Output:
    """An output, finished or under way.

    Args:
        path: its address.
        fingerprint: a digest of what decides the rows: records of another are none.
    """

    path: str
    fingerprint: str

    @property
    def store(self) -> Disk | S3:
        """The place where it is."""
        return store_of(self.path)

    def at(self, *names: str) -> str:
        """The address of something in it."""
        return '/'.join((self.path.rstrip('/'), *names))

    def create(self, data: bytes, *names: str) -> None:
        """Write a large file, which a record will name when it is complete."""
        self.store.create(self.at(*names), data)

    def publish(self, data: bytes, *names: str) -> None:
        """Write a file that is there whole or not at all."""
        self.store.publish(self.at(*names), data)

    def record(self, name: str, record: Any) -> None:
        """Write a record."""
        data = json.dumps({'sha256': self._seal(name, record), 'record': record}).encode()
        self.store.replace(self.at(RECORDS, name), data)

    def recorded(self, name: str) -> Any:
        """Read a record; None if there is none, or if it is damaged."""
        data = self.store.read(self.at(RECORDS, name))
        try:
            sealed = json.loads(data or b'')
            return sealed['record'] if sealed['sha256'] == self._seal(name, sealed['record']) else None
        except (ValueError, KeyError, TypeError):
            return None

    def _seal(self, name: str, record: Any) -> str:
        # What an output was begun with is compared word for word.
        of = [] if name == BEGUN else [self.fingerprint, name]
        return hashlib.sha256(json.dumps([*of, record], sort_keys=True).encode()).hexdigest()

    def part_records(self, parts: int, splits: Iterable[str]) -> dict[int, dict]:
        """The records of finished parts all of whose shards are there, by the number of the part."""
        there = set(self.store.sizes(self.at(RECORDS)))
        numbers = [number for number in range(parts) if part_name(number) in there]
        sizes = {split: self.store.sizes(self.at(split)) for split in splits}
        # Many at once: thousands of requests to S3, one after another, would take minutes.
        with ThreadPoolExecutor(THREADS) as pool:
            records = list(pool.map(lambda number: self.recorded(part_name(number)), numbers))
        return {
            number: record
            for number, record in zip(numbers, records, strict=True)
            if record is not None
            and all(
                sizes[split].get(file['name']) == file['bytes']
                for split, files in record['files'].items()
                for file in files
            )
        }


def part_name(number: int) -> str:
    """The name of the record of a part."""
    return f'part.{number:06}.json'


def check_output(output: Output, fingerprint: dict[str, Any]) -> bool:
    """Look whether an output is new or was begun with the same fingerprint; return whether it was begun.

    Args:
        output: is not written to.
        fingerprint: what decides the rows, by the words that a refusal uses for it.

    Raises:
        CommandError: if the output holds anything of others, or was begun with another fingerprint.
    """
    begun = output.recorded(BEGUN)
    if begun is None:
        for name in output.store.names(output.path):
            if not name.startswith('.') and name != LOST_AND_FOUND:
                raise CommandError(
                    f'output {output.path} holds {shown(name)} and was not begun by this command: '
                    'name an empty or a new folder'
                )
        return False
    fingerprint = json.loads(json.dumps(fingerprint))
    if begun != fingerprint:
        changed = [key for key in fingerprint if begun.get(key) != fingerprint[key]]
        raise CommandError(
            f'{output.path} was begun with another {" and ".join(changed)}: run with the same, or name another output'
        )
    return True
