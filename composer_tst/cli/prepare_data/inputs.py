"""The input files behind the addresses that the user gives, and what each of them is read as.

A format is known by a name. A file that links reach has several names: its own, and those of the links.
"""

import fnmatch
import os
import re
import stat
import sys
from dataclasses import dataclass

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.storage import explained, is_s3, s3, shown

FORMATS = {
    '.txt': 'text', '.parquet': 'parquet',
    **dict.fromkeys(['.jsonl', '.ndjson', '.json', '.jl', '.jsonlines', '.ldjson'], 'jsonl'),
}  # fmt: skip
NAMES = {'text': 'text', 'jsonl': 'JSON lines', 'parquet': 'Parquet'}
COMPRESSIONS = {'.gz': 'gzip', '.zst': 'zstd', '.zstd': 'zstd', '.bz2': 'bzip2', '.xz': 'xz'}
PACKED = ('.zip', '.tar', '.tgz', '.7z', '.rar', '.lz4', '.br', '.sz', '.snappy', '.lzma', '.lzo', '.z')
SCHEME = re.compile(r'[A-Za-z][A-Za-z0-9+.-]+:/')
MAGIC = re.compile(r'[*?[]')
# The stamp of a link that leads nowhere.
MISSING = 'missing'

Kind = tuple[str | None, str | None]  # format and compression


@dataclass(frozen=True)
class Address:
    """A place on disk, as an absolute path, or in a bucket, as `s3://BUCKET/KEY`.

    Args:
        path: without a slash at its end, but for a root.
        folder: whether the user ended it with a slash, and so means a folder.
    """

    path: str
    folder: bool


@dataclass(frozen=True)
class Source:
    """An input file: a stamp that changes when its content does, and what it is read as."""

    path: str
    size: int
    stamp: str
    format: str
    compression: str | None = None


def parse_address(text: str) -> Address:
    """Read an address as the user gives it.

    Raises:
        CommandError: if it is of a scheme other than `s3://`, or names no bucket.
    """
    if not text:
        raise CommandError('an empty address: name a file, a folder, or an s3:// address')
    folder = text.endswith('/')
    if is_s3(text):
        bucket, _, key = text[5:].partition('/')
        if text != text.encode(errors='replace').decode():
            raise CommandError(f'{text}: names on S3 are UTF-8, and this is none')
        if not bucket or MAGIC.search(bucket):
            raise CommandError(f'{text} names no bucket: write s3://BUCKET/NAME')
        return Address(f's3://{bucket}/{key[:-1] if folder and key else key}', folder or not key)
    if SCHEME.match(text.strip()):
        raise CommandError(f'{text}: only paths on this machine, without file:, and s3:// addresses are known here')
    return Address(os.path.abspath(os.path.expanduser(text)), folder)


def kind_of(path: str) -> Kind:
    """The format and the compression that a name says; None where it says none."""
    stem, extension = os.path.splitext(os.path.basename(path))
    compression = COMPRESSIONS.get(extension.lower())
    return FORMATS.get((os.path.splitext(stem)[1] if compression else extension).lower()), compression


def _why_hidden(name: str) -> str:
    """Why a name is left out where it is not asked for; empty if it is not. Spark's own rule, and hidden names."""
    if name.startswith('.'):
        return 'hidden'
    return 'that Spark leaves' if (name.startswith('_') and '=' not in name) or name.endswith('._COPYING_') else ''


def _left(parts: list[str], names: list[str], start: bool = False) -> int | None:
    """Match a path below a folder with the parts of a pattern, of which `**` is any number of names.

    Args:
        start: whether it is enough that the path begins one that matches.

    Returns:
        int | None: How many names are left below what matches, the fewest; None if nothing does. 0 is the file itself.
    """
    if not parts:
        return None if any(map(_why_hidden, names)) else len(names)
    if not names:
        return 0 if start or parts == ['**'] else None
    head, *rest = parts
    if head == '**':
        ways = [_left(rest, names, start), None if _why_hidden(names[0]) else _left(parts, names[1:], start)]
        return min((way for way in ways if way is not None), default=None)
    if not fnmatch.fnmatchcase(names[0], head) or (_why_hidden(names[0]) and head[0] not in '._'):
        return None
    return _left(rest, names[1:], start)


