# Where documents are read, each may be a bad one, which pyright would have every test ask.
# pyright: reportAttributeAccessIssue=false
"""What composer-tst prepare-data reads: every document once, and what is wrong with the others."""

import bz2
import codecs
import errno
import gzip
import io
import json
import lzma
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from common.preparing import make_text, refuse, source, sources_of, succeed, write_jsonl

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data import documents, errors, parts, streams

pytest_plugins = ['common.preparing_fixtures']


# What is read


def parquet_bytes(texts: list[str], **options) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({'id': range(len(texts)), 'text': texts}), buffer, **options)
    return buffer.getvalue()


def invalid_parquet() -> bytes:
    """A column of strings of which the second is not UTF-8, as some writers leave unchecked."""
    buffers = pa.array([b'good', b'caf\xe9', b'good'], pa.binary()).buffers()
    strings: Any = pa.Array.from_buffers(pa.string(), 3, buffers)
    return parquet_bytes(strings)


@pytest.mark.parametrize(
    ('name', 'encode'),
    [
        ('a.jsonl', lambda data, texts: data),
        ('a.jsonl', lambda data, texts: codecs.BOM_UTF8 + data),
        ('a.json', lambda data, texts: data),
        *((f'a{name}', lambda data, texts: data) for name in ('.ndjson', '.jl', '.jsonlines', '.ldjson', '.JSONL')),
        ('a.jsonl.gz', lambda data, texts: gzip.compress(data[:50]) + gzip.compress(data[50:])),
        ('a.ndjson.zst', lambda data, texts: zstandard.compress(data[:50]) + zstandard.compress(data[50:])),
        ('a.jsonl.GZ', lambda data, texts: gzip.compress(data) + bytes(512)),
        ('a.JSONL.bz2', lambda data, texts: bz2.compress(data[:50]) + bz2.compress(data[50:])),
        ('a.jsonl.xz', lambda data, texts: lzma.compress(data[:50]) + lzma.compress(data[50:])),
        ('a.jsonl', lambda data, texts: data.replace(b'"id": 1', b'"id": ' + b'7' * 5000)),
        ('a.parquet', lambda data, texts: parquet_bytes(texts, compression='zstd', row_group_size=3)),
        ('a.parquet.gz', lambda data, texts: gzip.compress(parquet_bytes(texts, compression='gzip'))),
    ],
)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str, encode):
    texts = [make_text(number) for number in range(10)]
    data = ''.join(json.dumps({'text': text, 'id': 1}, ensure_ascii=False) + '\n' for text in texts)
    (tmp_path / name).write_bytes(encode(data.encode(), texts))
    read = list(documents.read_documents(documents.Piece(source(tmp_path / name)), 'text'))
    assert [document.text for document in read] == texts


@pytest.mark.parametrize('window', [27, 28])
def test_zstd_over_long_windows_is_read_or_refused(tmp_path: Path, window: int):
    options = zstandard.ZstdCompressionParameters.from_level(3, window_log=window, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=options).compressobj()  # which writes no size
    path = tmp_path / 'a.jsonl.zst'
    path.write_bytes(packer.compress(b'{"text": "good"}\n') + packer.flush())
    good, bad = read(path)
    assert good == (['good'] if window == 27 else [])
    assert window == 27 or 'too much memory' in bad[0]


def test_pieces_of_a_file_give_every_document_once(tmp_path: Path):
    texts = [make_text(number, number) for number in range(30)]
    jsonl = write_jsonl(tmp_path / 'a.jsonl', texts)
    (tmp_path / 'a.parquet').write_bytes(parquet_bytes(texts, row_group_size=3))
    for path in (jsonl, tmp_path / 'a.parquet'):
        for size in (1, 97, 600, 1 << 20):
            planned = list(parts.cut_source(source(path), size))
            read = [document for piece in planned for document in documents.read_documents(piece, 'text')]
            assert [document.text for document in read] == texts


