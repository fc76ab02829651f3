"""composer-tst prepare-data against a real S3 server, up to a training run that streams what it made."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from common.preparing import Bucket, prepare, read_rows, refuse, save_tokenizer, source, sources_of, succeed, tree
from common.s3 import BUCKET, Faulty, s3_server  # noqa: F401
from composer.utils.object_store import S3ObjectStore
from llmfoundry.command_utils import train_from_yaml

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data import documents, parts, s3, streams, tokenizer

pytestmark = pytest.mark.streaming

L = 16
TEXTS = [f'document {number}: ' + 'streams of superposed tokens, ' * (number % 7 + 1) for number in range(60)]


@pytest.fixture(scope='module')
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tokenizer.train_tokenizer(TEXTS, 300), tmp_path_factory.mktemp('tokenizer'))


@pytest.fixture(scope='module')
def client(s3_server: str) -> Any:  # noqa: F811
    return boto3.client('s3', endpoint_url=s3_server)


def put_jsonl(client: Any, key: str, texts: list[str]) -> None:
    data = ''.join(json.dumps({'body': text}) + '\n' for text in texts).encode()
    client.put_object(Bucket=BUCKET, Key=key, Body=gzip.compress(data, mtime=0) if key.endswith('.gz') else data)


def objects(client: Any, prefix: str) -> dict[str, bytes]:
    found = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get('Contents', [])
    return {
        item['Key'].removeprefix(prefix): client.get_object(Bucket=BUCKET, Key=item['Key'])['Body'].read()
        for item in found
    }


def test_from_text_in_a_bucket_to_a_superposed_training_run(
    client: Any, tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By what `llmfoundry train` calls."""
    monkeypatch.chdir(tmp_path)
    put_jsonl(client, 'raw/a.jsonl', TEXTS[:30])
    put_jsonl(client, 'raw/b.jsonl.gz', TEXTS[30:])
    for hidden in ('raw/.DS_Store', 'raw/.parts/a.jsonl'):
        client.put_object(Bucket=BUCKET, Key=hidden, Body=b'no document')
    result = prepare(
        f's3://{BUCKET}/raw', '--text-key', 'body', '--output', f's3://{BUCKET}/data', '--seq-len', L,
        '--tokenizer', tokenizer_dir, '--split', 'train=0.8,val=0.2', '--hashes', 'sha1', '--verify',
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made = [name for name in objects(client, 'data/') if not name.startswith('.records/')]
    shards = sorted(name for name in made if name.endswith('.mds'))
    indexes = [f'{split}/{name}' for split in ('train', 'val') for name in ('index.json', '00000/index.json')]
    assert sorted(made) == sorted([*shards, *indexes, 'stats.json'])

    config = {
        'seed': 1,
        'max_seq_len': L,
        'max_duration': '4ba',
        'algorithms': {'token_superposition': {'bag_size': 2, 'duration': '0.5dur'}},
        'model': {
            'name': 'mpt_causal_lm',
            'd_model': 16,
            'n_heads': 2,
            'n_layers': 1,
            'expansion_ratio': 2,
            'max_seq_len': L,
            'vocab_size': 300,
            'loss_fn': 'torch_crossentropy',
            'attn_config': {'attn_impl': 'torch'},
        },
        'tokenizer': {'name': tokenizer_dir, 'kwargs': {'model_max_length': L}},
        'train_loader': {
            'name': 'text',
            'dataset': {
                'remote': f's3://{BUCKET}/data',
                'local': str(tmp_path / 'cache'),
                'split': 'train',
                'shuffle': True,
                'max_seq_len': L,
                'validate_hash': 'sha1',
            },
            'drop_last': True,
            'num_workers': 0,
            'prefetch_factor': None,
            'persistent_workers': False,
        },
        'optimizer': {'name': 'decoupled_adamw', 'lr': 1e-3},
        'scheduler': {'name': 'constant_with_warmup', 't_warmup': '0ba'},
        'precision': 'fp32',
        'global_train_batch_size': 2,
        'device_train_microbatch_size': 2,
        'eval_interval': 0,
        'loggers': {'tensorboard': {'log_dir': str(tmp_path / 'logs')}},
        'progress_bar': False,
        'log_to_console': False,
    }
    path = tmp_path / 'train.yaml'
    path.write_text(yaml.safe_dump(config))
    train_from_yaml(str(path)).close()
    streamed = {str(path.relative_to(tmp_path / 'cache')) for path in (tmp_path / 'cache' / 'train').rglob('*.mds')}
    assert {name for name in shards if name.startswith('train/')} <= streamed
    # Composer, which would keep checkpoints there, finds the same server.
    assert f'data/{shards[0]}' in S3ObjectStore(BUCKET).list_objects('data/')


def test_no_index_is_in_the_bucket_before_everything_else_is(
    client: Any, tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(parts, 'PART_BYTES', 1000)
    put_jsonl(client, 'late/a.jsonl', TEXTS)
    client.put_object(Bucket=BUCKET, Key='late/z.jsonl', Body=b'{"body": "x"}\noops\n')
    arguments = [f's3://{BUCKET}/late/*.jsonl', '--text-key', 'body', '--seq-len', L, '--tokenizer', tokenizer_dir]
    sentence = refuse(*arguments, '--output', f's3://{BUCKET}/late-data')
    assert sentence.startswith(f's3://{BUCKET}/late/z.jsonl, line 2: malformed JSON')
    left = objects(client, 'late-data/')
    assert '.records/begun.json' in left
    assert not {'train/index.json', 'val/index.json'} & left.keys()
    succeed(*arguments, '--output', f's3://{BUCKET}/late-data', '--skip-bad')
    succeed(*arguments, '--output', tmp_path / 'local', '--skip-bad')
    assert objects(client, 'late-data/') == tree(tmp_path / 'local')


# Inputs in a bucket

ODD = [
    'a[1].txt',
    'a1.txt',
    'what?.txt',
    'whatx.txt',
    'a?versionId=7.txt',
    'b.jsonl?versionId=7/x.txt',
    'b c+d%20.txt',
    'dir//x.txt',
    'é.txt',
    '#.txt',
]


def texts_of(*inputs: str) -> list[str]:
    found = []
    for each in sources_of(*inputs):
        for document in documents.read_documents(documents.Piece(each), 'body'):
            assert isinstance(document, documents.Document), document
            found.append(document.text)
    return found


def test_every_key_is_read_as_what_it_is(client: Any):
    root = f's3://{BUCKET}/odd'
    for key in ODD:
        client.put_object(Bucket=BUCKET, Key=f'odd/{key}', Body=key.encode())
    client.put_object(Bucket=BUCKET, Key='odd/folder/', Body=b'')
    for key in ODD:
        assert texts_of(f'{root}/{key}') == [key]
    for folder in (root, f'{root}/', f'{root}/*', f's3://{BUCKET}/od?'):
        assert texts_of(folder) == sorted(ODD)
    assert texts_of(f'{root}/a[[]*') == ['a[1].txt']
    assert texts_of(f'{root}/*x.txt') == ['whatx.txt']
    assert texts_of(f'{root}/**/x.txt') == ['b.jsonl?versionId=7/x.txt', 'dir//x.txt']


def test_a_prefix_that_is_an_object_too_is_both(client: Any):
    for key in ('both.txt', 'both.txt/x.txt', 'both.txt/y.txt', 'bother.txt'):
        client.put_object(Bucket=BUCKET, Key=key, Body=key.encode())
    assert texts_of(f's3://{BUCKET}/both.txt') == ['both.txt', 'both.txt/x.txt', 'both.txt/y.txt']
    assert texts_of(f's3://{BUCKET}/both.txt/') == ['both.txt/x.txt', 'both.txt/y.txt']


def test_an_object_that_changes_while_it_is_read_is_refused(client: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(s3, 'BLOCK_BYTES', 100)
    put_jsonl(client, 'changing.jsonl', TEXTS)
    reading_it = documents.read_documents(documents.Piece(source(f's3://{BUCKET}/changing.jsonl')), 'body')
    monkeypatch.setattr(streams, 'BLOCK_BYTES', 100)
    put_jsonl(client, 'changing.jsonl', TEXTS[::-1])
    with pytest.raises(CommandError, match='changed after it was listed'):
        list(reading_it)


def test_a_copy_of_the_cache_of_a_hub_is_read_once(client: Any, capsys: pytest.CaptureFixture[str]):
    """Where there are no links, the copies without a format are left out; partitions and Spark as on a disk."""
    data = json.dumps({'body': 'text'}).encode()
    for key in (
        'blobs/0a1b2c',
        'refs/main',
        'snapshots/abc/a=1/train.jsonl',
        'snapshots/_temporary/0/_temporary/x.json',
    ):
        client.put_object(Bucket=BUCKET, Key=f'hub/{key}', Body=data)
    root = f's3://{BUCKET}/hub'
    assert texts_of(root) == ['text']
    said = capsys.readouterr().err
    assert f'1 that Spark leaves (as {root}/snapshots/_temporary)' in said
    assert f'2 without a format in their names (as {root}/blobs/0a1b2c)' in said
    with pytest.raises(CommandError, match='blobs/0a1b2c has no format in its name'):
        sources_of(f'{root}/blobs/0a1b2c')


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, 'FIRST_PAUSE', 0.01)
    monkeypatch.setattr(s3, 'READ_SECONDS', 0.5)
    monkeypatch.setattr(s3, 'TRIES', 3)


@pytest.mark.parametrize('name', ['faulty.jsonl', 'faulty.jsonl.gz', 'faulty.parquet'])
@pytest.mark.parametrize('fault', ['cut', 'timeout', '503', 'reset'])
def test_a_body_that_does_not_come_whole_is_fetched_again_and_is_never_bad_data(
    client: Any, s3_server: str, name: str, fault: str, monkeypatch: pytest.MonkeyPatch, impatient: None  # noqa: F811
):  # fmt: skip
    if name.endswith('parquet'):
        buffer = io.BytesIO()
        pq.write_table(pa.table({'body': TEXTS}), buffer)
        client.put_object(Bucket=BUCKET, Key=name, Body=buffer.getvalue())
    else:
        put_jsonl(client, name, TEXTS)
    server = Faulty(s3_server, fault, 2)
    monkeypatch.setenv('S3_ENDPOINT_URL', server.url)
    assert texts_of(f's3://{BUCKET}/{name}') == TEXTS
    assert server.faults == 0
    if name == 'faulty.jsonl':
        server.faults = 1000
        with pytest.raises(
            CommandError, match=f'cannot read s3://{BUCKET}/{name}: .*, 3 times; when it can be reached'
        ):
            texts_of(f's3://{BUCKET}/{name}')
    server.server.shutdown()


@pytest.mark.parametrize('fault', ['cut', '503', 'reset'])
def test_a_listing_that_does_not_come_whole_is_asked_for_again(
    client: Any, s3_server: str, fault: str, monkeypatch: pytest.MonkeyPatch, impatient: None  # noqa: F811
):  # fmt: skip
    for number in range(20):
        client.put_object(Bucket=BUCKET, Key=f'listed-{fault}/{number:02}.txt', Body=b'%d' % number)
    server = Faulty(s3_server, fault, 2, 'listings')
    monkeypatch.setenv('S3_ENDPOINT_URL', server.url)
    assert texts_of(f's3://{BUCKET}/listed-{fault}') == [str(number) for number in range(20)]
    assert server.faults == 0
    server.server.shutdown()


def test_a_store_that_fails_again_and_again_gives_the_same_data_set(
    client: Any, s3_server: str, tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr(parts, 'PART_BYTES', 1000)
    put_jsonl(client, 'flaky/a.jsonl', TEXTS)
    arguments = [f's3://{BUCKET}/flaky', '--text-key', 'body', '--seq-len', L, '--tokenizer', tokenizer_dir]
    servers = [Faulty(s3_server, fault, 6, 'all') for fault in ('503', 'reset', 'cut')]
    for number, server in enumerate(servers):
        monkeypatch.setenv('S3_ENDPOINT_URL', server.url)
        succeed(*arguments, '--output', f's3://{BUCKET}/flaky-{number}', '--verify')
        assert server.faults == 0
    monkeypatch.setenv('S3_ENDPOINT_URL', s3_server)
    succeed(*arguments, '--output', tmp_path / 'local')
    for number, server in enumerate(servers):
        assert objects(client, f'flaky-{number}/') == tree(tmp_path / 'local')
        server.server.shutdown()


def test_two_runs_at_once_of_which_one_is_stopped_and_continued_make_one_data_set(
    client: Any, s3_server: str, tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
):  # fmt: skip
    """With gzip, whose bytes would hold the time, and hashes, which would tell."""
    texts = [f'{number} {text} ' * 30 for number, text in enumerate(TEXTS * 10)]
    for number in range(6):
        put_jsonl(client, f'both-runs/{number}.jsonl.gz', texts[number::6])
    place = Bucket(client, 'both-runs-out')
    script = (
        'import sys; from composer_tst.cli.prepare_data import command, parts; '
        'parts.PART_BYTES = 1; command.app(sys.argv[1:])'
    )
    arguments = [
        f's3://{BUCKET}/both-runs', '--text-key', 'body', '--seq-len', L, '--tokenizer', tokenizer_dir, '--split',
        'train=0.5,val=0.5', '--hashes', 'sha1', '--compression', 'gz', '--output', f'{place.root}/out',
    ]  # fmt: skip
    command = [sys.executable, '-c', script, *map(str, arguments)]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) for _ in range(2)]
    deadline = time.monotonic() + 120
    while not any('part.' in name for name in place.files('out/.records')):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(runs[0].pid, signal.SIGSTOP)
    _, said = runs[1].communicate(timeout=300)
    assert runs[1].returncode == 0, said
    made = place.files('out')
    os.killpg(runs[0].pid, signal.SIGCONT)
    _, said = runs[0].communicate(timeout=300)
    assert runs[0].returncode == 0, said
    assert place.files('out') == made
    monkeypatch.setattr(parts, 'PART_BYTES', 1)
    succeed(*arguments, '--verify')
    for name, data in made.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.decompress(data) if name.endswith('.gz') else data)
        path.rename(path.with_suffix('')) if name.endswith('.gz') else None
    assert len(read_rows(tmp_path / 'train')) == json.loads(made['stats.json'])['splits']['train']['rows']


