"""Real llm-foundry trainings, each in a process of its own that starts in a second and may be killed.

The processes are forked off a server that has imported everything already. What they train on are rows that say which
sample they are, and what they draw they write down.
"""

import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer import Callback, DataSpec, State, Trainer
from composer.loggers import Logger
from composer.utils import dist
from llmfoundry import registry
from llmfoundry.command_utils import train_from_yaml
from omegaconf import OmegaConf
from streaming import MDSWriter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from common.s3 import reserve_port
from common.trainers import assert_same

ROW_LENGTH = 12
VOCAB_SIZE = 300
_BASE = 256

# Each start has a streaming cache of its own, as in a new container: a process killed while it starts leaves shared
# memory behind that claims its cache.
_starts = itertools.count()
_processes = multiprocessing.get_context('forkserver')
_processes.set_forkserver_preload(['common.preloaded'])


def write_rows(data: Path, count: int, size_limit: int = 1000, compression: str | None = 'zstd') -> Path:
    """MDS shards of ``count`` rows in ``data/train``, and a tokenizer for them in ``data/tokenizer``."""
    tokenizer = Tokenizer(WordLevel({f't{i}': i for i in range(VOCAB_SIZE)}, unk_token='t1'))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='t1', pad_token='t1').save_pretrained(
        data / 'tokenizer'
    )
    settings = {'compression': compression, 'hashes': ['sha1'], 'size_limit': size_limit}
    with MDSWriter(out=str(data / 'train'), columns={'tokens': f'ndarray:int32:{ROW_LENGTH}'}, **settings) as out:
        for i in range(count):
            out.write({'tokens': row(i)})
    return data


def row(i: int) -> np.ndarray:
    """Row ``i``, ``(ROW_LENGTH,)``: its first two tokens spell ``i``, the others are random."""
    tokens = np.random.default_rng(i).integers(2, VOCAB_SIZE, ROW_LENGTH, dtype=np.int32)
    tokens[:2] = 2 + i // _BASE, 2 + i % _BASE
    return tokens


def config(data: Path, folder: Path, **overrides: Any) -> dict[str, Any]:
    """A tiny llm-foundry run over ``data/train`` that saves every step to ``folder/checkpoints`` and resumes there.

    Args:
        data: What ``write_rows`` wrote.
        folder: Where the run keeps everything.
        **overrides: Dotted keys of the YAML, dots written as two underscores.
    """
    base = {
        'run_name': 'run',
        'seed': 5,
        'max_seq_len': ROW_LENGTH,
        'max_duration': '14ba',
        'algorithms': {
            'token_superposition': {'phases': [{'bag_size': 3, 'until': '3ba'}, {'bag_size': 2, 'until': '6ba'}]}
        },
        'model': {
            'name': 'mpt_causal_lm',
            'd_model': 16,
            'n_heads': 2,
            'n_layers': 1,
            'expansion_ratio': 2,
            'max_seq_len': ROW_LENGTH,
            'vocab_size': VOCAB_SIZE,
            'loss_fn': 'torch_crossentropy',
            'attn_config': {'attn_impl': 'torch'},
        },
        'tokenizer': {'name': str(data / 'tokenizer'), 'kwargs': {'model_max_length': ROW_LENGTH}},
        'train_loader': {
            'name': 'text',
            'dataset': {
                'remote': str(data),
                'local': str(folder / 'cache' / str(next(_starts))),
                'split': 'train',
                'shuffle': True,
                'max_seq_len': ROW_LENGTH,
                'num_canonical_nodes': 2,
            },
            'drop_last': True,
            'num_workers': 0,
            'prefetch_factor': None,
            'persistent_workers': False,
        },
        'optimizer': {'name': 'decoupled_adamw', 'lr': 1e-2},
        'scheduler': {'name': 'warmup_stable_decay', 't_warmup': '2ba', 't_decay': '0.25dur'},
        'callbacks': {'record_rows': {'folder': str(folder)}},
        'precision': 'fp32',
        'global_train_batch_size': 4,
        'device_train_microbatch_size': 4,
        'eval_interval': 0,
        'progress_bar': False,
        'log_to_console': False,
        'python_log_level': 'info',
        'save_folder': str(folder / 'checkpoints'),
        'save_interval': '1ba',
        'save_overwrite': True,
        'autoresume': True,
    }
    made = OmegaConf.create(base)
    for key, value in overrides.items():
        OmegaConf.update(made, key.replace('__', '.'), value, merge=False, force_add=True)
    plain = OmegaConf.to_container(made)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if value is not None}


