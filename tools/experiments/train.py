"""Training what is not yet trained, several runs at a time, each in a process of its own."""

import atexit
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tools.benchmarks.machine import machine
from tools.experiments.scales import Scale, Setting

if TYPE_CHECKING:
    from composer import Trainer

REPO = Path(__file__).parents[2]


@dataclass(frozen=True)
class Result:
    """What one run came to.

    Args:
        final_loss: Next-token validation loss at the end, in nats per token; infinite if it diverged.
        steps: Training steps.
        data_tokens: Tokens read in training.
        parameters: Parameters of the model.
        seconds: Seconds of training steps, start-up and evaluation left out.
        machine: What it was trained on, in a line.
        text: Tokens that its data had to train on; 0 of runs of before this was kept.
    """

    final_loss: float
    steps: int
    data_tokens: int
    parameters: int
    seconds: float
    machine: str
    text: int = 0


@dataclass(frozen=True)
class Job:
    """One run: a setting at a seed and a learning rate."""

    setting: Setting
    seed: int
    lr: float
    scale: Scale

    def name(self, data: Path) -> str:
        """A name for files, another one if anything that the run depends on is changed."""
        text = re.sub(r'[^a-z0-9.]+', '-', f'{self.setting.name} lr {self.lr:g} seed {self.seed}'.lower())
        yaml = REPO / self.scale.yaml
        made_of = [json.dumps(self.overrides(data)), yaml.read_text()]
        made_of += [config.read_text() for config in [yaml.with_suffix('') / 'config.json'] if config.exists()]
        if self.scale.tokens_per_parameter is None:  # else, of other versions of packages, it is other text of a kind
            made_of.append((data / 'stats.json').read_text())
        return f'{text}-{hashlib.sha256("".join(made_of).encode()).hexdigest()[:8]}'

    @property
    def steps(self) -> int:
        """Training steps."""
        return round(self.setting.length * self.scale.steps)

    def overrides(self, data: Path) -> list[str]:
        """llm-foundry's command line."""
        setting, scale, steps = self.setting, self.scale, self.steps
        warmup = scale.warmup if setting.warmup is None else round(setting.warmup * steps)
        return [
            *scale.overrides,
            f'variables.data={data}',
            f'seed={self.seed}',
            f'max_duration={steps}ba',
            f'eval_interval={steps}ba',
            f'optimizer.lr={self.lr}',
            f'scheduler.t_warmup={warmup}ba',
            *setting.algorithm,
        ]


def train_all(jobs: Iterable[Job], data: Path, folder: Path, workers: int) -> Iterator[dict[Job, Result]]:
    """Train every job that has no result in ``folder`` yet: yields what there is, then each result as it comes.

    Raises:
        RuntimeError: If the process of a run fails or is killed.
    """
    wanted = list(dict.fromkeys(jobs))
    there = finished(wanted, data, folder)
    yield there
    missing = [job for job in wanted if job not in there]
    processes = multiprocessing.get_context('forkserver')
    processes.set_forkserver_preload(['llmfoundry.command_utils'])

    def train(job: Job) -> dict[Job, Result]:
        process = processes.Process(target=_train, args=(job, data, folder))
        process.start()
        process.join()
        # Not by its exit code, which multiprocessing may lose where one thread starts a process as another's ends.
        if not _result_file(job, data, folder).exists():
            raise RuntimeError(f'{job.name(data)} ended without a result, exit code {process.exitcode}: see above.')
        return {job: _result(job, data, folder)}

    pool = ThreadPoolExecutor(workers)
    try:
        yield from pool.map(train, missing)
    finally:
        pool.shutdown(cancel_futures=True)


def finished(jobs: Iterable[Job], data: Path, folder: Path) -> dict[Job, Result]:
    """The results that there are."""
    return {job: _result(job, data, folder) for job in jobs if _result_file(job, data, folder).exists()}


def _result(job: Job, data: Path, folder: Path) -> Result:
    return Result(**json.loads(_result_file(job, data, folder).read_text()))


def _result_file(job: Job, data: Path, folder: Path) -> Path:
    return folder / f'{job.name(data)}.json'


def _train(job: Job, data: Path, folder: Path) -> None:
    """Train one run and write its result, in a process of its own."""
    try:
        _train_and_write(job, data, folder)
    finally:
        # A child of multiprocessing ends without what is registered to run at exit. There streaming frees its shared
        # memory; else Python's resource tracker does, and complains of a leak.
        atexit._run_exitfuncs()


def _train_and_write(job: Job, data: Path, folder: Path) -> None:
    if job.scale.device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''  # Composer trains on a GPU where there is one
    name = job.name(data)
    checkpoints = folder / name / 'checkpoints'
    if list(checkpoints.glob(f'ep*-ba{job.steps}-rank0.pt')):
        shutil.rmtree(checkpoints)  # killed after the end but before its result was written: it cannot go on
    place = [f'variables.folder={folder}', f'run_name={name}', 'python_log_level=warning']
    # Without autocast's cache, which would hold the weights of the first step.
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=job.scale.autocast, cache_enabled=False):
        trainer = _run(str(REPO / job.scale.yaml), [*job.overrides(data), *place])
    loss = float(trainer.state.eval_metrics['eval']['LanguageCrossEntropy'].compute())
    result = Result(
        final_loss=loss if math.isfinite(loss) else math.inf,
        steps=int(trainer.state.timestamp.batch),
        data_tokens=int(trainer.state.timestamp.token),
        parameters=sum(weight.numel() for weight in trainer.state.model.parameters()),
        seconds=trainer.state.timestamp.total_wct.total_seconds(),
        machine=machine(torch.device(job.scale.device)),
        text=json.loads((data / 'stats.json').read_text())['splits']['train']['tokens'],
    )
    trainer.close()
    shutil.rmtree(checkpoints)
    path = _result_file(job, data, folder)
    path.with_suffix('.part').write_text(json.dumps(asdict(result), indent=1) + '\n')
    path.with_suffix('.part').rename(path)


def _run(yaml: str, overrides: list[str], attempts: int = 3) -> 'Trainer':
    from llmfoundry.command_utils import train_from_yaml

    from tools.experiments.variants import register

    register()
    try:
        return train_from_yaml(yaml, overrides)
    except FileExistsError:
        # StreamingDatasets made at one moment may choose one name for their shared memory: the second finds it taken.
        if attempts == 1:
            raise
        return _run(yaml, overrides, attempts - 1)
