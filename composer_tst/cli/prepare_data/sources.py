"""The input files behind the addresses that the user gives."""

import contextlib
import os
import re
import stat
import sys
from dataclasses import dataclass

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.address import Address, Pattern, parse_address
from composer_tst.cli.prepare_data.errors import explained, shown
from composer_tst.cli.prepare_data.s3 import S3, client

JSONL_EXTENSIONS = ('.jsonl', '.ndjson', '.json')
COMPRESSIONS = {'.gz': 'gzip', '.zst': 'zstd', '.zstd': 'zstd', '.bz2': 'bzip2', '.xz': 'xz'}
PACKED = ('.zip', '.tar', '.tgz', '.7z', '.rar', '.lz4', '.br', '.sz', '.snappy', '.lzma', '.lzo', '.z')
# What Spark and its kind leave beside their files.
MARKER = re.compile(r'_SUCCESS|_(common_)?metadata|_(started|committed)_\d+')
# The stamp of a link that leads nowhere.
MISSING = 'missing'


@dataclass(frozen=True)
class Source:
    """One input file: its path, its size in bytes, and a stamp that changes when its content does."""

    path: str
    size: int
    stamp: str

    @property
    def compression(self) -> str | None:
        """The compression of the whole file, by its extension."""
        return COMPRESSIONS.get(os.path.splitext(self.path)[1].lower())

    @property
    def format(self) -> str:
        """`text`, `jsonl` or `parquet`, by the extension before that of the compression."""
        stem = os.path.splitext(self.path)[0] if self.compression else self.path
        extension = os.path.splitext(stem)[1].lower()
        if extension == '.parquet':
            return 'parquet'
        return 'jsonl' if extension in JSONL_EXTENSIONS else 'text'


def list_sources(inputs: list[str], output: Address, own_files: list[str]) -> list[Source]:
    """Find the files behind files, folders, patterns and S3 prefixes, sorted by path, each once.

    Args:
        inputs: what the user gave.
        output: may not lie where it would be read with them.
        own_files: what it will have.

    Where a folder or a pattern is searched, hidden files and folders and the markers of Spark are left out.

    Raises:
        CommandError: if an input matches nothing, cannot be listed, is packed in an unknown way, or would
            hold the output too.
    """
    if not inputs:
        raise CommandError('no input: name at least one file, folder, pattern or s3:// address')
    listing = _Listing(output, own_files)
    for text in inputs:
        before = listing.count
        address = parse_address(text)
        with explained('read', text):
            (listing.add_s3 if address.is_s3 else listing.add_local)(address)
        if listing.count == before:
            raise CommandError(f'no input: {text} matches no file')
    if listing.left_out:
        print(f'left out: {listing.left_out:,} hidden files and markers, as {shown(listing.example)}', file=sys.stderr)
    unique: dict[str, Source] = {}
    # A file reached by several ways, as through links, is read once, and named by the shortest of them.
    for path in sorted(listing.sources, key=lambda path: (path.count('/'), path)):
        real = path if path.startswith('s3://') else os.path.realpath(path)
        unique.setdefault(real, listing.sources[path])
    sources = sorted(unique.values(), key=lambda source: source.path)
    for source in sources:
        if source.path.lower().endswith(PACKED):
            raise CommandError(f'{source.path} is packed in a way that is not read here: unpack it, or leave it out')
    return sources


