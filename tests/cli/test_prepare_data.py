"""composer-tst prepare-data: what comes out is what the definition says, whatever happens on the way."""

import errno
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import typer
import yaml
from common import REPO
from common.preparing import (
    COMMAND,
    SETTINGS,
    SPLITS,
    L,
    define_rows,
    make_text,
    of_split,
    prepare,
    read_rows,
    read_shard,
    sources_of,
    stored,
    succeed,
    tree,
    write_jsonl,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.auto.tokenization_auto import AutoTokenizer

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data import convert, errors, parts, report, tokenizer, workers
from composer_tst.cli.prepare_data.output import Output

pytest_plugins = ['common.preparing_fixtures']

TEXT = st.text(min_size=1, max_size=80).filter(lambda text: text.encode(errors='ignore').decode() == text)


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
        assert counted['bytes'] == sum(path.stat().st_size for path in (out / name).rglob('*.mds'))
        assert f'{name}: documents {counted["documents"]}, ' in result.output
    assert stats['bad_documents'] == 0
    assert sorted(path.name for path in out.iterdir()) == ['.records', 'stats.json', 'train', 'val']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['corpus', 'out']


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


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(TEXT, min_size=1, max_size=8), length=st.integers(1, 9))
def test_rows_of_random_unicode_documents_concatenate_to_the_tokens(
    bpe: tokenizer.TextTokenizer, tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory, texts, length
):
    path = write_jsonl(tmp_path_factory.mktemp('random') / 'random.jsonl', texts)
    (part,) = parts.plan_parts(sources_of(path))
    job = convert.Job(bpe, parts.Settings(length, SPLITS), Output(str(path.parent / 'out'), str(path.parent)))
    record = convert.convert_part(job, (0, part), lambda _: None)
    for name, _ in SPLITS:
        rows = []
        for entry in json.loads(record['splits'][name]['index'] or '{"shards": []}')['shards']:
            rows += read_shard((path.parent / 'out' / name / '00000' / stored(entry)).read_bytes(), entry).tolist()
        assert rows == define_rows(of_split(texts, name), tokenizer_dir, length)
        assert record['splits'][name]['counts']['documents'] == len(of_split(texts, name))


# Splits


def test_no_text_is_in_two_splits_and_shares_are_kept():
    many = [make_text(number, 3) for number in range(4000)]
    splits = (('a', 0.25), ('b', 0.7), ('c', 0.05))
    placed = {name: [] for name, _ in splits}
    for text in many:
        placed[parts.choose_split(text, splits)].append(text)
    assert placed == {name: of_split(many, name, splits) for name in placed}
    assert [len(placed[name]) for name in 'abc'] == pytest.approx([1000, 2800, 200], abs=120)


@pytest.mark.parametrize(
    ('says', 'texts'),
    [
        ('give NAME=SHARE,NAME=SHARE with names of letters',
         ['', 'train', 'train=nan', 'train=.', 'train=0.5.5', 'train=2,val=-1', 'a b=1', 'a/b=1', '..=1', '-a=1',
          'train=1,val=0', 'train=0.5,train=0.5', 'train=0.5,Train=0.5', 'tokenizer=1']),
        ('the shares do not sum to 1', ['train=0.5']),
    ],
)  # fmt: skip
def test_splits_that_make_no_sense_are_refused(says: str, texts: list[str]):
    for text in texts:
        with pytest.raises(CommandError, match=re.escape(f'--split {text}: {says}')):
            parts.parse_splits(text)


# Bad documents


def test_a_bad_document_ends_the_run_and_nothing_is_visible(corpus: Path, tokenizer_dir: str, tmp_path: Path):
    (corpus / '20.txt').write_bytes(b'\xff')
    arguments = [corpus, '--output', tmp_path / 'out', '--seq-len', L, '--tokenizer', tokenizer_dir]
    result = prepare(*arguments)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(
        f'error: {corpus}/20.txt: invalid UTF-8 (invalid start byte) (with --skip-bad'
    )
    assert 'Traceback' not in result.output
    assert not list((tmp_path / 'out').glob('*/index.json'))


