"""Inputs as streams of bytes whose failures are sentences, wherever they are."""

import io

from composer_tst.cli.prepare_data.errors import ChangedError

# What is said of a file that is in the way; both kinds of store refuse it alike.
NOT_OURS = '{} is there already and is not what this run writes: move it away, and the same command goes on from here'


class Input(io.RawIOBase):
    """An input as a stream of bytes, each of whose failures is a sentence, and never taken for damaged data."""

    def __init__(self, path: str, size: int, stamp: str):
        self.path, self.size, self.stamp = path, size, stamp
        # The byte that is read next.
        self.position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def check(self) -> None:
        """Refuse an input that changed while it was read."""

    def changed(self) -> ChangedError:
        """What is raised when the input is no longer what was listed."""
        return ChangedError(
            f'{self.path} changed after it was listed: give it time to be complete, then name another output, '
            'since this one was begun with the file as it was'
        )
