"""What `fuzz_prepare_data.py` feeds: files whose documents are known because they were made of them."""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from common.preparing import Bucket, Folder, make_text, save_tokenizer
from composer_tst.cli.prepare_data import tokenizer as tokenizers_of
from composer_tst.cli.prepare_data.errors import shown

EOS = '</s>'
SPELLED = ['</s>', '<|endoftext|>', '<pad>', '<unk>', '[UNK]', '<|padding|>']
PHRASES = [*SPELLED, 'the', 'end', ' ', '\n', 'naïve 東京', '🙂', '\r\n', 'x' * 50]
TEXTS = st.one_of(
    st.integers(0, 10_000).map(lambda number: make_text(number, number % 40)),
    st.lists(st.sampled_from(PHRASES), min_size=1).map(' '.join),
    st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0\ufeff'), min_size=1, max_size=60),
    st.integers(100, 200).map(lambda number: make_text(number, 400)),
)
FILE_NAMES = st.sampled_from(
    ['a', 'b', 'c', 'a[1]', 'a1', 'w?', 'st*r', 'sp ace', 'h#sh', 'per%20', 'v?versionId=1', 'é', 'sub/x', 'sub/y',
     'sub/z[0]/q', '__init__', '_x', '-dash', 'new\nline', "quo'te\"", 'caf\udce9', 'UPPER']
)  # fmt: skip
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    '': bytes,
    '.gz': gzip.compress,
    '.GZ': lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:]),
    '.zst': zstandard.compress,
    '.bz2': bz2.compress,
    '.xz': lzma.compress,
}


@dataclass
class Expected:
    """Texts in the order of reading, and where bad documents are."""

    texts: list[str] = field(default_factory=list)
    bad: list[list[str]] = field(default_factory=list)  # of each what a sentence may say of its place


@dataclass(frozen=True)
class File:
    """A file: its name, its bytes, and what reading finds: texts, or what the place of a bad document ends in.

    A bad line is named by its number, or by the byte at which it begins.
    """

    name: str
    data: bytes
    found: list[tuple[str, Any]]


@st.composite
def text_files(draw: Any, name: str) -> File:
    kind = draw(st.sampled_from(['good'] * 5 + ['mark', 'latin', 'utf-16', 'empty', 'cut']))
    text = draw(TEXTS)
    data, found = text.encode(), [('text', text)]
    if kind == 'mark':
        data = codecs.BOM_UTF8 + data
    elif kind == 'latin':
        data, found = data + b'caf\xe9', [('bad', '')]
    elif kind == 'utf-16':
        data, found = ('ascii ' + text).encode('utf-16-le'), [('bad', '')]
    elif kind == 'empty':
        data, found = b'', [('bad', '')]
    packing = draw(st.sampled_from(sorted(PACKERS)))
    packed = PACKERS[packing](data)
    if kind == 'cut' and packing:
        packed, found = packed[:-1], [('bad', '')]
    return File(f'{name}.txt{packing}', packed, found)


BAD_LINES = [
    b'oops', b'{"text": "x"', b'["text"]', b'{"body": "x"}', b'{"text": null}', b'{"text": 3}', b'{"text": ""}',
    b'{"text": "\\ud800"}', b'{"text": "caf\xe9"}', b'{', b'"text"', b'{"text": ["x"]}',
]  # fmt: skip