class _Search:
    """All files that were found, by path: (size, stamp, whether it was named itself or by a pattern)."""

    def __init__(self, output: Address, own_files: list[str]):
        self.own = [f'{os.path.realpath(output.path) if not is_s3(output.path) else output.path}/{name}'
                    for name in own_files]  # fmt: skip
        self.found: dict[str, tuple[int, str, bool]] = {}
        self.left_out: dict[str, list[str]] = {}

    def leave_out(self, why: str, path: str) -> None:
        """Count a file or a folder that is not read."""
        if path not in (paths := self.left_out.setdefault(why, [])):
            paths.append(path)

    def add(self, path: str, size: int, stamp: str, named: bool) -> None:
        """Note a file."""
        _, _, before = self.found.get(path, (0, '', False))
        self.found[path] = size, stamp, named or before

    def take(self, text: str) -> list[str]:
        """Find the files of one address; return their paths."""
        address = parse_address(text)
        before, self.found = self.found, {}
        (self._take_s3 if is_s3(address.path) else self._take_local)(address)
        taken, self.found = self.found, before
        for path, item in taken.items():
            self.add(path, *item)
        return list(taken)

    def _pattern(self, address: Address, is_folder: bool) -> tuple[str, list[str]]:
        """The folder to search and the parts of the pattern there: none for a folder, all of which is meant."""
        at = MAGIC.search(address.path)
        if is_folder or at is None:
            root, parts = address.path, []
        else:
            start = address.path.rindex('/', 0, at.start())
            root, parts = address.path[:start] or '/', address.path[start + 1 :].split('/')
        return root, parts

    def _check_output(self, folder: str, above: list[str], parts: list[str]) -> None:
        """Refuse an output whose files would be among the inputs of the next run, of those below a folder."""
        below = folder.rstrip('/') + '/'
        for path in self.own:
            if path.startswith(below) and _left(parts, [*above, *path[len(below) :].split('/')]) is not None:
                raise CommandError(
                    f'the output {os.path.dirname(self.own[0])} lies in the input {folder}, which would be read with '
                    'it: name another output'
                )

    def _take_local(self, address: Address) -> None:
        path = address.path
        if os.path.lexists(path) and not os.path.isdir(path):
            if address.folder:
                raise CommandError(f'{path}/ is a file, and the slash at its end asks for a folder')
            self._add_local(path, True)
            return
        is_folder = os.path.isdir(path)
        if not is_folder and not MAGIC.search(path):
            raise CommandError(f'cannot read {path}: it is not there')
        root, parts = self._pattern(address, is_folder)
        self._walk(root, parts, address.folder and not is_folder)

    def _walk(self, root: str, parts: list[str], folders: bool) -> None:
        """Search a folder, higher folders first, for what matches; or if `folders`, for what is in folders that match.

        Links are followed, but not to a folder that holds them, nor again to one all of which was searched.
        """
        real = os.path.realpath(root)
        seen = {real} if not parts else set()
        queue: list[tuple[str, list[str], frozenset[str]]] = [(root, [], frozenset([real]))]
        for folder, above, holders in queue:
            self._check_output(os.path.realpath(folder), above, parts)
            with explained('read', folder):
                # Without a word, what is in a folder that we may not read would be left out.
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name) if os.path.isdir(folder) else []
            for entry in entries:
                path = [*above, entry.name]
                left = _left(parts, path)
                if os.path.isdir(entry.path) and (left is not None or _left(parts, path, start=True) is not None):
                    real = os.path.realpath(entry.path)
                    if real not in holders and real not in seen:
                        queue.append((entry.path, path, holders | {real}))
                        if left is not None:
                            seen.add(real)
                elif left is not None and (left or not folders):
                    self._add_local(entry.path, bool(parts) and left == 0)
                elif (why := _why_hidden(entry.name)) and _left(
                    parts, [*above, 'x' + entry.name.strip('._')]
                ) is not None:
                    self.leave_out(why, entry.path)

    def _add_local(self, path: str, named: bool) -> None:
        with explained('read', path):
            try:
                found = os.stat(path)
            except OSError:
                # A link to nowhere, or to itself: reading it reports it as a bad document.
                if not os.path.islink(path):
                    raise
                self.add(path, 0, MISSING, named)
                return
        if not stat.S_ISREG(found.st_mode):
            raise CommandError(f'cannot read {path}: it is a pipe or a device, not a file')
        self.add(path, found.st_size, str(found.st_mtime_ns), named)

    def _take_s3(self, address: Address) -> None:
        s3().check_bucket(address.path)
        bucket = address.path[: address.path.index('/', 5)]
        folder = address.path.rstrip('/') + '/' if address.path != f'{bucket}/' else address.path
        found = s3().listing(folder)
        if not address.folder and (item := s3().head(address.path)):
            if found:
                print(
                    f'{address.path} is an object and a folder: only the object is read; for the folder, end it '
                    'with a slash',
                    file=sys.stderr,
                )
            size, stamp = item
            self.add(address.path, size, stamp, True)
            return
        root, parts = self._pattern(address, bool(found))
        self._check_output(root.rstrip('/'), [], parts)
        if not found and parts:
            # Up to the first wildcard: fewer objects to look through.
            found = s3().listing(MAGIC.split(address.path, maxsplit=1)[0])
        start = len(root.rstrip('/')) + 1
        for path, (size, stamp) in found.items():
            names = path[start:].split('/')
            if path.endswith('/') and size == 0:
                continue  # how some tools mark a folder
            left = _left(parts, names)
            if left is not None and (left or not address.folder or not parts):
                self.add(path, size, stamp, bool(parts) and left == 0)
            elif left is None:
                why = next(filter(None, map(_why_hidden, names)), '')
                plain = ['x' + name.strip('._') if _why_hidden(name) else name for name in names]
                if why and _left(parts, plain) is not None:
                    self.leave_out(why, path)


