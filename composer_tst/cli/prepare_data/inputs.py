"""The input files behind the addresses that the user gives, and what each of them is read as.

A format is known by a name. A file that links reach has several names: its own, and those of the links.
"""

import fnmatch
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data import s3
from composer_tst.cli.prepare_data.errors import shown
from composer_tst.cli.prepare_data.s3 import is_s3

FORMATS = {
    '.txt': 'text', '.parquet': 'parquet',
    **dict.fromkeys(['.jsonl', '.ndjson', '.json', '.jl', '.jsonlines', '.ldjson'], 'jsonl'),
}  # fmt: skip
NAMES = {'text': 'text', 'jsonl': 'JSON lines', 'parquet': 'Parquet'}
COMPRESSIONS = {'.gz': 'gzip', '.zst': 'zstd', '.zstd': 'zstd', '.bz2': 'bzip2', '.xz': 'xz'}
SCHEME = re.compile(r'[A-Za-z][A-Za-z0-9+.-]+:/')
MAGIC = re.compile(r'[*?[]')
# The stamp of a link that leads nowhere.
MISSING = 'missing'
ADVICE = (
    f'has no format in its name (known are {", ".join(FORMATS)}, each also with {", ".join(COMPRESSIONS)}): give it '
    'one, convert it to JSON lines or Parquet, or say with --format what such files are'
)


@dataclass(frozen=True)
class Source:
    """An input file: a stamp that changes when its content does, and what it is read as.

    `format` and `compression` are those of its name, empty if it says none.
    """

    path: str
    size: int
    stamp: str
    format: str = ''
    compression: str = ''


def parse_address(text: str) -> str:
    """Read an address as the user gives it: an absolute path, or `s3://BUCKET/KEY`, without a slash at its end.

    Raises:
        CommandError: if it is of a scheme other than `s3://`, or names no bucket.
    """
    if not text:
        raise CommandError('an empty address: name a file, a folder, or an s3:// address')
    if is_s3(text):
        bucket = text[5:].partition('/')[0]
        if not bucket or MAGIC.search(bucket):
            raise CommandError(f'{text} names no bucket: write s3://BUCKET/NAME')
        return text.removesuffix('/')
    if SCHEME.match(text.strip()):
        raise CommandError(f'{text}: only paths on this machine, without file:, and s3:// addresses are known here')
    return os.path.abspath(os.path.expanduser(text))


def kind_of(path: str) -> tuple[str, str]:
    """The format and the compression that a name says; empty where it says none."""
    stem, extension = os.path.splitext(os.path.basename(path).lower())
    compression = COMPRESSIONS.get(extension, '')
    return FORMATS.get(os.path.splitext(stem)[1] if compression else extension, ''), compression


def _why_hidden(name: str) -> str:
    """Why a name is left out where it is not asked for; empty if it is not. Spark's own rule, and hidden names."""
    if name.startswith('.'):
        return 'hidden'
    return 'that Spark leaves' if (name.startswith('_') and '=' not in name) or name.endswith('._COPYING_') else ''


def real_path(path: str) -> str:
    """The one name of what links reach under several."""
    return path if is_s3(path) else os.path.realpath(path)


class _Disk:
    """The files of this machine."""

    def kinds(self, path: str) -> list[bool]:
        """Whether what has this name is a folder; empty if there is nothing."""
        return [os.path.isdir(path)] if os.path.lexists(path) else []

    def entries(self, folder: str) -> Iterator[tuple[str, bool]]:
        """The names in a folder, and whether each is one."""
        for name in sorted(os.listdir(folder)):
            yield name, os.path.isdir(os.path.join(folder, name))

    def source(self, path: str) -> Source:
        if os.path.islink(path) and not os.path.exists(path):
            return Source(path, 0, MISSING)  # reading it reports it as a bad document
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise CommandError(f'cannot read {path}: it is a pipe or a device, not a file')
        return Source(path, found.st_size, str(found.st_mtime_ns))


class _Bucket:
    """The objects whose addresses begin as one does, as files and folders."""

    def __init__(self, path: str):
        self.found = s3.listing(MAGIC.split(path, maxsplit=1)[0])
        self.folders: dict[str, set[tuple[str, bool]]] = {}
        for each, (size, _) in self.found.items():
            below, is_folder = each, False
            while below.count('/') > 2 and not (each.endswith('/') and size == 0):  # how some tools mark a folder
                below, _, name = below.rpartition('/')
                self.folders.setdefault(below, set()).add((name, is_folder))
                is_folder = True

    def kinds(self, path: str) -> list[bool]:
        """One name may be that of an object and of a folder."""
        return [False] * (path in self.found) + [True] * (path in self.folders)

    def entries(self, folder: str) -> list[tuple[str, bool]]:
        return sorted(self.folders.get(folder, ()))

    def source(self, path: str) -> Source:
        return Source(path, *self.found[path])