@st.composite
def jsonl_files(draw: Any, name: str) -> File:
    lines, found = [], []
    for number in range(1, draw(st.integers(0, 12)) + 1):
        kind = draw(st.sampled_from(['good'] * 6 + ['bad', 'blank']))
        if kind == 'good':
            text = draw(TEXTS)
            record = {'id': number, 'text': text}
            line = json.dumps(record, ensure_ascii=draw(st.booleans())).encode()
            if draw(st.booleans()):
                line = line.replace(b'"id": ', b'"id": ' + b'9' * draw(st.sampled_from([1, 5000])), 1)
            found.append(('text', text))
        elif kind == 'bad':
            line = draw(st.sampled_from(BAD_LINES))
            found.append(('bad', number))
        else:
            line = draw(st.sampled_from([b'', b'  ', b'\t']))
        lines.append(line)
    newline = draw(st.sampled_from([b'\n', b'\r\n']))
    data = newline.join(lines) + (newline if draw(st.booleans()) and lines else b'')
    if draw(st.integers(0, 5)) == 0 and lines and lines[0].strip():
        data = codecs.BOM_UTF8 + data
    starts = [0, *(match.end() for match in re.finditer(b'\n', data))]
    for at, (kind, number) in enumerate(found):
        if kind == 'bad':
            found[at] = kind, [f', line {number}', f', the line that begins at byte {starts[number - 1]}']
    packing = draw(st.sampled_from(sorted(PACKERS)))
    packed = PACKERS[packing](data)
    return File(
        f'{name}{draw(st.sampled_from([".jsonl", ".json", ".ndjson", ".JSONL", ".jl"]))}{packing}', packed, found
    )


@st.composite
def parquet_files(draw: Any, name: str) -> File:
    cells: list[str | None] = draw(st.lists(st.one_of(TEXTS, TEXTS, TEXTS, st.sampled_from([None, ''])), max_size=15))
    found = [('text', cell) if cell else ('bad', f', row {at}') for at, cell in enumerate(cells, 1)]
    kind = draw(st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]))
    buffer = io.BytesIO()
    table = pa.table({'id': range(len(cells)), 'text': pa.array(cells, pa.string()).cast(kind)})
    pq.write_table(
        table, buffer, row_group_size=draw(st.integers(1, 6)),
        compression=draw(st.sampled_from(['none', 'zstd', 'snappy'])),
        write_page_checksum=draw(st.booleans()),
    )  # fmt: skip
    data = buffer.getvalue()
    if draw(st.integers(0, 9)) == 0:
        data, found = data[:-3], [('bad', '')]
    packing = draw(st.sampled_from(['', '', '', '.gz', '.zst']))
    return File(f'{name}.parquet{packing}', PACKERS[packing](data), found)


@dataclass
class Corpus:
    """Files, and links to some of them: (name, target), the target None for one that leads nowhere.

    `form` is what files without a format are read as; `kind` is how all of it is named.
    """

    files: list[File]
    links: list[tuple[str, str | None]]
    circle: bool
    form: str | None
    kind: str

    def write(self, place: Folder | Bucket) -> dict[str, int]:
        """Write everything; give the times of files on disk."""
        times = {}
        for file in self._of(place):
            place.put(file.name, file.data)
        for name in ('.hidden/x.txt', 'sub/_SUCCESS', 'sub/_temporary/0/x.json', 'sub/y.txt._COPYING_'):
            place.put(name, b'left out')
        if isinstance(place, Folder):
            for name, target in self.links:
                os.symlink(os.path.join(place.root, target) if target else 'nowhere', os.path.join(place.root, name))
            if self.circle:
                os.symlink('.', os.path.join(place.root, 'circle'))
            times = {file.name: os.stat(os.path.join(place.root, file.name)).st_mtime_ns for file in self._of(place)}
        return times

    def write_again(self, place: Folder | Bucket, times: dict[str, int]) -> None:
        """Undo a change: the bytes and the time of the first file."""
        file = self._first(place)
        place.put(file.name, file.data)
        if isinstance(place, Folder):
            os.utime(os.path.join(place.root, file.name), ns=(times[file.name], times[file.name]))

    @contextlib.contextmanager
    def changed(self, place: Folder | Bucket) -> Iterator[None]:
        """Append to the first file that is read."""
        file = self._first(place)
        place.put(file.name, file.data + b'x')
        yield

    def _first(self, place: Folder | Bucket) -> File:
        return next(file for file in self._of(place) if self._is_read(file.name))

    def _is_read(self, name: str) -> bool:
        top, *below = name.split('/')
        named = [] if self.kind == 'names' else [top]
        if any(part.startswith('_') and '=' not in part for part in [*named, *below]):
            return False
        return self.form is not None or has_format(name)

    def _of(self, place: Folder | Bucket) -> list[File]:
        # Keys are UTF-8, and moto takes none with a line end.
        files = [file for file in self.files if isinstance(place, Folder) or file.name.isprintable()]
        if not any(self._is_read(file.name) and has_format(file.name) for file in files):
            files.append(File('only.txt', b'only', [('text', 'only')]))
        return files

    def expect(self, place: Folder | Bucket) -> Expected:
        """What reading in the order of paths finds, each file once."""
        files = {file.name: file for file in self._of(place)}
        names = {name: [name] for name in files if self._is_read(name)}
        dead = []
        if isinstance(place, Folder):
            for name, target in self.links:
                if target is None:
                    dead.append(name)
                elif self._is_read(target) or has_format(name) or has_format(target):  # by the format of any name
                    names.setdefault(target, []).append(name)
        # The shortest name with a format.
        paths = {
            min(some, key=lambda path: (not has_format(path), path.count('/'), path)): name
            for name, some in names.items()
        }
        expected = Expected()
        for path, name in sorted([*paths.items(), *((name, '') for name in dead)]):
            where = shown(f'{place.root}/{path}')
            for kind, what in files[name].found if name else [('bad', '')]:
                if kind == 'text':
                    expected.texts.append(what)
                else:
                    places = what if isinstance(what, list) else [what]
                    expected.bad.append([f'{where}{place}: ' for place in places])
        return expected

    def addresses(self, place: Folder | Bucket) -> list[str]:
        """Ways to name all of it."""
        root = place.root
        names = sorted({name.split('/')[0] for name in [file.name for file in self._of(place)]})
        links = [name for name, _ in self.links] if isinstance(place, Folder) else []
        inputs = {
            'folder': [root], 'slash': [f'{root}/'], 'star': [f'{root}/*'], 'stars': [f'{root}/**/*'],
            'twice': [root, f'{root}/**'], 'names': [f'{root}/{name}' for name in [*names, *links]],
        }[self.kind]  # fmt: skip
        return [*inputs, *(['--format', self.form] if self.form else [])]


