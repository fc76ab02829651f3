"""One run at a time in an output.

On a disk the system holds the lock, and lets go of it when the last process of the run is gone. On S3 it is
an object that its owner writes anew every few seconds: one that stays as it is belongs to a run that died.
Stores that know no conditions of a put let two runs that begin at one moment both in; they write the same
bytes, since nothing is ever deleted or replaced.
"""

import contextlib
import errno
import fcntl
import multiprocessing.context
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from multiprocessing.reduction import DupFd
from typing import Any

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.errors import FAILURES, explained, shown
from composer_tst.cli.prepare_data.inputs import NOT_OURS
from composer_tst.cli.prepare_data.output import RECORDS
from composer_tst.cli.prepare_data.s3 import S3

# How often the lock on S3 is renewed, and after how long without that its owner is dead, in seconds.
BEAT = 5.0
DEAD_AFTER = 20.0
# Workers of a run that was killed need a moment to see it.
GRACE = 3.0
# How the text of a lock begins.
OWNER = 'process '


@contextlib.contextmanager
def locked(path: str) -> Iterator['DiskLock | S3Lock']:
    """Hold the lock of an output.

    Raises:
        CommandError: if another run holds it.
    """
    lock = S3Lock(path) if path.startswith('s3://') else DiskLock(path)
    try:
        yield lock
    finally:
        lock.release()


def _refusal(path: str, owner: str) -> CommandError:
    return CommandError(f'another run is writing to {path} ({owner}): wait for its end, or name another output')


class DiskLock:
    """A lock that every process which holds this object shares."""

    def __init__(self, path: str):
        folder = os.path.join(path, RECORDS)
        with explained('write', path):
            os.makedirs(folder, exist_ok=True)
            self.descriptor = os.open(os.path.join(folder, 'lock'), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            found = os.pread(self.descriptor, len(OWNER), 0)
        if not OWNER.encode().startswith(found):
            os.close(self.descriptor)
            raise CommandError(NOT_OURS.format(os.path.join(folder, 'lock')))
        deadline = time.monotonic() + GRACE
        while True:
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
                    print(
                        f'the disk of {shown(path)} has no locks: see to it that no second run writes there',
                        file=sys.stderr,
                    )
                    return
                if time.monotonic() > deadline:
                    owner = os.pread(self.descriptor, 200, 0).decode(errors='replace')
                    os.close(self.descriptor)
                    raise _refusal(path, owner) from error
            time.sleep(0.05)
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f'{OWNER}{os.getpid()} on {socket.gethostname()}'.encode(), 0)

    def __getstate__(self) -> Any:
        # Only workers that are being started here can share it; those of Spark do without.
        starting = multiprocessing.context.get_spawning_popen() is not None
        return DupFd(self.descriptor) if starting else False

    def __setstate__(self, shared: Any) -> None:
        self.descriptor = shared.detach() if shared else -1

    def check(self) -> None:
        """The system sees to it."""

    def release(self) -> None:
        """Let go of the lock, whose file stays."""
        os.close(self.descriptor)


class S3Lock:
    """A lock that this process renews until it ends."""

    def __init__(self, path: str):
        self.path, self.store = path, S3()
        self.address = f'{path.rstrip("/")}/{RECORDS}/lock'
        self.owner = f'{OWNER}{os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:8]}'
        self.lost = False
        self.stamp = self._take()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._renew, daemon=True)
        self.thread.start()

    def __getstate__(self) -> Any:
        return {}

    def check(self) -> None:
        """Refuse to go on when another run took this one for dead.

        Raises:
            CommandError: if so.
        """
        if self.lost:
            raise CommandError(f'another run took over {self.path}, since this one did not answer for a while')

    def release(self) -> None:
        """Delete the lock, if it is still ours."""
        self.ended.set()
        self.thread.join()
        try:
            if not self.lost and self._owner() == self.owner:
                self.store.delete(self.address)
        except CommandError as error:
            # What was done is done: the next run waits until the lock is seen to be dead.
            print(f'the lock stays: {shown(str(error))}', file=sys.stderr)

    def _put(self, condition: dict[str, str]) -> str:
        # Another time each time, so that the stamp changes.
        return self.store.put(self.address, f'{self.owner}\n{time.time_ns()}'.encode(), condition)

    def _owner(self) -> str:
        return (self.store.read(self.address) or b'').decode(errors='replace').split('\n')[0]

    def _take(self) -> str:
        condition = {'If-None-Match': '*'}
        while True:
            with contextlib.suppress(FileExistsError):
                # Where the store does not look at conditions, one that is there must be seen.
                if condition == self._condition():
                    stamp = self._put(condition)
                    if self._owner() == self.owner:
                        return stamp
            condition = self._wait()

    def _condition(self) -> dict[str, str]:
        """What holds while the lock is as it is now."""
        with explained('read', self.address):
            try:
                return {'If-Match': self.store.head(self.address)[1]}
            except FileNotFoundError:
                return {'If-None-Match': '*'}

    def _wait(self) -> dict[str, str]:
        """Wait until the lock is free, or has not been renewed for so long that its owner is dead."""
        print(f'{self.path} is locked: waiting to see whether its owner lives', file=sys.stderr)
        deadline, first = time.monotonic() + DEAD_AFTER, self._condition()
        while time.monotonic() < deadline and 'If-Match' in first:
            time.sleep(min(1.0, BEAT / 2))
            now = self._condition()
            if now != first:
                if 'If-Match' in now:
                    raise _refusal(self.path, self._owner())
                return now
        return first

    def _renew(self) -> None:
        while not self.ended.wait(BEAT):
            try:
                with contextlib.suppress(FileExistsError):
                    self.stamp = self._put({'If-Match': self.stamp})
                    continue
                # Taken over; or our own put, tried again since its answer was lost.
                self.lost = self._owner() != self.owner
                if self.lost:
                    return
                self.stamp = self.store.head(self.address)[1]
            except (CommandError, *FAILURES) as error:
                print(f'the lock was not renewed: {shown(str(error))}', file=sys.stderr)