def test_inputs_are_files_folders_and_globs_each_file_once(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    (corpus / '.hidden').write_text('not found')
    (corpus / 'link.txt').symlink_to(corpus / '01.txt')
    monkeypatch.chdir(corpus)
    found = sources_of('deeper', '0*.txt', '**/copy.txt', 'link.txt')
    assert [os.path.relpath(found_source.path) for found_source in found] == [
        *(f'0{number}.txt' for number in range(10)),
        'deeper/copy.txt',
    ]
    assert len(sources_of('.')) == 40


# Bad input

GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ('name', 'data', 'message'),
    [
        ('a.txt', b'caf\xe9', 'a.txt: invalid UTF-8'),
        ('a.txt', b'', 'a.txt: empty document'),
        ('a.jsonl', GOOD + b'{"text": "caf\xe9"}\n', 'a.jsonl, line 2: invalid UTF-8'),
        ('a.jsonl', GOOD * 2 + b'{"text": "x"\n', 'a.jsonl, line 3: malformed JSON'),
        ('a.jsonl', GOOD + b'["text"]\n', 'a.jsonl, line 2: a JSON array, not an object'),
        ('a.jsonl', GOOD + b'\n{"body": "x"}\n', 'a.jsonl, line 3: no text in "text"'),
        ('a.jsonl', GOOD + b'{"text": 3}\n', 'a.jsonl, line 2: "text" is not a string'),
        ('a.jsonl', GOOD + b'{"text": ""}\n', 'a.jsonl, line 2: empty document'),
        ('a.jsonl', GOOD + b'{"text": "\\ud800"}\n', 'a.jsonl, line 2: invalid UTF-8 (surrogates not allowed)'),
        ('a.txt', 'UTF-16'.encode('utf-16-le'), 'a.txt: NUL bytes, as in UTF-16'),
        ('a.txt', codecs.BOM_UTF8, 'a.txt: empty document'),
        ('a.jsonl', GOOD + 'x'.encode('utf-16-le'), 'a.jsonl, line 2: malformed JSON'),
        ('a.jsonl', GOOD + b'{"id": 1, "body": "x"}\n', 'a.jsonl, line 2: no text in "text" (its fields: id, body)'),
        ('a.json', b'[{"text": "x"}, {"text": "y"}]', 'a.json, line 1: a JSON array, not an object'),
        ('a.json', b'[\n', 'a.json, line 1: a JSON array, not an object'),
        ('a.json', GOOD + b'{\n', 'a.json, line 2: malformed JSON'),
        ('a.txt.gz', b'', 'a.txt.gz: damaged gzip data (an empty file)'),
        ('a.jsonl.zst', b'', 'a.jsonl.zst: damaged zstd data (an empty file)'),
        ('a.jsonl.bz2', bz2.compress(GOOD)[:-3], 'a.jsonl.bz2: damaged bzip2 data'),
        ('a.jsonl.xz', lzma.compress(GOOD)[:-3], 'a.jsonl.xz: damaged xz data'),
        ('a.jsonl.xz', GOOD, 'a.jsonl.xz: damaged xz data'),
        # Without the time, which would name the test differently in each process that collects it.
        ('a.jsonl.gz', gzip.compress(GOOD, mtime=0)[:-9], 'a.jsonl.gz: damaged gzip data'),
        ('a.txt.zst', zstandard.compress(GOOD)[:-2], 'a.txt.zst: damaged zstd data'),
        ('a.txt.gz', GOOD, 'a.txt.gz: damaged gzip data'),
        ('a.parquet', GOOD, 'a.parquet: damaged parquet data'),
        (
            'a.parquet',
            parquet_bytes([]).replace(b'text', b'body'),
            'a.parquet: no text in "text" (its columns: id, body)',
        ),
        ('a.parquet', invalid_parquet(), 'a.parquet, row 2: invalid UTF-8'),
        ('a.parquet', parquet_bytes(['x', None]), 'a.parquet, row 2: no text in "text"'),  # pyright: ignore
    ],
)
def test_bad_documents_stop_with_one_sentence_or_are_counted(tmp_path: Path, name: str, data: bytes, message: str):
    (tmp_path / name).write_bytes(data)
    read = list(documents.read_documents(documents.Piece(source(tmp_path / name)), 'text'))
    (bad,) = [document for document in read if isinstance(document, errors.BadDocument)]
    assert str(bad).startswith(f'{tmp_path}/{message}')


