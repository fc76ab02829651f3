"""Where shards go, what of them is finished, and when they become visible.

On disk everything is written to a hidden folder beside the output and renamed at the end; on S3, where
nothing can be renamed, it is written in place and the indexes, without which there is no data set, come
last. In both, the folder `.parts` holds what a restart needs and is deleted at the end.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from .documents import Source
from .errors import PrepareError, explained
from .storage import check_bucket, filesystem, is_s3

STATE = '.parts'


@dataclass(frozen=True)
class Output:
    """An output under way.

    Args:
        path: what the user named.
        root: where files are until all are there.
    """

    path: str
    root: str

    def at(self, *names: str) -> str:
        """The address of something under the root."""
        return '/'.join((self.root, *names))

    def exists(self, *names: str) -> bool:
        """Whether there is a file or folder of that name."""
        return filesystem(self.root).exists(self.at(*names))

    def read(self, *names: str) -> bytes:
        """Read a whole file."""
        path = self.at(*names)
        with explained('read', path):
            return filesystem(self.root).cat_file(path)

    def write(self, data: bytes, *names: str) -> None:
        """Write a file so that it is there whole or not at all."""
        path = self.at(*names)
        with explained('write', path):
            if is_s3(path):
                filesystem(path).pipe_file(path, data)
                return
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), prefix='.', delete=False) as file:
                file.write(data)
            os.replace(file.name, path)

    def take(self, local: str, *names: str) -> None:
        """Move a local file to its place."""
        path = self.at(*names)
        with explained('write', path):
            if is_s3(path):
                filesystem(path).put_file(local, path)
                os.remove(local)
            else:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                os.replace(local, path)

    @contextmanager
    def scratch(self) -> Iterator[str]:
        """A local folder to write in, on the output's own disk where it is one."""
        with explained('write', self.path):
            parent = None
            if not is_s3(self.root):
                parent = self.at(STATE)
                os.makedirs(parent, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=parent) as folder:
                yield folder

    def read_state(self) -> dict[str, bytes]:
        """Read the files of the state folder, by name."""
        fs = filesystem(self.root)
        folder = self.at(STATE)
        with explained('read', folder):
            paths = [path for path in fs.find(folder, maxdepth=1) if path.endswith('.json')]
            # Many at once: thousands of requests to S3, one after another, would take minutes.
            with ThreadPoolExecutor(32) as pool:
                return dict(zip(map(os.path.basename, paths), pool.map(fs.cat_file, paths), strict=True))

    def publish(self) -> None:
        """Make the data set visible under the user's name and delete the state."""
        with explained('write', self.path):
            if not is_s3(self.path) and self.root != self.path:
                os.replace(self.root, self.path)
            state = f'{self.path}/{STATE}'
            filesystem(self.path).rm(state, recursive=True)


def open_output(path: str, arguments: dict, sources: Sequence[Source]) -> Output:
    """Start an output, or go on with one that the same arguments started.

    What was started from inputs that have since changed is thrown away.

    Raises:
        PrepareError: if the output exists, or other arguments started it.
    """
    path = path.rstrip('/') if is_s3(path) else os.path.abspath(path)
    listing = hashlib.sha256(json.dumps([(s.path, s.size, s.stamp) for s in sources]).encode()).hexdigest()
    started = {'arguments': arguments, 'inputs': listing}
    with explained('write', path):
        output = _under_way(path)
        if output is None:
            root = path if is_s3(path) else _staging(path)
            output = Output(path, root)
        else:
            before = json.loads(output.read(STATE, 'arguments.json'))
            changed = sorted(key for key in arguments if arguments[key] != before['arguments'].get(key))
            if changed:
                raise PrepareError(
                    f'{path} was begun with another {" and ".join(changed)}: '
                    f'run with the same arguments, or remove {output.root} first'
                )
            if before['inputs'] == listing:
                return output
            print(f'the input has changed since {path} was begun: starting anew', file=sys.stderr)
            filesystem(output.root).rm(output.root, recursive=True)
        output.write(json.dumps(started).encode(), STATE, 'arguments.json')
    return output


def _staging(path: str) -> str:
    return os.path.join(os.path.dirname(path), f'.{os.path.basename(path)}.partial')


def _under_way(path: str) -> Output | None:
    """Find an unfinished output, which may have been interrupted right after its renaming."""
    fs = filesystem(path)
    if is_s3(path):
        check_bucket(path)
    for root in [path] if is_s3(path) else [path, _staging(path)]:
        if fs.exists(f'{root}/{STATE}/arguments.json'):
            return Output(path, root)
    if fs.exists(path) and (not fs.isdir(path) or fs.ls(path)):
        raise PrepareError(f'output {path} exists: remove it or name another')
    if not is_s3(path):
        # Left by a run that was killed before it wrote down its arguments.
        shutil.rmtree(_staging(path), ignore_errors=True)
    return None
