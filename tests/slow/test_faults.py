"""Kills at random moments, and two nodes of which one is killed: `make test-faults`."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from common.runs import Run, assert_same, assert_same_end, config, drawn, write_rows
from common.s3 import BUCKET, reserve_port, s3_server  # noqa: F401
from omegaconf import OmegaConf
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

pytestmark = pytest.mark.streaming

LONG = {
    'max_duration': '400ba',
    'save_interval': '7ba',
    'save_num_checkpoints_to_keep': 2,
    'algorithms__token_superposition__phases': [
        {'bag_size': 3, 'until': '0.2dur'},
        {'bag_size': 2, 'until': '0.5dur'},
    ],
}


@pytest.mark.faults
@pytest.mark.parametrize('workers', [0, 2])
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(workers: int, tmp_path: Path):
    """20 kills, each at some moment of starting, drawing, training or saving."""
    write_rows(tmp_path / 'data', 203)
    loader = {
        'train_loader__num_workers': workers,
        'train_loader__prefetch_factor': 2 if workers else None,
        'train_loader__persistent_workers': bool(workers),
    }

    def start(name: str) -> Run:
        made = config(tmp_path / 'data', tmp_path / name, **LONG, **loader)
        return Run(made, tmp_path / name / 'log')

    whole, rows = start('whole'), tmp_path / 'whole' / 'rows-0.jsonl'
    while whole.processes[0].is_alive() and not rows.exists():
        time.sleep(0.01)
    begun = time.monotonic()
    whole.wait()
    # So that 20 kills fit into the run, however fast it is.
    longest = (time.monotonic() - begun) / 16
    random.seed(workers)
    kills = training = 0
    while kills < 20:
        run = start('killed')
        rows = tmp_path / 'killed' / 'rows-0.jsonl'
        size = rows.stat().st_size if rows.exists() else 0
        if kills % 5:  # one in five while it starts
            while run.processes[0].is_alive() and (not rows.exists() or rows.stat().st_size == size):
                time.sleep(0.01)
        time.sleep(random.uniform(0, longest))
        if not run.processes[0].is_alive():
            break  # faster than the whole one was: most of the kills must have been had by then
        run.kill()
        kills += 1
        training += bool(rows.exists() and rows.stat().st_size > size)
    else:
        run = start('killed')
    run.wait()
    assert kills >= 10, f'it ended before it could be killed\n{run.printed()[-3000:]}'
    assert_same_end(tmp_path / 'killed', tmp_path / 'whole')
    assert drawn(tmp_path / 'killed') == drawn(tmp_path / 'whole')
    print(f'{kills} kills, {training} of them while training; {run.printed().count("Autoresuming")} resumptions')


class Nodes:
    """Two `composer` launchers of two ranks each on loopback, each with a cache and a /dev/shm of its own."""

    def __init__(self, made: list[dict[str, Any]], folder: Path, environment: dict[str, str]):
        self.launchers: list[subprocess.Popen] = []
        self.folder = folder
        self.port = reserve_port()
        port = str(self.port.getsockname()[1])
        for node, settings in enumerate(made):
            yaml = folder / f'node{node}.yaml'
            place_of_its_own = folder / f'node{node}'  # where Composer's nodes leave signals that all name alike
            place_of_its_own.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.create(settings), yaml)
            place = ['-n', '2', '--world_size', '4', '--node_rank', str(node)]
            scripts = Path(sys.executable).parent
            command = [str(scripts / 'composer'), *place]
            command += ['--master_addr', '127.0.0.1', '--master_port', port]
            command += ['-c', str(scripts / 'llmfoundry'), 'train', str(yaml)]
            mount = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
            command = ['unshare', '--map-root-user', '--mount', 'sh', '-c', mount, 'sh', *command]
            log = (folder / f'node{node}.log').open('a')
            env = os.environ | environment | {'OMP_NUM_THREADS': '1', 'COLUMNS': '500', 'CUDA_VISIBLE_DEVICES': ''}
            self.launchers.append(
                subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=place_of_its_own, start_new_session=True
                )
            )

    def wait(self, timeout: float) -> list[int]:
        deadline = time.monotonic() + timeout
        try:
            return [launcher.wait(max(1, deadline - time.monotonic())) for launcher in self.launchers]
        finally:
            self.kill(0)
            self.kill(1)

    def kill(self, node: int) -> None:
        """SIGKILL to a node: its launcher and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.launchers[node].pid, signal.SIGKILL)
        self.launchers[node].wait()

    def printed(self) -> str:
        return ''.join((self.folder / f'node{node}.log').read_text()[-3000:] for node in (0, 1))


@pytest.mark.faults
def test_two_nodes_of_which_one_is_killed_end_with_the_same_weights(
    s3_server: str,  # noqa: F811
    tmp_path: Path,
):
    """MDS from S3, FSDP with sharded checkpoints; the other node fails with it, and both are started again."""
    write_rows(tmp_path / 'data', 203)
    client = boto3.client('s3', endpoint_url=s3_server)
    for path in (tmp_path / 'data' / 'train').iterdir():
        client.upload_file(str(path), BUCKET, f'rows/train/{path.name}')

    def start(name: str) -> Nodes:
        made = []
        for node in (0, 1):
            settings = {
                'train_loader__dataset__remote': f's3://{BUCKET}/rows',
                'train_loader__dataset__local': str(tmp_path / name / f'cache{node}'),
                'global_train_batch_size': 8,
                'device_train_microbatch_size': 2,
                'fsdp_config': {'sharding_strategy': 'FULL_SHARD', 'state_dict_type': 'sharded'},
                'callbacks': {'phase_checkpointer': {}},
                'save_interval': '4ba',
                'dist_timeout': 60,
                'max_duration': '60ba',
            }
            made.append(config(tmp_path / 'data', tmp_path / name, **settings))
        return Nodes(made, tmp_path / name, {'FSDP_VERSION': '2', 'S3_ENDPOINT_URL': s3_server})

    def end(name: str) -> dict[str, Any]:
        (last,) = (tmp_path / name / 'checkpoints').glob('ep*-ba60')
        dcp_to_torch_save(str(last), tmp_path / name / 'last.pt')
        return torch.load(tmp_path / name / 'last.pt', weights_only=False)['state']

    whole = start('whole')
    assert whole.wait(900) == [0, 0], whole.printed()

    nodes = start('killed')
    deadline = time.monotonic() + 600
    checkpoints = tmp_path / 'killed' / 'checkpoints'
    while not list(checkpoints.glob('ep*-ba8/.metadata')):
        assert time.monotonic() < deadline, nodes.printed()
        time.sleep(0.05)
    nodes.kill(1)
    assert nodes.wait(300)[0] != 0
    assert not list(checkpoints.glob('ep*-ba60')), 'it ended before the node was killed'

    again = start('killed')
    assert again.wait(900) == [0, 0], again.printed()
    assert 'Autoresuming training from checkpoint' in (again.folder / 'node0.log').read_text()
    ours, theirs = end('killed'), end('whole')
    for key in ('model', 'optimizers', 'timestamp', 'algorithms', 'dataset_state'):
        assert_same(ours[key], theirs[key], key)