def has_format(name: str) -> bool:
    """Whether the last name has an extension that is read, before that of a compression."""
    last = name.rpartition('/')[2].lower()
    for packing in PACKERS:
        last = last.removesuffix(packing.lower()) if packing else last
    return last.endswith(('.txt', '.jsonl', '.json', '.ndjson', '.jl', '.parquet'))


@st.composite
def plain_files(draw: Any, name: str, form: str | None) -> File:
    """One without a format in its name."""
    made = draw({'text': text_files, 'jsonl': jsonl_files}[form or 'text'](name))
    extension = made.name.removeprefix(name)
    packing = next(each for each in sorted(PACKERS, reverse=True) if extension.endswith(each))
    other = draw(st.sampled_from(['', '.csv', '.tmp', '-00000', '.py']))
    return File(f'{name}{other}{packing}', made.data, made.found)


@st.composite
def corpora(draw: Any) -> Corpus:
    names = draw(st.lists(FILE_NAMES, min_size=1, max_size=6, unique=True))
    files = [draw(st.one_of(text_files(name), jsonl_files(name), parquet_files(name))) for name in names]
    form = draw(st.sampled_from([None, None, 'text', 'jsonl']))
    kinds = ['folder', 'slash', 'star', 'stars', 'names', 'twice']
    if draw(st.integers(0, 2)) == 0:
        files += [draw(plain_files(name, form)) for name in draw(st.sampled_from([['README'], ['x1', 'sub/x2']]))]
        kinds = kinds if form else ['folder', 'slash']
    kind = draw(st.sampled_from(kinds))
    links: list[tuple[str, str | None]] = []
    if draw(st.booleans()):
        # Of the same format, or of none; or one of those that have none.
        target = draw(st.sampled_from(files)).name
        extension = f'.{target.partition(".")[2]}' if has_format(target) else '.txt'
        packing = next(each for each in sorted(PACKERS, reverse=True) if target.endswith(each))
        if has_format(target):
            links.append(draw(st.sampled_from([(f'0link{extension}', target), ('sub0link', target)])))
        elif form != 'jsonl':
            links.append((f'0link.txt{packing}', target))
    if draw(st.integers(0, 4)) == 0:
        links.append(('zdead.txt', None))
    return Corpus(files, links, draw(st.booleans()), form, kind)


