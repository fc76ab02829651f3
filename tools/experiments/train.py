"""Training what the record lacks, each run in a process of its own."""

import atexit
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from multiprocessing import connection
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch

from tools.experiments.record import Job, Row

if TYPE_CHECKING:
    from composer import Trainer

REPO = Path(__file__).parents[2]
SAVES = 8  # checkpoints of a run


def name(job: Job) -> str:
    """A name for a run's folder, another one if anything that the run depends on is changed."""
    text = re.sub(r'[^a-z0-9.]+', '-', f'{job.scale.name} {job.setting.name} lr {job.rate:g} seed {job.seed}'.lower())
    yaml = REPO / job.scale.yaml
    configs = [config.read_text() for config in [yaml.with_suffix('') / 'config.json'] if config.exists()]
    made_of = [
        json.dumps(overrides(job)),
        yaml.read_text(),
        *configs,
        (Path(job.scale.data) / 'stats.json').read_text(),
    ]
    return f'{text}-{hashlib.sha256("".join(made_of).encode()).hexdigest()[:8]}'


def overrides(job: Job) -> list[str]:
    """llm-foundry's command line."""
    return [
        *job.scale.overrides,
        f'variables.data={job.scale.data}',
        f'seed={job.seed}',
        f'max_duration={job.steps}ba',
        f'eval_interval={job.steps}ba',
        f'save_interval={math.ceil(job.steps / SAVES)}ba',
        f'optimizer.lr={job.rate}',
        f'scheduler.t_warmup={job.scale.steps // 20}ba',
        *job.setting.algorithm,
    ]


class Pool:
    """Runs that train at the same time."""

    def __init__(self, folder: Path, workers: int):
        self.folder, self.workers = folder, workers
        self._threads = ThreadPoolExecutor(workers)
        self._processes = multiprocessing.get_context('forkserver')
        self._processes.set_forkserver_preload(['llmfoundry.command_utils'])
        self._running: dict[Future[Row], Job] = {}
        self._live: set[Any] = set()

    def train(self, jobs: list[Job]) -> Row:
        """Begin the first of some runs that are not under way, as many as there are workers for; wait for one to end.

        Raises:
            RuntimeError: If the process of a run fails or is killed.
        """
        under_way = {job.key for job in self._running.values()}
        for job in jobs:
            if job.key not in under_way and len(self._running) < self.workers:
                print(f'{name(job)} begins', flush=True)
                self._running[self._threads.submit(self._train, job)] = job
        ended, _ = wait(self._running, return_when=FIRST_COMPLETED)
        first = ended.pop()  # the next call returns the others at once
        del self._running[first]
        return first.result()

    def _train(self, job: Job) -> Row:
        here, there = self._processes.Pipe(duplex=False)
        process = self._processes.Process(target=_train, args=(job, self.folder, there))
        process.start()
        self._live.add(process)
        there.close()
        try:
            return here.recv()
        except EOFError:
            process.join()
            raise RuntimeError(
                f'{name(job)} ended without a result, exit code {process.exitcode}: see above.'
            ) from None
        finally:
            self._live.discard(process)

    def close(self) -> None:
        """End what is under way."""
        for process in [*self._live]:
            process.terminate()
        self._threads.shutdown(cancel_futures=True)


def _train(job: Job, folder: Path, result: Any) -> None:
    """Train one run and send its row, in a process of its own."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    # Ends with its parent, however that ends: else it goes on beside the one that takes its place.
    Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    try:
        result.send(_row(job, folder))
    finally:
        # A child of multiprocessing ends without what is registered to run at exit. There streaming frees its shared
        # memory; else Python's resource tracker does, and complains of a leak.
        atexit._run_exitfuncs()


def _row(job: Job, folder: Path) -> Row:
    os.environ['CUDA_VISIBLE_DEVICES'] = ''  # Composer trains on a GPU where there is one
    scale, run = job.scale, name(job)
    checkpoints = folder / run / 'checkpoints'
    if list(checkpoints.glob(f'ep*-ba{job.steps}-rank0.pt')):
        shutil.rmtree(checkpoints)  # it ended, but its row was not written or was deleted: it cannot go on
    place = [f'variables.folder={folder}', f'run_name={run}', 'python_log_level=warning']
    # Without autocast's cache, which would hold the weights of the first step.
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=scale.autocast, cache_enabled=False):
        trainer = _run(str(REPO / scale.yaml), [*overrides(job), *place])
    loss = float(trainer.state.eval_metrics['eval']['LanguageCrossEntropy'].compute())
    tokens = json.loads((Path(scale.data) / 'stats.json').read_text())['splits']['train']['tokens']
    row = Row(
        *(scale.name, scale.text, job.setting.name, job.seed, job.rate),
        steps=int(trainer.state.timestamp.batch),
        tokens_per_step=scale.tokens_per_step,
        final_loss=loss if math.isfinite(loss) else math.inf,
        seconds=round(trainer.state.timestamp.total_wct.total_seconds(), 1),
        versions=f'python=={platform.python_version()} torch=={torch.__version__} text=={tokens}',
    )
    trainer.close()
    return row


def _run(yaml: str, given: list[str]) -> 'Trainer':
    from llmfoundry.command_utils import train_from_yaml

    for _ in range(2):
        # StreamingDatasets made at one moment may choose one name for their shared memory: the second finds it taken.
        with contextlib.suppress(FileExistsError):
            return train_from_yaml(yaml, given)
    return train_from_yaml(yaml, given)
