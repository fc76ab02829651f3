"""tools/prepare_data.py against a real S3 server, up to a training run that streams what it made."""

import gzip
import json
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from composer.utils.object_store import S3ObjectStore
from llmfoundry.command_utils import train_from_yaml
from s3_server import BUCKET, s3_server  # noqa: F401

# First, since it makes the tools importable.
from preparing import prepare, prepare_until_killed  # isort: skip
from data_prep import local, parts, tokenizer

L = 16
TEXTS = [f'document {number}: ' + 'streams of superposed tokens, ' * (number % 7 + 1) for number in range(60)]


@pytest.fixture(scope='module')
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp('tokenizer'))
    tokenizer.save_tokenizer(tokenizer.train_tokenizer(TEXTS, 300), folder)
    return folder


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
    made = objects(client, 'data/')
    shards = sorted(name for name in made if name.endswith('.mds'))
    assert sorted(made) == sorted([*shards, 'stats.json', 'train/index.json', 'val/index.json'])

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
    streamed = {path.name for path in (tmp_path / 'cache' / 'train').iterdir()}
    assert {Path(name).name for name in shards if name.startswith('train/')} <= streamed
    # Composer, which would keep checkpoints there, finds the same server.
    assert f'data/{shards[0]}' in S3ObjectStore(BUCKET).list_objects('data/')


def test_no_index_is_in_the_bucket_before_everything_else_is(
    client: Any, tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(parts, 'PART_BYTES', 1000)
    put_jsonl(client, 'late/a.jsonl', TEXTS)
    client.put_object(Bucket=BUCKET, Key='late/z.jsonl', Body=b'{"body": "x"}\noops\n')
    arguments = [f's3://{BUCKET}/late/*.jsonl', '--text-key', 'body', '--seq-len', L, '--tokenizer', tokenizer_dir]
    result = prepare(*arguments, '--output', f's3://{BUCKET}/late-data')
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f'error: s3://{BUCKET}/late/z.jsonl, line 2: malformed JSON'
    left = objects(client, 'late-data/')
    assert '.parts/arguments.json' in left
    assert not any(name.endswith('index.json') for name in left)

    result = prepare(*arguments, '--seq-len', L + 1, '--output', f's3://{BUCKET}/late-data')
    assert result.exit_code == 1
    assert 'begun with another --seq-len' in result.stderr

    client.put_object(Bucket=BUCKET, Key='late/z.jsonl', Body=b'{"body": "x"}\n')
    assert prepare(*arguments, '--output', f's3://{BUCKET}/late-data').exit_code == 0
    assert prepare(*arguments, '--output', tmp_path / 'local').exit_code == 0
    local = {
        str(path.relative_to(tmp_path / 'local')): path.read_bytes()
        for path in (tmp_path / 'local').rglob('*')
        if path.is_file()
    }
    assert objects(client, 'late-data/') == local

    result = prepare(*arguments, '--output', f's3://{BUCKET}/late-data')
    assert result.exit_code == 1
    assert 'late-data exists' in result.stderr


@pytest.mark.faults
def test_killed_while_it_writes_to_a_bucket_it_goes_on_from_finished_parts(
    client: Any, tokenizer_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(parts, 'PART_BYTES', 1000)
    put_jsonl(client, 'kill/a.jsonl', TEXTS)
    arguments = [f's3://{BUCKET}/kill', '--text-key', 'body', '--seq-len', L, '--tokenizer', tokenizer_dir]
    prepare_until_killed(*arguments, '--output', f's3://{BUCKET}/killed')
    left = objects(client, 'killed/')
    finished = [name for name in left if name.startswith('.parts/part.')]
    assert len(finished) >= 3
    assert not any(name.endswith('index.json') for name in left)

    converted = []
    parallel = local.parallel

    def watched(function: Any, job: Any, items: Any, report: Any) -> Iterator[Any]:
        converted.extend(items)
        return parallel(function, job, items, report)

    monkeypatch.setattr(local, 'parallel', watched)
    assert prepare(*arguments, '--output', f's3://{BUCKET}/killed').exit_code == 0
    assert {f'.parts/part.{number:06}.json' for number, _ in converted}.isdisjoint(finished)
    assert prepare(*arguments, '--output', f's3://{BUCKET}/whole').exit_code == 0
    assert objects(client, 'killed/') == objects(client, 'whole/')


def test_a_bucket_that_is_not_there_gets_one_sentence(client: Any, tokenizer_dir: str):
    put_jsonl(client, 'one/a.jsonl', TEXTS)
    options = ['--tokenizer', tokenizer_dir, '--seq-len', L, '--text-key', 'body']
    for arguments in (
        ['s3://nowhere/raw', '--output', f's3://{BUCKET}/out'],
        [f's3://{BUCKET}/one', '--output', 's3://nowhere/out'],
    ):
        result = prepare(*arguments, *options)
        assert result.exit_code == 1
        assert 'there is no bucket nowhere' in result.stderr.splitlines()[-1]
    result = prepare(f's3://{BUCKET}/nothing', '--output', f's3://{BUCKET}/out', *options)
    assert result.stderr.splitlines()[-1] == f'error: no input: s3://{BUCKET}/nothing matches no file'


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
        assert result.stderr.splitlines()[-1] == f'error: cannot use s3://{BUCKET}/secret: access denied'
        result = prepare(tmp_path / 'a.txt', '--output', f's3://{BUCKET}/out', *options)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1] == f'error: cannot use s3://{BUCKET}/out: access denied'
    assert not os.path.exists(tmp_path / 'out')