class Run:
    """The processes of one training, one a rank.

    Args:
        config: What `llmfoundry train` would read.
        log: Where the processes print.
        ranks: How many processes there are in all.
        environment: More of it.
        train: What trains from the YAML; llm-foundry unless told otherwise.
    """

    def __init__(
        self,
        config: dict[str, Any],
        log: Path,
        ranks: int = 1,
        environment: dict[str, str] | None = None,
        train: Callable[[str], Trainer] = train_from_yaml,
    ):
        start_server()
        log.parent.mkdir(parents=True, exist_ok=True)
        yaml = log.with_suffix('.yaml')
        OmegaConf.save(OmegaConf.create(config), yaml)
        self.log = log
        self.processes: list[BaseProcess] = []
        self.port = reserve_port()
        port = self.port.getsockname()[1]
        address = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'WORLD_SIZE': str(ranks)}
        if ranks > 1:
            address['CUDA_VISIBLE_DEVICES'] = ''  # a GPU takes one rank
        for rank in range(ranks):
            place = {'RANK': rank, 'LOCAL_RANK': rank, 'LOCAL_WORLD_SIZE': ranks, 'NODE_RANK': 0}
            env = dict(os.environ) | address | {key: str(value) for key, value in place.items()} | (environment or {})
            process = _processes.Process(target=_train, args=(train, str(yaml), str(log), env))
            process.start()
            self.processes.append(process)

    def wait(self, timeout: float = 300) -> 'Run':
        """Wait for the run to succeed."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if any(code is None for code in codes):
            self.kill()
        assert not any(codes), f'{codes}\n{self.printed()[-4000:]}'
        assert None not in codes, f'still running after {timeout} s\n{self.printed()[-4000:]}'
        return self

    def fails(self, timeout: float = 300) -> str:
        """Wait for the run to fail by itself, and give what it printed."""
        self.processes[0].join(timeout)
        ended, code = not self.processes[0].is_alive(), self.processes[0].exitcode
        self.kill()
        assert ended, f'still running after {timeout} s\n{self.printed()[-4000:]}'
        assert code, self.printed()[-4000:]
        return self.printed()

    def kill(self) -> None:
        """SIGKILL to every process of the run and all that it started."""
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    process.kill()
        for process in self.processes:
            process.join()

    def printed(self) -> str:
        return self.log.read_text() if self.log.exists() else ''


def start_server() -> None:
    """Start it, if it has not been, where it can import what it is to have imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', str(Path(__file__).parents[1]), prepend=os.pathsep)
        forkserver.ensure_running()


def _train(train: Callable[[str], Trainer], yaml: str, log: str, environment: dict[str, str]) -> None:
    os.setpgid(0, 0)
    multiprocessing.set_start_method('fork', force=True)  # as in any other process, for loader workers
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    os.chdir(Path(log).parent)  # Composer makes folders named after S3 addresses where it is

    _register()
    train(yaml).close()
    sys.stdout.flush()


def _register() -> None:
    """Names for the YAML: the callback ``record_rows`` and the loader ``map_rows``."""

    @registry.callbacks.register('record_rows')
    class RecordRows(Callback):
        """Writes down the rows of each step, and may have the process killed before one."""

        def __init__(self, folder: str, die_at: int | None = None):
            self.folder = folder
            self.die_at = die_at

        def after_dataloader(self, state: State, logger: Logger) -> None:
            line = {
                'batch': int(state.timestamp.batch),
                'epoch': int(state.timestamp.epoch),
                'ids': row_ids(state.batch['input_ids']),
            }
            with open(f'{self.folder}/rows-{dist.get_global_rank()}.jsonl', 'a') as file:
                file.write(json.dumps(line) + '\n')
            if self.die_at == line['batch']:
                os.killpg(0, signal.SIGKILL)

    @registry.dataloaders.register('map_rows')
    def build_map_rows(count: int, shuffle: bool, tokenizer: Any, device_batch_size: int, **loader: Any) -> DataSpec:
        dataset: Any = [{'input_ids': torch.tensor(row(i)).long()} for i in range(count)]
        for sample in dataset:
            sample['labels'] = sample['input_ids'].clone()
        sampler = dist.get_sampler(dataset, shuffle=shuffle, drop_last=True)
        return DataSpec(DataLoader(dataset, device_batch_size, sampler=sampler, drop_last=True, **loader))

    assert RecordRows
    assert build_map_rows


def row_ids(input_ids: torch.Tensor) -> list[int]:
    """Which rows a batch holds, plain ``(B, L)`` or of joined rows ``(B, L, s)``, in order."""
    rows = input_ids.reshape(-1, ROW_LENGTH)
    return ((rows[:, 0] - 2) * _BASE + rows[:, 1] - 2).tolist()


def drawn(folder: Path, rank: int = 0) -> dict[tuple[int, int], list[int]]:
    """The rows of each ``(epoch, batch)``; a step that a resumed run took again must have drawn the same ones."""
    steps: dict[tuple[int, int], list[int]] = {}
    for line in (folder / f'rows-{rank}.jsonl').read_text().splitlines(keepends=True):
        if not line.endswith('}\n'):
            continue  # killed while it wrote
        step = json.loads(line)
        at = (step['epoch'], step['batch'])
        assert steps.setdefault(at, step['ids']) == step['ids'], f'step {at} drew other rows when it was taken again'
    return steps


def checkpoint(folder: Path, batch: int | None = None) -> Path:
    """The checkpoint after ``batch`` steps, or the latest."""
    if batch is None:
        return (folder / 'checkpoints' / 'latest-rank0.pt').resolve()
    (found,) = (folder / 'checkpoints').glob(f'ep*-ba{batch}-rank0.pt')
    return found


def assert_same_end(ours: Path, theirs: Path, ignore: Sequence[str] = ()) -> None:
    """The last checkpoints of two runs hold the same, to the bit, but for the time they took."""
    mine, other = (torch.load(checkpoint(folder), weights_only=False)['state'] for folder in (ours, theirs))
    for key in ('model', 'optimizers', 'schedulers', 'timestamp', 'algorithms', 'dataset_state', 'rank_zero_seed'):
        if key not in ignore:
            assert_same(mine.get(key), other.get(key), key)


def drawn_by_all(folder: Path, ranks: int, global_batch: int = 4) -> dict[tuple[int, int], list[int]]:
    """The rows of each ``(epoch, batch)`` of a run on several ranks, in the order of the data set.

    A StreamingDataset deals the samples of each loader batch out to the ranks one by one.
    """
    each = [drawn(folder, rank) for rank in range(ranks)]
    steps = {}
    for at in each[0]:
        batches = [torch.tensor(rank[at]).view(-1, global_batch // ranks) for rank in each]
        steps[at] = torch.stack(batches, -1).flatten().tolist()
    return steps