def test_how_much_of_a_piece_has_been_read(tmp_path: Path):
    texts = [make_text(number, number) for number in range(300)]
    jsonl = write_jsonl(tmp_path / 'a.jsonl', texts)
    (tmp_path / 'a.parquet').write_bytes(parquet_bytes(texts, row_group_size=30))
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(jsonl.read_bytes()))
    (tmp_path / 'a.txt').write_text(''.join(texts) * 40)
    for name in ('a.jsonl', 'a.parquet', 'a.jsonl.gz', 'a.txt'):
        planned = list(parts.cut_source(source(tmp_path / name), 30_000))
        assert sum(piece.size for piece in planned) == (tmp_path / name).stat().st_size or name == 'a.parquet'
        for piece in planned:
            read = [document.read for document in documents.read_documents(piece, 'text')]
            assert read == sorted(read)
            assert read[-1] == piece.size


def test_a_bad_line_is_named_by_its_number_or_where_it_begins(tmp_path: Path):
    path = tmp_path / 'a.jsonl'
    path.write_bytes(GOOD * 50 + b'oops\n' + GOOD * 50)
    for size in (30, 100, 1000):
        read = [
            document
            for piece in parts.cut_source(source(path), size)
            for document in documents.read_documents(piece, 'text')
        ]
        assert len(read) == 101
        # A later piece does not know how many lines are before it.
        begins = f', the line that begins at byte {50 * len(GOOD)}'
        assert read[50].where == f'{path}{", line 51" if size > 50 * len(GOOD) else begins}'


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / 'pipe')
    for text in (tmp_path, tmp_path / 'pipe'):
        with pytest.raises(CommandError, match='pipe: it is a pipe or a device'):
            sources_of(text)


def test_a_folder_that_may_not_be_read_is_not_passed_over(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    listdir = os.listdir

    # What the kernel answers all but the superuser, whom it refuses nothing.
    def refuse(path: Any) -> Any:
        if os.path.basename(path) == 'deeper':
            raise PermissionError(13, 'Permission denied', path)
        return listdir(path)

    monkeypatch.setattr(os, 'listdir', refuse)
    with pytest.raises(PermissionError, match=f'{corpus}/deeper'):
        sources_of(corpus)


def damaged_parquet(texts: list[str]) -> bytes:
    """Parquet of which a bit of the second row group is not what its page's checksum says."""
    options = {'compression': 'none', 'use_dictionary': False, 'write_page_checksum': True}
    data = bytearray(parquet_bytes(texts, row_group_size=4, **options))
    data[data.index(texts[5].encode())] ^= 1
    return bytes(data)


def test_damage_in_parquet_is_seen_by_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, 'BATCH_ROWS', 2)
    texts = [f'text number {number}' for number in range(12)]
    (tmp_path / 'a.parquet').write_bytes(damaged_parquet(texts))
    *read, bad = documents.read_documents(documents.Piece(source(tmp_path / 'a.parquet')), 'text')
    assert [document.text for document in read] == texts[:4]
    assert str(bad).startswith(f'{tmp_path}/a.parquet: damaged parquet data (')


def test_a_mark_before_text_is_no_text(tmp_path: Path):
    (tmp_path / 'a.txt').write_bytes(codecs.BOM_UTF8 + b'text')
    (document,) = documents.read_documents(documents.Piece(source(tmp_path / 'a.txt')), 'text')
    assert document.text == 'text'


# What is searched


def names_of(*inputs: object) -> list[str]:
    return [os.path.relpath(found.path) for found in sources_of(*inputs)]