def test_a_bucket_that_is_not_there_gets_one_sentence(client: Any, tokenizer_dir: str):
    put_jsonl(client, 'one/a.jsonl', TEXTS)
    options = ['--tokenizer', tokenizer_dir, '--seq-len', L, '--text-key', 'body']
    for arguments in (
        ['s3://nowhere/raw', '--output', f's3://{BUCKET}/out'],
        [f's3://{BUCKET}/one', '--output', 's3://nowhere/out'],
    ):
        result = prepare(*arguments, *options)
        assert result.exit_code == 1
        assert 's3://nowhere/' in result.stderr.splitlines()[-1]
        assert 'there is no bucket of this name' in result.stderr.splitlines()[-1]
    result = prepare(f's3://{BUCKET}/nothing', '--output', f's3://{BUCKET}/out', *options)
    assert result.stderr.splitlines()[-1] == f'error: no input: s3://{BUCKET}/nothing is not there'


@contextmanager
def credentials_checked(url: str) -> Iterator[None]:
    """Have the server refuse keys that it did not give out, as ours."""

    def allow(actions: str) -> None:
        request = urllib.request.Request(
            f'{url}/moto-api/reset-auth', actions.encode(), {'Content-Type': 'text/plain'}, method='POST'
        )
        urllib.request.urlopen(request).close()

    allow('0')
    try:
        yield
    finally:
        allow('inf')


def test_refused_credentials_get_one_sentence(s3_server: str, client: Any, tokenizer_dir: str, tmp_path: Path):  # noqa: F811
    put_jsonl(client, 'secret/a.jsonl', TEXTS)
    (tmp_path / 'a.txt').write_text(TEXTS[0])
    options = ['--tokenizer', tokenizer_dir, '--seq-len', L]
    with credentials_checked(s3_server):
        result = prepare(f's3://{BUCKET}/secret', '--output', tmp_path / 'out', *options)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1].startswith(f'error: cannot list s3://{BUCKET}/secret: ')
        result = prepare(tmp_path / 'a.txt', '--output', f's3://{BUCKET}/out', *options)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1].startswith(f'error: cannot list s3://{BUCKET}/out/: ')
        assert ' times' not in result.stderr
    assert not os.path.exists(tmp_path / 'out')
