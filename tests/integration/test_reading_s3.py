"""Training that streams its shards from S3, through both phases, and what becomes of it when reading fails."""

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from common.runs import Run, assert_same_end, config, drawn, write_rows
from common.s3 import BUCKET, serve

pytestmark = pytest.mark.streaming

ROWS = 503
SHARD = 4000
# Bytes, some of eight shards: with room for four and the index alone StreamingDataset may wait for ever.
CACHE_LIMIT = 26_000
WORKERS: dict[str, Any] = {
    'train_loader__num_workers': 2,
    'train_loader__prefetch_factor': 2,
    'train_loader__timeout': 5,
}


@pytest.fixture(scope='module')
def server() -> Iterator[tuple[str, subprocess.Popen]]:
    with serve() as started:
        yield started


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight shards of about four thousand bytes, not compressed."""
    folder = tmp_path_factory.mktemp('rows')
    write_rows(folder, ROWS, size_limit=SHARD, compression=None)
    return folder


def upload(data: Path, prefix: str, url: str, replace: dict[str, bytes | None] | None = None) -> str:
    """Put the shards into the bucket, some of them replaced or, where None, left out; give their address."""
    client: Any = boto3.client('s3', endpoint_url=url)
    for path in (data / 'train').iterdir():
        body = (replace or {}).get(path.name, path.read_bytes())
        if body is not None:
            client.put_object(Bucket=BUCKET, Key=f'{prefix}/train/{path.name}', Body=body)
    return f's3://{BUCKET}/{prefix}'


def reading(folder: Path, data: Path, remote: str, **overrides: Any) -> Run:
    settings = {
        'train_loader__dataset__remote': remote,
        'train_loader__dataset__validate_hash': 'sha1',
        'train_loader__dataset__predownload': 8,
        'max_duration': '150ba',
        'save_interval': '50ba',
    }
    return Run(config(data, folder, **(settings | overrides)), folder / 'log')


@pytest.fixture(scope='module')
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that reads the same shards from a local folder."""
    folder = tmp_path_factory.mktemp('whole')
    reading(folder, data, str(data)).wait()
    return folder


@pytest.mark.faults
def test_a_cache_smaller_than_the_data_trains_on_the_same_samples(
    server: tuple[str, Any], data: Path, whole: Path, tmp_path: Path
):
    remote = upload(data, 'small', server[0])
    assert sum(path.stat().st_size for path in (data / 'train').glob('*.mds')) > CACHE_LIMIT
    reading(tmp_path, data, remote, train_loader__dataset__cache_limit=CACHE_LIMIT).wait()
    assert drawn(tmp_path) == drawn(whole)
    assert_same_end(tmp_path, whole)
    # Two threads that fetch at one moment may each take the last room.
    assert sum(path.stat().st_size for path in (tmp_path / 'cache').rglob('*.mds')) <= CACHE_LIMIT + SHARD


@pytest.mark.faults
def test_a_server_that_does_not_answer_for_a_while_is_waited_for(
    server: tuple[str, subprocess.Popen], data: Path, whole: Path, tmp_path: Path
):
    url, process = server
    run = reading(tmp_path, data, upload(data, 'paused', url), train_loader__dataset__cache_limit=CACHE_LIMIT)
    while not (tmp_path / 'rows-0.jsonl').exists():
        assert run.processes[0].is_alive(), run.printed()[-3000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(3)
        assert run.processes[0].is_alive(), run.printed()[-3000:]
    finally:
        process.send_signal(signal.SIGCONT)
    run.wait()
    assert drawn(tmp_path) == drawn(whole)
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('fault', ['corrupted', 'missing'])
def test_a_shard_that_cannot_be_read_ends_the_run(
    fault: str, workers: int, server: tuple[str, Any], data: Path, whole: Path, tmp_path: Path
):
    """With an error that names it, before the epoch is taken for finished.

    In a StreamingDataset the other workers wait for the shard for ever: the loader's timeout ends that.
    """
    name = 'shard.00002.mds'
    body = bytearray((data / 'train' / name).read_bytes())
    body[-5] ^= 1
    remote = upload(data, f'{fault}{workers}', server[0], {name: bytes(body) if fault == 'corrupted' else None})
    printed = reading(tmp_path, data, remote, **(WORKERS if workers else {})).fails()
    if fault == 'corrupted':
        assert re.search(f'Checksum failure: .*/{name}', printed)
    else:
        assert f'{remote}/train/{name}' in printed
    if workers:
        assert 'DataLoader timed out' in printed
    else:
        assert 'of 125 loader batches: if data could not be read, the reason is above' in printed
        if (tmp_path / 'rows-0.jsonl').exists():
            steps, expected = drawn(tmp_path), drawn(whole)
            assert steps == {at: expected[at] for at in steps}
    assert not list((tmp_path / 'checkpoints').glob('ep1-*.pt'))


@pytest.mark.faults
def test_a_server_that_is_gone_ends_the_run(data: Path, tmp_path: Path):
    """With workers: without, a StreamingDataset may wait for ever for a shard whose download has failed."""
    # In order, and reading little ahead: most shards are yet to come after the first step.
    settings = {'train_loader__dataset__shuffle': False, 'train_loader__dataset__predownload': 8, **WORKERS}
    reading(tmp_path / 'whole', data, str(data), **settings).wait()
    with serve() as (url, process):
        run = reading(tmp_path / 'gone', data, upload(data, 'gone', url), **settings)
        while not (tmp_path / 'gone' / 'rows-0.jsonl').exists():
            assert run.processes[0].is_alive(), run.printed()[-3000:]
            time.sleep(0.01)
        process.kill()
        printed = run.fails()
    assert 'Could not connect to the endpoint' in printed or 'Connection was closed' in printed
    assert 'DataLoader timed out' in printed
    steps, expected = drawn(tmp_path / 'gone'), drawn(tmp_path / 'whole')
    assert 0 < len(steps) < 125
    assert steps == {at: expected[at] for at in steps}


@pytest.mark.faults
def test_phase_checkpoints_go_to_s3_and_a_recovery_run_forks_from_one(
    server: tuple[str, Any], data: Path, tmp_path: Path
):
    client: Any = boto3.client('s3', endpoint_url=server[0])
    reading(
        tmp_path / 'trunk',
        data,
        str(data),
        callbacks__phase_checkpointer={},
        max_duration='10ba',
        save_folder=f's3://{BUCKET}/trunk',
        save_interval='8ba',
    ).wait()
    keys = {item['Key'] for item in client.list_objects_v2(Bucket=BUCKET, Prefix='trunk/')['Contents']}
    assert {key for key in keys if 'bag' in key} == {
        'trunk/bag3-to-bag2/ep0-ba3-rank0.pt',
        'trunk/bag2-to-bag1/ep0-ba6-rank0.pt',
    }
    fork = f's3://{BUCKET}/trunk/bag2-to-bag1/ep0-ba6-rank0.pt'
    reading(tmp_path / 'fork', data, str(data), load_path=fork, max_duration='10ba').wait()
    steps = drawn(tmp_path / 'trunk')
    assert drawn(tmp_path / 'fork') == {at: ids for at, ids in steps.items() if at[1] >= 6}
    client.download_file(BUCKET, 'trunk/ep0-ba10-rank0.pt', str(tmp_path / 'trunk-end.pt'))
    ends = [
        torch.load(path, weights_only=False)['state']['model']
        for path in (tmp_path / 'trunk-end.pt', tmp_path / 'fork' / 'checkpoints' / 'ep0-ba10-rank0.pt')
    ]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