def test_a_pattern_means_the_same_whether_the_shell_or_this_program_expands_it(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(corpus)
    (corpus / 'deeper' / 'deepest').mkdir()
    (corpus / 'deeper' / 'deepest' / 'x.txt').write_text('x')
    (corpus / 'deeper' / '.hidden.txt').write_text('not found')
    assert names_of('*') == names_of(*os.listdir('.')) == names_of('.')
    assert names_of('deep*') == names_of('deeper') == ['deeper/copy.txt', 'deeper/deepest/x.txt']
    assert names_of('**/x.txt') == names_of('*/*/x.txt') == names_of('deeper/**/[w-y].txt') == ['deeper/deepest/x.txt']
    assert names_of('deeper/.h*') == ['deeper/.hidden.txt']
    assert names_of('*/') == names_of('deeper')


def test_a_name_that_exists_comes_before_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ('a[1].txt', 'a1.txt', 'in[1]/b.txt', 'in1/c.txt', 'what?.txt', 'whatx.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names_of('a[1].txt', 'in[1]', 'what?.txt') == ['a[1].txt', 'in[1]/b.txt', 'what?.txt']
    assert names_of('a[[]1].txt') == ['a[1].txt']
    assert names_of('in[1]/*.txt') == ['in[1]/b.txt']
    monkeypatch.chdir(tmp_path / 'in[1]')
    assert names_of('*.txt') == names_of('**/b*') == ['b.txt']


def test_folder_links_in_a_circle_come_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / name for name in 'abcde']
    for folder in folders:
        folder.mkdir()
        (folder / f'{folder.name}.txt').write_text(folder.name)
    for folder in folders:
        for other in folders:
            (folder / f'to-{other.name}').symlink_to(other)
    start = time.monotonic()
    for text in ('.', '**/*.txt', '*/**/*.txt'):
        assert names_of(text) == [f'{name}/{name}.txt' for name in 'abcde']
    assert time.monotonic() - start < 300  # there are millions of ways through the links
    assert names_of('a/to-b/*.txt') == ['a/to-b/b.txt']


def test_a_file_behind_links_in_a_circle_is_a_bad_document(tmp_path: Path, tokenizer_dir: str):
    for name, other in (('a.txt', 'b.txt'), ('b.txt', 'a.txt'), ('c.txt', 'c.txt')):
        (tmp_path / name).symlink_to(tmp_path / other)
    common = ('--seq-len', 4, '--tokenizer', tokenizer_dir, '--output', tmp_path / 'out')
    for path in (tmp_path / 'a.txt', tmp_path / 'c.txt', tmp_path / '*.txt'):
        assert 'txt: it is not there (with --skip-bad' in refuse(path, *common)
        assert not (tmp_path / 'out').exists()


# What a file is read as


def lines_of(path: Path, count: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, [make_text(number) for number in range(count)])


def kinds_of(*inputs: object, form: str = '') -> dict[str, str]:
    return {os.path.relpath(found.path): found.format for found in sources_of(*inputs, form=form)}


def test_a_file_is_read_as_the_name_says_that_has_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The layout of the Hugging Face hub's cache, a link beside its file, links of links."""
    monkeypatch.chdir(tmp_path)
    lines_of(tmp_path / 'hub' / 'blobs' / '0a1b2c')
    (tmp_path / 'hub' / 'refs').mkdir()
    (tmp_path / 'hub' / 'refs' / 'main').write_text('abc')
    (tmp_path / 'hub' / 'snapshots' / 'abc').mkdir(parents=True)
    (tmp_path / 'hub' / 'snapshots' / 'abc' / 'train.jsonl').symlink_to('../../blobs/0a1b2c')
    lines_of(tmp_path / 'latest' / 'v1' / 'data.jsonl')
    (tmp_path / 'latest' / 'a').symlink_to('v1/data.jsonl')
    (tmp_path / 'latest' / 'b').symlink_to('a')
    snapshot = 'hub/snapshots/abc/train.jsonl'
    for given in (['hub'], ['hub/snapshots'], [snapshot], ['hub/snapshots/*/*'], ['hub/blobs/0a1b2c', snapshot]):
        assert kinds_of(*given) == {snapshot: 'jsonl'}
    assert kinds_of('latest') == {'latest/v1/data.jsonl': 'jsonl'}
    for link in ('latest/a', 'latest/b', 'latest/[ab]'):
        assert list(kinds_of(link).values()) == ['jsonl']
    # Two inputs, of which one reaches the file by its plain name.
    assert kinds_of('hub/blobs/*', 'hub/snapshots') == {snapshot: 'jsonl'}
    with pytest.raises(CommandError, match='hub/blobs/0a1b2c has no format in its name'):
        sources_of('hub/blobs/*')
    with pytest.raises(CommandError, match='no file in hub/blobs has a format in its name; .*0a1b2c has no format'):
        sources_of('hub/blobs')
    (tmp_path / 'latest' / 'c.txt').symlink_to('v1/data.jsonl')
    with pytest.raises(CommandError, match='c.txt and .*data.jsonl are one file, which is not of both formats'):
        sources_of('latest')


@pytest.mark.parametrize('name', ['part-00000', 'a.csv', 'a.csv.gz', 'b.tsv', 'c.html', 'd.pdf', 'e.tmp', 'f.py'])
def test_a_file_of_another_name_is_refused_read_with_format_or_left_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / name).write_bytes(gzip.compress(b'id,text') if name.endswith('.gz') else b'id,text')
    for given in (f'in/{name}', 'in/*', '**/*'):
        with pytest.raises(CommandError, match=f'in/{name} has no format in its name .*say with --format'):
            sources_of(given)
    with pytest.raises(CommandError, match='no input: no file in in has a format in its name'):
        sources_of('in')
    lines_of(tmp_path / 'in' / 'x.jsonl')
    lines_of(tmp_path / 'in' / 'y.jl')
    (tmp_path / 'in' / 'README.md').write_text('read me')
    capsys.readouterr()
    assert kinds_of('in') == {'in/x.jsonl': 'jsonl', 'in/y.jl': 'jsonl'}
    line = f'found files: 2 of JSON lines; left out: 2 without a format in their names (as {tmp_path}/in/'
    assert capsys.readouterr().err.startswith(line)
    texts = {f'in/{name}': 'text', 'in/README.md': 'text'}
    assert kinds_of('in', form='text') == texts | {'in/x.jsonl': 'jsonl', 'in/y.jl': 'jsonl'}
    assert kinds_of(f'in/{name}', form='jsonl') == {f'in/{name}': 'jsonl'}
    (found,) = sources_of(f'in/{name}', form='text')
    assert found.compression == ('gzip' if name.endswith('.gz') else '')


