"""The input files behind the addresses that the user gives, and what each of them is read as.

A format is known by a name. A file that links reach has several names: its own, and those of the links.
"""

import fnmatch
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterator
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
# As many links, one after another, as the system follows.
MOST_LINKS = 40
ADVICE = (
    f'has no format in its name (known are {", ".join(FORMATS)}, each also with {", ".join(COMPRESSIONS)}): give it '
    'one, convert it to JSON lines or Parquet, or say with --format what such files are'
)


@dataclass(frozen=True)
class Source:
    """An input file: a stamp that changes when its content does, and what it is read as.

    `format` and `compression` are those of its name, empty if it says none. `named` is whether the user named it, or a
    pattern did, rather than a folder that holds it.
    """

    path: str
    size: int
    stamp: str
    format: str = ''
    compression: str = ''
    named: bool = False


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
    stem, extension = os.path.splitext(os.path.basename(path))
    compression = COMPRESSIONS.get(extension.lower(), '')
    return FORMATS.get((os.path.splitext(stem)[1] if compression else extension).lower(), ''), compression


def _why_hidden(name: str) -> str:
    """Why a name is left out where it is not asked for; empty if it is not. Spark's own rule, and hidden names."""
    if name.startswith('.'):
        return 'hidden'
    return 'that Spark leaves' if (name.startswith('_') and '=' not in name) or name.endswith('._COPYING_') else ''


class _Disk:
    """The files of this machine."""

    def is_there(self, path: str) -> bool:
        return os.path.lexists(path)

    def real(self, path: str) -> str:
        """The one name of a folder that links reach under several."""
        return os.path.realpath(path)

    def is_file(self, path: str) -> bool:
        return os.path.lexists(path) and not os.path.isdir(path)

    def entries(self, folder: str) -> Iterator[tuple[str, bool]]:
        """The names in a folder, and whether each is one."""
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            yield name, os.path.isdir(os.path.join(folder, name))

    def source(self, path: str) -> Source:
        try:
            found = os.stat(path)
        except OSError:
            # A link to nowhere, or to itself: reading it reports it as a bad document.
            if not os.path.islink(path):
                raise
            return Source(path, 0, MISSING)
        if not stat.S_ISREG(found.st_mode):
            raise CommandError(f'cannot read {path}: it is a pipe or a device, not a file')
        return Source(path, found.st_size, str(found.st_mtime_ns))


class _Bucket:
    """The objects whose addresses begin with one, as files and folders."""

    def __init__(self, path: str):
        s3.check_bucket(path)
        self.found = s3.listing(path)
        if not self.is_there(path):
            self.found = s3.listing(MAGIC.split(path, maxsplit=1)[0])
        self.folders: dict[str, set[tuple[str, bool]]] = {}
        for each, (size, _) in self.found.items():
            below, is_folder = each, False
            while below.count('/') > 2 and not (each.endswith('/') and size == 0):  # how some tools mark a folder
                below, _, name = below.rpartition('/')
                self.folders.setdefault(below, set()).add((name, is_folder))
                is_folder = True

    def is_there(self, path: str) -> bool:
        return path in self.found or any(each.startswith(f'{path}/') for each in self.found)

    def real(self, path: str) -> str:
        return path

    def is_file(self, path: str) -> bool:
        return path in self.found

    def entries(self, folder: str) -> Iterator[tuple[str, bool]]:
        yield from sorted(self.folders.get(folder, ()))

    def source(self, path: str) -> Source:
        return Source(path, *self.found[path])


def _after(parts: list[str], places: frozenset[int], name: str, asked: bool = False) -> frozenset[int]:
    """Where in a pattern one may be after a name; at its end is what is below what matches.

    Args:
        parts: the pattern, of which `**` is any number of names.
        places: where one may be before the name.
        asked: whether a hidden name must be asked for, by a part that begins as it does.
    """
    after = set()
    for place in places:
        part = parts[place] if place < len(parts) else '**'
        if part == '**':
            after |= set() if asked else {place}
        elif fnmatch.fnmatchcase(name, part) and (not asked or part[0] in '._'):
            after.add(place + 1)
    return _or_further(parts, after)


def _or_further(parts: list[str], places: set[int]) -> frozenset[int]:
    """The places, and those behind a `**` there, which may be no name at all."""
    further = {place + 1 for place in places if place < len(parts) and parts[place] == '**'}
    return _or_further(parts, places | further) if further - places else frozenset(places)


