"""What INPUT and --output may be: a path on disk or an `s3://` address, a name or a pattern of names."""

import fnmatch
import os
import re
from dataclasses import dataclass

from composer_tst.cli.main import CommandError

SCHEME = re.compile(r'[A-Za-z][A-Za-z0-9+.-]+:/')
MAGIC = re.compile(r'[*?[]')


@dataclass(frozen=True)
class Address:
    """A place on disk or in a bucket.

    Args:
        path: absolute, or with `s3://BUCKET/`; without a slash at its end, but for a root.
        folder: whether the user ended it with a slash, and so means a folder.
    """

    path: str
    folder: bool

    @property
    def is_s3(self) -> bool:
        """Whether it lies in a bucket."""
        return self.path.startswith('s3://')

    @property
    def is_pattern(self) -> bool:
        """Whether, if nothing has it for its name, it is a pattern of names."""
        return MAGIC.search(self.path) is not None

    def split_pattern(self) -> tuple[str, list[str]]:
        """The folder above the first part that is a pattern, and the parts from there on."""
        at = MAGIC.search(self.path)
        start = self.path.rindex('/', 0, at.start()) if at else len(self.path)
        return self.path[:start] or '/', self.path[start + 1 :].split('/')


def parse_address(text: str) -> Address:
    """Read an address as the user gives it.

    Raises:
        CommandError: if it is of a scheme other than `s3://`, or names no bucket.
    """
    if not text:
        raise CommandError('an empty address: name a file, a folder, or an s3:// address')
    folder = text.endswith('/')
    if text.startswith('s3://'):
        bucket, _, key = text[5:].partition('/')
        if text != text.encode(errors='replace').decode():
            raise CommandError(f'{text}: names on S3 are UTF-8, and this is none')
        if not bucket or MAGIC.search(bucket):
            raise CommandError(f'{text} names no bucket: write s3://BUCKET/NAME')
        return Address(f's3://{bucket}/{key[:-1] if folder and key else key}', folder or not key)
    if SCHEME.match(text.strip()):
        raise CommandError(f'{text}: only paths on this machine, without file:, and s3:// addresses are known here')
    return Address(os.path.abspath(text), folder)


class Pattern:
    """Matches paths below a folder, part by part; what lies in a folder that matches does so too.

    `*`, `?` and `[...]` match within a part, `**` any number of parts. Hidden names, which begin with a dot,
    are matched only by a part that begins with one.

    A state is the set of places in the pattern that may come next; walking folders with it shows
    which of them need not be searched at all.
    """

    def __init__(self, parts: list[str]):
        self.parts = parts

    def start(self) -> frozenset[int]:
        """The state at the folder itself."""
        return self._reach({0})

    def step(self, state: frozenset[int], name: str) -> frozenset[int]:
        """The state below `name`; empty if nothing there can match."""
        following = set()
        for at in state:
            part = self.parts[at] if at < len(self.parts) else '**'
            if part == '**':
                if not name.startswith('.'):
                    following.add(at)
            elif fnmatch.fnmatchcase(name, part) and (part.startswith('.') or not name.startswith('.')):
                following.add(at + 1)
        return self._reach(following)

    def accepts(self, state: frozenset[int]) -> bool:
        """Whether a file with this state is one of those meant."""
        return len(self.parts) in state

    def matches(self, path: str, state: frozenset[int] | None = None) -> bool:
        """Whether a whole path below the folder, or below one of that state, is one of those meant."""
        state = self.start() if state is None else state
        for name in path.split('/'):
            state = self.step(state, name)
        return self.accepts(state)

    def _reach(self, state: set[int]) -> frozenset[int]:
        for at in range(len(self.parts)):
            if at in state and self.parts[at] == '**':
                state.add(at + 1)
        return frozenset(state)