def test_what_spark_leaves_and_hidden_files_are_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    for name in (
        'part-0.json', 'a=1/_b=2/part-1.json', '_temporary/0/_temporary/attempt_1/part-2.json', '_c/x.json',
        'a=1/_temporary/part-3.json', '_spark_metadata/0', '_SUCCESS', 'part-4.json._COPYING_', '.part-0.json.crc',
        '.hidden/x.json',
    ):  # fmt: skip
        lines_of(tmp_path / 'in' / name)
    found = {'in/part-0.json': 'jsonl', 'in/a=1/_b=2/part-1.json': 'jsonl'}
    assert kinds_of('in') == found
    said = capsys.readouterr().err
    assert f'6 that Spark leaves (as {tmp_path}/in/_SUCCESS)' in said
    assert f'2 hidden (as {tmp_path}/in/.hidden)' in said
    assert kinds_of('in/**/*.json') == kinds_of('in/*.json', 'in/*=*') == found
    assert kinds_of('in/_c/*.json') == kinds_of('in/_*/x.json') == {'in/_c/x.json': 'jsonl'}
    assert kinds_of('in/_c') == {'in/_c/x.json': 'jsonl'}


@pytest.mark.parametrize('skipping', [[], ['--skip-bad']])
@pytest.mark.parametrize(
    ('name', 'data', 'said'),
    [
        ('a.jsonl', b'{"id": 1, "content": "x"}\n' * 2, 'line 1: no text in "text" (its fields: id, content): name'),
        ('a.parquet', parquet_bytes(['x']).replace(b'text', b'body'), '(its columns: id, body): name the one'),
        ('a.json', json.dumps([{'text': 'x'}]).encode(), "if the file is one array, make lines of it, as with: jq -c"),
        ('a.json', json.dumps([{'text': 'x'}], indent=2).encode(), 'if the file is one array, make lines of it'),
    ],
)  # fmt: skip
def test_the_first_documents_are_looked_at_before_anything_is_begun(
    name: str, data: bytes, said: str, skipping: list[str], tmp_path: Path, tokenizer_dir: str
):
    (tmp_path / name).write_bytes(data)
    lines_of(tmp_path / 'b.jsonl')
    (tmp_path / 'c.txt').write_text('text')
    common = ['--seq-len', 1, '--tokenizer', tokenizer_dir, '--output', tmp_path / 'out', *skipping]
    assert said in refuse(tmp_path / name, tmp_path / 'c.txt', *common)
    assert not (tmp_path / 'out').exists()
    if name == 'a.jsonl':
        succeed(tmp_path / name, '--text-key', 'content', *common)