def _search(text: str, output: str) -> tuple[list[Source], list[tuple[str, str]]]:
    """Find the files of one address, those in higher folders first; and what is left out, with the reason.

    Links are followed, but to no folder that was searched for the same. The output is no input.
    """
    path, only_folders = parse_address(text), text.endswith('/')
    place = _Bucket(path) if is_s3(path) else _Disk()
    root, parts = path, []
    if not place.is_there(path):
        if not (magic := MAGIC.search(path)):
            raise CommandError(f'no input: {text} ' + ('matches no file' if is_s3(path) else 'is not there'))
        root, _, _ = path[: magic.start()].rpartition('/')
        parts = path[len(root) + 1 :].split('/')
    end = len(parts)
    files, left_out = [], []
    if not parts and place.is_file(path) and not (only_folders and is_s3(path)):
        files.append(replace(place.source(path), named=True))
    root, places = '' if root == '/' else root, _or_further(parts, {0})
    queue, searched = [(root, places)], {(place.real(root or '/'), places)}
    for folder, places in queue:
        for name, is_folder in place.entries(folder or '/'):
            below, why = f'{folder}/{name}', _why_hidden(name)
            after = _after(parts, places, name, asked=bool(why))
            if why and not after and _after(parts, places, name):
                left_out.append((why, below))
            elif is_folder and after and (key := (place.real(below), after)) not in searched:
                searched.add(key)
                if key[0] == output:
                    left_out.append(('of the output', below))
                else:
                    queue.append((below, after))
            elif not is_folder and end in after and (end in places or not only_folders):
                named = not only_folders and end in _after(parts, places - {end}, name)
                files.append(replace(place.source(below), named=named))
    return files, left_out


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
    if not inputs:
        raise CommandError('no input: name at least one file, folder, pattern or s3:// address')
    output = output if is_s3(output) else os.path.realpath(output)
    searches = [_search(text, output) for text in inputs]
    files: dict[str, dict[str, Source]] = {}  # by the real path, and by each that was found
    for source in (source for found, _ in searches for source in found):
        real = source.path if is_s3(source.path) else os.path.realpath(source.path)
        paths = files.setdefault(real, {})
        paths[source.path] = max(source, paths.get(source.path, source), key=lambda each: each.named)
    left_out = {each for _, out in searches for each in out}
    sources, read = [], set()
    for paths in files.values():
        source = _read_as(paths)
        named = [each.path for each in paths.values() if each.named]
        if not (source.format or form) and named:
            raise CommandError(f'{named[0]} {ADVICE}')
        if source.format or form:
            sources.append(replace(source, format=source.format or form))
            read |= paths.keys()
        else:
            left_out.add(('without a format in their names', source.path))
    for text, (found, out) in zip(inputs, searches, strict=True):
        if not any(source.path in read for source in found):
            raise _nothing(text, found, out)
    counts = Counter(source.format for source in sources)
    line = ', '.join(f'{counts[each]:,} of {NAMES[each]}' for each in NAMES if counts[each])
    reasons = {why: sorted(path for each, path in left_out if each == why) for why in sorted(set(dict(left_out)))}
    words = ', '.join(f'{len(paths):,} {why} (as {shown(paths[0])})' for why, paths in reasons.items())
    print(f'found files: {line}' + (f'; left out: {words}' if words else ''), file=sys.stderr)
    return sorted(sources, key=lambda source: source.path), words


def _read_as(paths: dict[str, Source]) -> Source:
    """Of several names of one file, those with a format count; of these the first, in the highest folder."""
    sources = sorted(paths.values(), key=lambda source: (source.path.count('/'), source.path))
    known = [(source, kind_of(source.path)) for source in sources if kind_of(source.path)[0]]
    for source, kind in known:
        if kind != known[0][1]:
            raise CommandError(
                f'{known[0][0].path} and {source.path} are one file, which is not of both formats: rename one of them'
            )
    if not known:
        ways = [(source, kind_of(name)) for source in sources for name in _links(source.path)]
        known = [way for way in ways if way[1][0]] or ways
    source, (form, compression) = known[0]
    return replace(source, format=form, compression=compression)


def _links(path: str) -> Iterator[str]:
    """A path, and link by link the names that it leads to."""
    for _ in range(MOST_LINKS):
        yield path
        if is_s3(path) or not os.path.islink(path):
            return
        path = os.path.join(os.path.dirname(path), os.readlink(path))


def _nothing(text: str, found: list[Source], left_out: list[tuple[str, str]]) -> CommandError:
    """Why nothing is read of an input."""
    if found:
        return CommandError(f'no input: no file in {text} has a format in its name; {found[0].path} {ADVICE}')
    if left_out:
        return CommandError(f'no input: {text} holds only what is left out, as {shown(left_out[0][1])}')
    return CommandError(f'no input: {text} ' + ('matches no file' if MAGIC.search(text) else 'is empty'))