@dataclass(frozen=True)
class Defined:
    """A tokenizer's folder, its end-of-text, and what a text's tokens are by its definition."""

    folder: str
    eos: int
    define: Callable[[str], list[int]]


TOKENIZERS: dict[str, Defined] = {}
# No text holds these, so that the twin that defines the tokens has no way to its special tokens.
UNSPELLED = ['\U0010fffd0', '\U0010fffd1', '\U0010fffd2']


def make_tokenizers(folder: Path) -> None:
    """Fill TOKENIZERS: each kind of model with special tokens in its vocabulary, and a twin without their names."""
    made: Any = models
    steps: Any = pre_tokenizers
    letters = [chr(code) for code in range(33, 127)] + list('éï東京🙂x')
    words = ['▁', 'the', 'end', '/s', 'pad', 'unk', 'of', 'superposition', '...', '3.14']
    rest = list(dict.fromkeys([*letters, *words]))

    def vocabulary(special: list[str]) -> dict[str, int]:
        return {word: at for at, word in enumerate([*special, *rest])}

    def wordpiece(special: list[str]) -> Any:
        tokens = vocabulary(special)
        return made.WordPiece(
            tokens | {f'##{letter}': len(tokens) + at for at, letter in enumerate(letters)}, unk_token=special[0]
        )

    kinds: dict[str, Callable[[list[str]], Any]] = {
        'unigram': lambda special: made.Unigram(
            [(word, 0.0 if at < 3 else -9.0 / len(word)) for at, word in enumerate([*special, *rest])], unk_id=0
        ),
        'wordlevel': lambda special: made.WordLevel(vocabulary(special), unk_token=special[0]),
        'wordpiece': wordpiece,
        'bpe': lambda special: made.BPE(vocabulary(special), [], unk_token=special[0], ignore_merges=True),
    }  # fmt: skip
    for name, make in kinds.items():
        backend: Any = Tokenizer(make(['<unk>', EOS, '<pad>']))
        twin: Any = Tokenizer(make(UNSPELLED))
        backend.pre_tokenizer = twin.pre_tokenizer = steps.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token=EOS, pad_token='<pad>', unk_token='<unk>'
        ).save_pretrained(str(folder / name))
        TOKENIZERS[name] = Defined(
            str(folder / name), 1, lambda text, twin=twin: twin.encode(text, add_special_tokens=False).ids
        )
    # As of Llama 2: a mark before every text.
    marks: Any = normalizers
    byte_tokens = [f'<0x{code:02X}>' for code in range(256)]

    def marking(special: list[str]) -> Any:
        tokens = {word: at for at, word in enumerate([*special, *byte_tokens, *rest, '▁t', '▁the'])}
        model: Any = Tokenizer(made.BPE(tokens, [('▁', 't')], unk_token=special[0], byte_fallback=True))
        model.normalizer = marks.Sequence([marks.Prepend('▁'), marks.Replace(' ', '▁')])
        return model

    PreTrainedTokenizerFast(
        tokenizer_object=marking(['<unk>', EOS, '<pad>']), eos_token=EOS, pad_token='<pad>', unk_token='<unk>'
    ).save_pretrained(str(folder / 'marking'))
    twin = marking(UNSPELLED)
    TOKENIZERS['marking'] = Defined(
        str(folder / 'marking'), 1, lambda text, twin=twin: twin.encode(text, add_special_tokens=False).ids
    )
    bytes_of = tokenizers_of.train_tokenizer([make_text(number) for number in range(50)], 400)
    save_tokenizer(bytes_of, folder / 'bytes')
    plain: Any = PreTrainedTokenizerFast.from_pretrained(str(folder / 'bytes'))
    TOKENIZERS['bytes'] = Defined(
        str(folder / 'bytes'),
        bytes_of.eos_id,
        lambda text: plain(text, add_special_tokens=False, split_special_tokens=True)['input_ids'],
    )