class _Search:
    """The files of one address, by their paths, and whether each is named, by the user or by a pattern.

    Other files are in a folder that is. What is left out is kept with the reason.
    """

    def __init__(self, text: str, output: str):
        path, only_folders = parse_address(text), text.endswith('/')
        self.text = text
        self.place = _Bucket(path) if is_s3(path) else _Disk()
        self.output = output
        self.left_out: set[tuple[str, str]] = set()
        matches: Iterable[tuple[str, bool]] = [(path, is_folder) for is_folder in self.place.kinds(path)]
        if not matches:  # a name that exists comes before a pattern
            if not MAGIC.search(path):
                raise CommandError(f'no input: {text} is not there')
            root, parts = path, []
            while root.count('/') > 2 * is_s3(path) and True not in self.place.kinds(root):  # so does a folder
                root, _, part = root.rpartition('/')
                parts.insert(0, part)
            matches = list(self._match(root or '/', parts))
        folders = self._walk(*(below for below, is_folder in matches if is_folder))
        self.named = {below for below, is_folder in matches if not is_folder and not only_folders}
        paths = self.named.union(*(files for _, files in folders))
        self.sources = [self.place.source(each) for each in sorted(paths)]

    def why_nothing(self) -> str:
        """Why nothing is read."""
        if self.sources:
            return f'no file in {self.text} has a format in its name; {self.sources[0].path} {ADVICE}'
        if self.left_out:
            return f'{self.text} holds only what is left out, as {shown(min(self.left_out)[1])}'
        return f'{self.text} ' + ('matches no file' if MAGIC.search(self.text) else 'is empty')

    def _entries(self, folder: str, part: str = '*') -> Iterator[tuple[str, bool]]:
        """What of a folder matches a part of a pattern, but for what is left out. The output is no input."""
        for name, is_folder in self.place.entries(folder):
            below = f'/{name}' if folder == '/' else f'{folder}/{name}'
            if fnmatch.fnmatchcase(name, part):
                if (why := _why_hidden(name)) and not part.startswith(('.', '_')):
                    self.left_out.add((why, below))
                elif is_folder and real_path(below) == self.output:
                    self.left_out.add(('of the output', below))
                else:
                    yield below, is_folder

    def _walk(self, *folders: str) -> Iterator[tuple[str, list[str]]]:
        """Folders and all below them with their files, the higher first, each once whatever links reach it."""
        queue, searched = list(folders), set()
        for folder in queue:
            if (real := real_path(folder)) not in searched:
                searched.add(real)
                found = list(self._entries(folder))
                queue += [below for below, is_folder in found if is_folder]
                yield folder, [below for below, is_folder in found if not is_folder]

    def _match(self, folder: str, parts: list[str]) -> Iterator[tuple[str, bool]]:
        """What below a folder matches the parts of a pattern, of which `**` is any number of names."""
        part, *rest = parts
        if part == '**':
            for below, _ in self._walk(folder):
                yield from self._match(below, rest or ['*'])
        else:
            for below, is_folder in self._entries(folder, part):
                if not rest:
                    yield below, is_folder
                elif is_folder:
                    yield from self._match(below, rest)


def list_sources(inputs: list[str], output: str, form: str = '') -> tuple[list[Source], str]:
    """Find the files behind files, folders, patterns and S3 prefixes, sorted by path, each once, and say what they are.

    Args:
        inputs: what the user gave.
        output: the address of the output, which is never read.
        form: what files are read as that have no format in their names.

    Returns:
        tuple: The sources, and what is left out in words.

    Raises:
        CommandError: if an input has no file that can be read, or cannot be listed.
    """
    searches = [_Search(text, real_path(output)) for text in inputs]
    named, left_out = set[str](), set[tuple[str, str]]()
    files: dict[str, dict[str, Source]] = {}  # by the real path, and by each that was found
    for search in searches:
        named |= search.named
        left_out |= search.left_out
        for source in search.sources:
            files.setdefault(real_path(source.path), {})[source.path] = source
    read = {real: _read_as(paths, form) for real, paths in files.items()}
    for real, source in read.items():
        if not source.format:
            for path in sorted(named & files[real].keys()):
                raise CommandError(f'{path} {ADVICE}')
            left_out.add(('without a format in their names', source.path))
    for search in searches:
        if not any(read[real_path(source.path)].format for source in search.sources):
            raise CommandError(f'no input: {search.why_nothing()}')
    sources = sorted((source for source in read.values() if source.format), key=lambda source: source.path)
    counts = Counter(source.format for source in sources)
    line = ', '.join(f'{counts[each]:,} of {NAMES[each]}' for each in NAMES if counts[each])
    reasons = {why: sorted(path for each, path in left_out if each == why) for why in sorted(dict(left_out))}
    words = ', '.join(f'{len(paths):,} {why} (as {shown(paths[0])})' for why, paths in reasons.items())
    print(f'found files: {line}' + (f'; left out: {words}' if words else ''), file=sys.stderr)
    return sources, words


def _read_as(paths: dict[str, Source], form: str) -> Source:
    """Of several names of one file, those with a format count; of these the first, in the highest folder."""
    names = sorted(paths, key=lambda path: (path.count('/'), path))
    ways = [(path, kind_of(path)) for path in names]
    if not any(kind[0] for _, kind in ways):
        ways = [(path, kind_of(name)) for path in names for name in _links(paths[path])]
    known = [way for way in ways if way[1][0]] or ways[:1]
    for path, kind in known:
        if kind != known[0][1]:
            raise CommandError(f'{known[0][0]} and {path} are one file, which is not of both formats: rename one')
    path, (known_form, compression) = known[0]
    return replace(paths[path], format=known_form or form, compression=compression)


def _links(source: Source) -> Iterator[str]:
    """A path, and link by link the names that it leads to."""
    path = source.path
    yield path
    while not is_s3(path) and source.stamp != MISSING and os.path.islink(path):
        path = os.path.join(os.path.dirname(path), os.readlink(path))
        yield path
