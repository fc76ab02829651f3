"""Files on a disk."""

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.errors import explained
from composer_tst.cli.prepare_data.inputs import NOT_OURS, Input


class Disk:
    """Files on a disk."""

    def read(self, path: str) -> bytes | None:
        """A whole file, or None if there is none."""
        with explained('read', path):
            try:
                with open(path, 'rb') as file:
                    return file.read()
            except FileNotFoundError:
                return None

    def names(self, folder: str) -> Iterator[str]:
        """The names of what is in a folder."""
        return iter(self.sizes(folder))

    def sizes(self, folder: str) -> dict[str, int]:
        """The sizes of what is in a folder, by name."""
        with explained('read', folder):
            try:
                entries = list(os.scandir(folder))
            except FileNotFoundError:
                return {}
            sizes = {}
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                    sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
            return sizes

    def create(self, path: str, data: bytes) -> None:
        """Write a file in place.

        A run that is killed leaves the beginning of the file, and a power loss zeros after it. It is
        completed, for the same parts of the same inputs make the same bytes.

        Raises:
            CommandError: if something else is there.
        """
        with explained('write', path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            with open(descriptor, 'r+b') as file:
                size = os.fstat(descriptor).st_size
                if size:
                    found = file.read(len(data) + 1)
                    if size > len(data) or not data.startswith(found.rstrip(b'\0')):
                        raise CommandError(NOT_OURS.format(path))
                    if found == data:
                        return
                    file.seek(0)
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            _sync_folder(path)

    def publish(self, path: str, data: bytes) -> None:
        """Write a file that is there whole or not at all, or is the same already."""
        found = self.read(path)
        if found not in (None, data):
            raise CommandError(NOT_OURS.format(path))
        if found is None:
            self.create(new := _new_name(path), data)
            with explained('write', path):
                os.replace(new, path)
                _sync_folder(path)

    def replace(self, path: str, data: bytes) -> None:
        """Write a record, whole or not at all, in the place of an older or a damaged one."""
        with explained('write', path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            new = _new_name(path)
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
            with open(descriptor, 'wb') as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
            _sync_folder(path)

    def open(self, path: str, size: int, stamp: str) -> 'DiskInput':
        """Open an input that was listed with this size and stamp."""
        return DiskInput(path, size, stamp)


def _new_name(path: str) -> str:
    """What a file is called until it is whole: a run that is killed leaves one at most, and the next uses it."""
    return os.path.join(os.path.dirname(path), f'.{os.path.basename(path)}.new')


def _sync_folder(path: str) -> None:
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class DiskInput(Input):
    """An input on a disk."""

    def __init__(self, path: str, size: int, stamp: str):
        super().__init__(path, size, stamp)
        with explained('read', path):
            self.file = io.FileIO(path)
        self.check()

    def check(self) -> None:
        """Refuse an input that changed."""
        with explained('read', self.path):
            found = os.fstat(self.file.fileno())
        if (found.st_size, str(found.st_mtime_ns)) != (self.size, self.stamp):
            raise self.changed()

    def readinto(self, buffer: Any) -> int:
        """Read up to the buffer's size."""
        with explained('read', self.path):
            count = self.file.readinto(buffer)
        self.position += count
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a byte."""
        self.position = self.file.seek(offset, whence)
        return self.position

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            self.file.close()
        super().close()