def test_skipped_bad_documents_are_listed_and_counted(corpus: Path, tokenizer_dir: str, tmp_path: Path):
    (corpus / '20.txt').write_bytes(b'\xff')
    (corpus / '21.txt').write_bytes(b'')
    (corpus / '22.txt').unlink()
    (corpus / '22.txt').symlink_to('nowhere')
    out = tmp_path / 'out'
    result = succeed(corpus, '--output', out, '--seq-len', L, '--tokenizer', tokenizer_dir, '--skip-bad', '--verify')
    expected = ['20.txt: invalid UTF-8 (invalid start byte)', '21.txt: empty document', '22.txt: it is not there']
    assert (out / 'bad_documents.txt').read_text().splitlines() == [f'{corpus}/{line}' for line in expected]
    assert 'bad documents, listed in bad_documents.txt: 3' in result.stdout
    stats = json.loads((out / 'stats.json').read_text())
    assert stats['bad_documents'] == 3
    assert sum(counted['documents'] for counted in stats['splits'].values()) == 37


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere.txt'], 'no input: nowhere.txt is not there'),
        (['*.nothing'], 'no input: *.nothing matches no file'),
        (['empty'], 'no input: empty is empty'),
        (['hidden'], 'no input: hidden holds only what is left out, as '),
        (['corpus', '--train-tokenizer', '300'], 'give one of --tokenizer and --train-tokenizer'),
        (['corpus', '--tokenizer', './nowhere'], '--tokenizer ./nowhere: there is no such folder'),
        (['corpus', '--tokenizer', 'corpus'], '--tokenizer corpus: this folder does not load: '),
        (['gs://bucket/text'], 'gs://bucket/text: only paths'),
        (['S3://bucket/text'], 'S3://bucket/text: only paths'),
        (['file:///etc/hosts'], 'file:///etc/hosts: only paths'),
        (['s3://'], 's3:// names no bucket'),
        (['corpus', '--output', 'gs://bucket/out'], 'gs://bucket/out: only paths'),
        (['corpus', '--output', 'corpus'], 'corpus holds 00.txt and was not begun by this command'),
        (['corpus', '--output', 'corpus/01.txt'], 'corpus/01.txt: Not a directory'),
        (['corpus/02.txt', '--output', 'corpus/01.txt/out'], 'Not a directory'),
        (['corpus/02.txt', '--output', '.'], 'holds corpus and was not begun by this command'),
        (['corpus', '--seq-len', '1000000'], 'too small: no split fills a row of --seq-len 1000000'),
        (['corpus', '--compression', 'zip'], '--compression zip: there are br, bz2, gz, snappy, zstd'),
        (['corpus', '--hashes', 'sha1,nonsense'], '--hashes nonsense'),
        (['corpus', '--split', 'train=0.5'], '--split train=0.5'),
    ],
)
def test_bad_arguments_get_one_sentence(
    corpus: Path, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    monkeypatch.chdir(corpus.parent)
    (corpus.parent / 'empty').mkdir()
    (corpus.parent / 'hidden').mkdir()
    (corpus.parent / 'hidden' / '.x.txt').write_text('x')
    before = tree(corpus.parent)
    defaults = {'--output': 'out', '--seq-len': L, '--tokenizer': tokenizer_dir}
    given_defaults = [item for pair in defaults.items() if pair[0] not in arguments for item in pair]
    result = prepare(*arguments, *given_defaults)
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith('error: ')
    assert message in line
    assert len(line) < 500
    assert {name: data for name, data in tree(corpus.parent).items() if '.records/' not in name} == before


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['corpus', '--output', 'out', '--seq-len', '0'], "Invalid value for '--seq-len'"),
        (['corpus', '--output', 'out', '--train-tokenizer', 10**20], "Invalid value for '--train-tokenizer'"),
    ],
)  # fmt: skip
def test_what_typer_refuses(arguments: list[object], message: str, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(corpus.parent)
    result = prepare(*arguments)
    assert result.exit_code == 2
    assert message in ' '.join(result.stderr.replace('│', '').split())
    assert not Path('out').exists()


def test_the_yaml_that_is_printed_holds_from_any_folder_and_in_any_terminal(
    corpus: Path, tokenizer_dir: str, tmp_path: Path
):
    (corpus / 'naïve.csv').write_text('left out')
    (tmp_path / 'here').symlink_to(tokenizer_dir)
    arguments = [corpus, '--output', tmp_path / 'out', '--seq-len', L, '--tokenizer', './here']
    environment = os.environ | {'PYTHONIOENCODING': 'ascii', 'PYTHONPATH': str(REPO)}
    line = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'na\\xefve.csv' in done.stdout
    printed = yaml.safe_load(done.stdout[done.stdout.index('max_seq_len') :])
    assert printed['tokenizer']['name'] == str(Path(tokenizer_dir).resolve())


def test_each_data_set_in_a_bucket_has_a_cache_of_its_own():
    def cache(address: str, rows: int) -> str:
        split = {'documents': 1, 'rows': rows, 'tokens': rows * L}
        stats = {'seq_len': L, 'bad_documents': 0, 'splits': {'train': split}}
        told = report.describe(stats, '', address, 'gpt2')
        return yaml.safe_load(told[told.index('max_seq_len') :])['train_loader']['dataset']['local']

    # Streaming reads the index that lies in a cache, whatever is in the bucket by now.
    assert len({cache('s3://b/one', 10), cache('s3://b/two', 10), cache('s3://b/one', 12)}) == 3
    assert cache('s3://b/one', 10) == cache('s3://b/one', 10)


def test_workers_do_not_answer_an_interrupt_as_they_begin():
    blocked = 'signal.SIGINT in in_worker(signal.pthread_sigmask, signal.SIG_BLOCK, [])'
    code = f'import signal; from composer_tst.cli.prepare_data.workers import in_worker; print({blocked})'
    code += '; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))'
    environment = os.environ | {'PYTHONPATH': str(REPO)}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ['True', 'False'], done.stderr


def test_a_temporary_folder_whose_name_is_too_long_for_a_socket_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, 'tempdir', f'/tmp/{"x" * 80}')
    with pytest.raises(CommandError, match=r'TMPDIR is /tmp/x+, which is too long .*: give a folder of at most 75 byt'):
        workers.in_worker(max, 1, 2)