# Through the whole command


def test_names_that_are_no_utf8_are_read_and_written_down(tmp_path: Path, tokenizer_dir: str):
    for name in (b'caf\xe9.txt', b'new\nline.txt', b'bad\xff.txt'):
        with open(os.path.join(os.fsencode(tmp_path), name), 'wb') as file:
            file.write(b'\xff' if b'bad' in name else b'the text of it ' * 9)
    common = [tmp_path / '*.txt', '--seq-len', 4, '--tokenizer', tokenizer_dir, '--output', tmp_path / 'out']
    assert refuse(*common).startswith(f'{tmp_path}/bad\\udcff.txt: invalid UTF-8')
    succeed(*common, '--skip-bad')
    said = f'{tmp_path}/bad\\udcff.txt: invalid UTF-8 (invalid start byte)\n'
    assert (tmp_path / 'out' / 'bad_documents.txt').read_text() == said
    assert json.loads((tmp_path / 'out' / 'stats.json').read_text())['splits']['train']['documents'] == 2


def test_inputs_that_are_all_bad_are_not_called_too_small(tmp_path: Path, tokenizer_dir: str):
    (tmp_path / 'a.jsonl').write_bytes(b'oops\n' * 2)
    common = ['--seq-len', 1, '--tokenizer', tokenizer_dir, '--output', tmp_path / 'out', '--skip-bad']
    sentence = refuse(tmp_path / 'a.jsonl', *common)
    assert f'(of 2 bad documents the first: {tmp_path}/a.jsonl, line 1: malformed JSON)' in sentence


@pytest.mark.parametrize('grown', ['a.txt', 'a.jsonl', 'a.parquet'])
def test_an_input_that_changes_while_it_is_read_is_refused(tmp_path: Path, grown: str):
    path = tmp_path / grown
    data = {'a.txt': b'text', 'a.jsonl': GOOD * 3, 'a.parquet': parquet_bytes(['x'] * 300)}[grown]
    path.write_bytes(data)
    listed = source(path)
    reading_it = documents.read_documents(documents.Piece(listed), 'text')
    path.write_bytes(data + data)
    with pytest.raises(CommandError, match=f'{grown} changed after it was listed'):
        list(reading_it)
    if grown == 'a.txt':
        return  # its one document is whole before it is handed on
    # Between the first document and the last.
    path.write_bytes(data)
    reading_it = documents.read_documents(documents.Piece(source(path)), 'text')
    next(reading_it)
    path.write_bytes(data + data)
    with pytest.raises(CommandError, match=f'{grown} changed after it was listed'):
        list(reading_it)