def list_sources(
    inputs: list[str], output: Address, own_files: list[str], form: str | None = None
) -> tuple[list[Source], str]:
    """Find the files behind files, folders, patterns and S3 prefixes, sorted by path, each once, and say what they are.

    Args:
        inputs: What the user gave.
        output: May not lie where it would be read with them.
        own_files: What it will have.
        form: What files are read as that have no format in their names.

    Returns:
        tuple: The sources, and what is left out in words.

    Raises:
        CommandError: if an input has no file that can be read, cannot be listed, or would hold the output too.
    """
    if not inputs:
        raise CommandError('no input: name at least one file, folder, pattern or s3:// address')
    search = _Search(output, own_files)
    of_input = {text: search.take(text) for text in inputs}
    ways: dict[str, list[str]] = {}
    for path in sorted(search.found, key=lambda path: (path.count('/'), path)):
        ways.setdefault(path if is_s3(path) else os.path.realpath(path), []).append(path)
    sources, read = [], set()
    for paths in ways.values():
        path, kind = _kind_of_all(paths)
        named = [each for each in paths if search.found[each][2]]
        size, stamp, _ = search.found[path]
        packed = path.lower().endswith(PACKED)
        if packed and (named or form or kind_of(os.path.splitext(path)[0])[0]):
            raise CommandError(f'{path} is packed in a way that is not read here: unpack it, or leave it out')
        if kind[0] is None and named and not form:
            raise CommandError(f'{named[0]} {_ADVICE}')
        if kind[0] or form:
            sources.append(Source(path, size, stamp, kind[0] or form or '', kind[1]))
            read |= set(paths)
        else:
            search.leave_out('without a format in their names', path)
    for text, paths in of_input.items():
        if not read & set(paths):
            _refuse_nothing(text, paths, search)
    counts = {each: sum(source.format == each for source in sources) for each in NAMES}
    line = ', '.join(f'{count:,} {plural(count, "file")} of {NAMES[each]}' for each, count in counts.items() if count)
    out = ', '.join(f'{len(paths):,} {why} (as {shown(paths[0])})' for why, paths in search.left_out.items())
    print(f'found: {line}' + (f'; left out: {out}' if out else ''), file=sys.stderr)
    return sorted(sources, key=lambda source: source.path), out


_ADVICE = (
    f'has no format in its name (known are {", ".join(FORMATS)}, each also with {", ".join(COMPRESSIONS)}): give it '
    'one, convert it to JSON lines or Parquet, or say with --format what such files are'
)


def _kind_of_all(paths: list[str]) -> tuple[str, Kind]:
    """Of several names of one file, those with a format count; of these the first, since paths are sorted."""
    kinds = {path: kind for path in paths if (kind := kind_of(path))[0]}
    for path in paths:
        for _ in range(40 if not is_s3(path) and not kinds else 0):  # as many links as the system follows
            if not os.path.islink(path):
                break
            path = os.path.join(os.path.dirname(path), os.readlink(path))
            if (kind := kind_of(path))[0]:
                return paths[0], kind
    if len(set(kinds.values())) > 1:
        one, other = sorted(kinds)[:2]
        raise CommandError(f'{one} and {other} are one file, which is not of both formats: rename one of them')
    return next(iter(kinds.items()), (paths[0], kind_of(paths[0])))


def _refuse_nothing(text: str, paths: list[str], search: _Search) -> None:
    if paths:
        raise CommandError(f'no input: no file in {text} has a format in its name; {paths[0]} {_ADVICE}')
    address = parse_address(text)
    if MAGIC.search(address.path) or is_s3(address.path):
        raise CommandError(f'no input: {text} matches no file')
    left = [path for paths in search.left_out.values() for path in paths if path.startswith(f'{address.path}/')]
    raise CommandError(
        f'no input: the folder {text} ' + (f'holds only what is left out, as {shown(left[0])}' if left else 'is empty')
    )


def plural(count: int, noun: str) -> str:
    """The noun for so many."""
    return noun if count == 1 else f'{noun}s'