def test_want_of_memory_is_told(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(typer.Exit), errors.told():
        raise MemoryError
    assert capsys.readouterr().err.startswith('error: there is not enough memory: give it more')


def _convert_on_a_full_disk(job: convert.Job, part: parts.Part, answer) -> None:
    # What a full disk does to a write, without one: the kernel refuses it.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        convert.convert_part(job, (0, part), lambda _: None)
    except OSError as error:
        answer.send((error.errno, error.filename))


def test_a_disk_that_fills_up_gets_one_sentence(corpus: Path, bpe: tokenizer.TextTokenizer, tmp_path: Path):
    scratch = tmp_path / 'scratch'
    scratch.mkdir()
    job = convert.Job(bpe, SETTINGS, Output(str(tmp_path / 'out'), str(scratch)))
    (part,) = parts.plan_parts(sources_of(corpus))
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe()
    process = context.Process(target=_convert_on_a_full_disk, args=(job, part, sender))
    process.start()
    assert receiver.poll(300)
    number, name = receiver.recv()
    assert number == errno.EFBIG
    assert name.startswith(str(scratch))
    process.join()
    assert not (tmp_path / 'out').exists()
    assert not list(scratch.iterdir())
    record = convert.convert_part(job, (0, part), lambda _: None)
    assert record == job.output.recorded('part.00000.json')
    index = json.loads((tmp_path / 'out' / 'train' / '00000' / 'index.json').read_text())
    assert sum(shard['samples'] for shard in index['shards']) == record['splits']['train']['counts']['rows'] > 10