def test_a_disk_that_fails_is_never_bad_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Failing(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            raise OSError(errno.EIO, 'Input/output error', self.name)

        def readall(self) -> bytes:
            raise OSError(errno.EIO, 'Input/output error', self.name)

    monkeypatch.setattr(streams.io, 'FileIO', Failing)
    for name in ('a.jsonl.gz', 'a.txt', 'a.jsonl.bz2', 'a.txt.zst', 'a.parquet', 'a.jsonl.xz'):
        path = tmp_path / name
        path.write_bytes(b'text' * 1000)
        with pytest.raises(OSError, match=f'Input/output error.*{name}'):
            list(documents.read_documents(documents.Piece(source(path)), 'text'))
        sentence = refuse(path, '--output', tmp_path / 'out', '--seq-len', 4, '--train-tokenizer', 300)
        assert sentence == f'cannot use {path}: Input/output error: mend that, and the same command goes on from here'


def read(path: Path) -> tuple[list[str], list[str]]:
    """The documents of a file, and what is bad of it."""
    found = list(documents.read_documents(documents.Piece(source(path)), 'text'))
    good = [document.text for document in found if isinstance(document, documents.Document)]
    return good, [document.why for document in found if isinstance(document, errors.BadDocument)]


MEMBERS = [b''.join(b'{"text": "%d in %d"}\n' % (line, member) for line in range(50)) for member in range(3)]
TEXTS_OF_MEMBERS = [f'{line} in {member}' for member in range(3) for line in range(50)]


@pytest.mark.parametrize(
    ('suffix', 'compress'),
    [('.gz', gzip.compress), ('.bz2', bz2.compress), ('.xz', lzma.compress), ('.zst', zstandard.compress)],
)
@pytest.mark.parametrize('block', [7, 1 << 20])
def test_every_member_is_read_and_damage_in_any_is_seen(
    suffix: str, compress: Callable[[bytes], bytes], block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if suffix in ('.bz2', '.xz'):
        monkeypatch.setattr(streams, 'BLOCK_BYTES', block)
    packed = [compress(data) for data in MEMBERS]
    path = tmp_path / f'a.jsonl{suffix}'
    path.write_bytes(b''.join(packed))
    assert read(path) == (TEXTS_OF_MEMBERS, [])
    for at in (0, 3, len(packed[1]) // 2):
        damaged = bytearray(packed[1])
        damaged[at] ^= 0x10
        path.write_bytes(packed[0] + bytes(damaged) + packed[2])
        assert read(path)[1], f'byte {at} of the second member'
    path.write_bytes(packed[0] + packed[1][:-3])
    assert read(path)[1]


SKIPPABLE = b'\x50\x2a\x4d\x18' + (5).to_bytes(4, 'little') + b'abcde'


@pytest.mark.parametrize(
    ('suffix', 'compress', 'around'),
    [
        ('.gz', gzip.compress, (gzip.compress(b''), b'')),
        ('.bz2', bz2.compress, (bz2.compress(b''), b'')),
        ('.xz', lzma.compress, (lzma.compress(b''), b'')),
        ('.zst', zstandard.compress, (zstandard.compress(b''), b'')),
        ('.zst', zstandard.compress, (SKIPPABLE, SKIPPABLE)),
        ('.gz', gzip.compress, (b'', bytes(700))),
        ('.xz', lzma.compress, (bytes(8), bytes(4))),
    ],
)  # fmt: skip
def test_empty_and_skippable_members_are_read_over(
    suffix: str, compress: Callable[[bytes], bytes], around: tuple[bytes, bytes], tmp_path: Path
):
    path = tmp_path / f'a.jsonl{suffix}'
    between, after = around
    packed = [compress(data) for data in MEMBERS]
    path.write_bytes(between * 2 + packed[0] + between * 2 + packed[1] + between + packed[2] + between + after)
    assert read(path) == (TEXTS_OF_MEMBERS, [])


@pytest.mark.parametrize(
    ('suffix', 'compress'),
    [('.gz', gzip.compress), ('.bz2', bz2.compress), ('.xz', lzma.compress), ('.zst', zstandard.compress)],
)
def test_a_cut_anywhere_is_seen_and_so_is_what_follows_the_end(
    suffix: str, compress: Callable[[bytes], bytes], tmp_path: Path
):
    path = tmp_path / f'a.jsonl{suffix}'
    packed = [compress(GOOD), compress(GOOD * 3)]
    whole = b''.join(packed)
    for end in range(1, len(whole)):
        path.write_bytes(whole[:end])
        assert bool(read(path)[1]) == (end != len(packed[0])), f'cut after {end} of {len(whole)} bytes'
    for rest in (b'x', b'garbage' * 50):
        path.write_bytes(whole + rest)
        assert read(path)[1]


def test_zstd_with_a_dictionary_is_damaged_with_the_reason(tmp_path: Path):
    trained = zstandard.train_dictionary(1000, [b'%d hello %d' % (number * 7919, number) for number in range(2000)])
    path = tmp_path / 'a.jsonl.zst'
    path.write_bytes(zstandard.ZstdCompressor(dict_data=trained).compress(GOOD))
    assert 'Dictionary mismatch' in read(path)[1][0]


def test_no_row_of_parquet_is_lost_to_a_damaged_footer(tmp_path: Path):
    texts = [f'text number {number}' for number in range(40)]
    path = tmp_path / 'a.parquet'
    data = parquet_bytes(texts, row_group_size=10, compression='none', write_page_checksum=True)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], 'little')
    seen = 0
    for at in range(footer, len(data) - 8, 5):
        damaged = bytearray(data)
        damaged[at] ^= 4
        path.write_bytes(bytes(damaged))
        good, bad = read(path)
        assert bad or good == texts, f'byte {at - footer} of the footer'
        seen += bool(bad)
    assert seen > 10


def test_a_column_of_dates_is_not_text(tmp_path: Path):
    path = tmp_path / 'a.parquet'
    pq.write_table(pa.table({'text': pa.array([2**62, 0], pa.timestamp('s'))}), path)
    assert read(path) == ([], ['"text" is not a string'] * 2)
    pq.write_table(pa.table({'text': pa.array([0], pa.timestamp('s', 'Mars/Olympus'))}), path)
    assert read(path) == ([], ['"text" is not a string'])


def test_a_temporary_folder_that_fails_is_never_bad_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / 'a.parquet.gz'
    path.write_bytes(gzip.compress(parquet_bytes(['text'])))
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'gone'))
    with pytest.raises(FileNotFoundError, match='gone'):
        read(path)


@pytest.mark.parametrize('output', [' s3://bucket/x', ' file:/x', 's3://bucket/caf\udce9'])
def test_an_odd_address_is_refused(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / 'a.txt').write_text('text')
    monkeypatch.chdir(tmp_path)
    refuse('a.txt', '--output', output, '--seq-len', 4, '--train-tokenizer', 300)
    assert os.listdir(tmp_path) == ['a.txt']


@pytest.mark.parametrize('pattern', ['.', 'a*', '**/*.txt', 'up'])
def test_an_output_in_the_input_is_not_read(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / 'all').mkdir()
    (tmp_path / 'all' / 'a.txt').write_text('text ' * 50)
    (tmp_path / 'up').mkdir()
    (tmp_path / 'up' / 'link').symlink_to('..')
    monkeypatch.chdir(tmp_path)
    arguments = [pattern, '--output', 'all/out', '--seq-len', 4, '--train-tokenizer', 300, '--split', 'train=1']
    succeed(*arguments)
    (tmp_path / 'all' / 'out' / 'mine.txt').write_text('not read')
    result = succeed(*arguments)
    assert 'found files: 1 of text; left out: 1 of the output (as ' in result.stderr