class _Listing:
    def __init__(self, output: Address, own_files: list[str]):
        self.output, self.own_files = output, own_files
        self.place = output.path if output.is_s3 else os.path.realpath(output.path)
        self.sources: dict[str, Source] = {}
        self.count = 0
        self.left_out, self.example = 0, ''

    def _found(self, source: Source) -> None:
        self.count += 1
        self.sources[source.path] = source

    def _leave_out(self, path: str) -> None:
        self.left_out, self.example = self.left_out + 1, self.example or path

    def _check_output(self, folder: str, pattern: Pattern, state: frozenset[int]) -> None:
        """Refuse an output whose files would be among the inputs of the next run: of what is below a folder."""
        below = folder.rstrip('/') + '/'
        for name in self.own_files:
            path = f'{self.place.rstrip("/")}/{name}'
            if path.startswith(below) and pattern.matches(path[len(below) :], state):
                raise CommandError(
                    f'the output {self.output.path} lies in the input {folder}, which would be read with it: '
                    'name another output'
                )

    def add_local(self, address: Address) -> None:
        if address.path != '/' and os.path.lexists(address.path) and not os.path.isdir(address.path):
            if address.folder:
                raise CommandError(f'{address.path}/ is a file, and the slash at its end asks for a folder')
            self._add_file(address.path)
            return
        if os.path.isdir(address.path):
            root, pattern = address.path, Pattern(['**'])
        elif address.is_pattern:
            root, parts = address.split_pattern()
            pattern = Pattern([*parts, '**', '*'] if address.folder else parts)
        else:
            raise FileNotFoundError(address.path)
        # A folder is searched once in each state, so that links in a circle come to an end; those higher up first.
        seen = set()
        folders = [(root, pattern.start())]
        for folder, state in folders:
            real = os.path.realpath(folder)
            if (real, state) in seen:
                continue
            seen.add((real, state))
            self._check_output(real, pattern, state)
            # Without a word, what is in a folder that we may not read would be left out.
            with explained('read', folder):
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            for entry in entries:
                below = pattern.step(state, entry.name)
                is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
                if is_folder and below:
                    folders.append((entry.path, below))
                elif not is_folder and pattern.accepts(below) and not MARKER.fullmatch(entry.name):
                    self._add_file(entry.path)
                elif pattern.step(state, _unhidden(entry.name)):
                    self._leave_out(entry.path)

    def _add_file(self, path: str) -> None:
        size, stamp = 0, MISSING
        try:
            found = os.stat(path)
        except OSError:
            # A link to nowhere, or to itself: reading it reports it as a bad document.
            if not os.path.islink(path):
                raise
        else:
            if not stat.S_ISREG(found.st_mode):
                raise CommandError(f'cannot read {path}: it is a pipe or a device, not a file')
            size, stamp = found.st_size, str(found.st_mtime_ns)
        self._found(Source(path, size, stamp))

    def add_s3(self, address: Address) -> None:
        check_bucket(address)
        store, key = S3(), address.path.split('/', 3)[3]
        if key and not address.folder:
            with contextlib.suppress(FileNotFoundError):
                self._found(Source(address.path, *store.head(address.path)))
        root, pattern = address.path, Pattern(['**'])
        below = f'{root}/' if key else root
        some = next(store.list(below), None)
        if address.path in self.sources:
            if some:
                print(
                    f'{address.path} is an object and a folder: only the object is read; for the folder, end it '
                    'with a slash',
                    file=sys.stderr,
                )
            return
        if not some and address.is_pattern:
            root, parts = address.split_pattern()
            pattern = Pattern([*parts, '**', '*'] if address.folder else parts)
            # Up to the first wildcard: fewer objects to look through.
            below = re.split(r'[*?[]', address.path, maxsplit=1)[0]
        root = root.rstrip('/')
        self._check_output(root, pattern, pattern.start())
        for item in store.list(below):
            path = f'{address.path[: address.path.index("/", 5)]}/{item["Key"]}'
            name = path[len(root) + 1 :]
            if path.endswith('/') and item['Size'] == 0:
                continue  # how some tools mark a folder
            if pattern.matches(name) and not MARKER.fullmatch(name.rpartition('/')[2]):
                self._found(Source(path, item['Size'], item['ETag']))
            elif pattern.matches('/'.join(map(_unhidden, name.split('/')))):
                self._leave_out(path)


def _unhidden(name: str) -> str:
    return name.lstrip('.') or '_'


def check_bucket(address: Address) -> None:
    """Make sure that the bucket of an S3 address is there and that we may use it.

    Raises:
        CommandError: in so many words; a listing of a bucket that is not there may be merely empty.
    """
    bucket = address.path.split('/')[2]
    with explained('use', address.path):
        try:
            client().head_bucket(Bucket=bucket)
        except Exception as error:
            if getattr(error, 'response', {}).get('ResponseMetadata', {}).get('HTTPStatusCode') == 404:
                raise CommandError(f'cannot use {address.path}: there is no bucket {bucket}') from error
            raise
