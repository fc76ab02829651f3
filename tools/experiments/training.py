"""Training what is not yet trained, several runs at a time, each in a process of its own."""

import json
import multiprocessing
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from .settings import Scale, Setting

if TYPE_CHECKING:
    from composer import Trainer

YAML = Path(__file__).parents[2] / 'yamls' / 'quickstart' / 'baseline.yaml'


@dataclass(frozen=True)
class Result:
    """What one run came to.

    Args:
        overrides: What it was trained with, so that a changed setting is trained again.
        final_loss: Next-token validation loss at the end, in nats per token; infinite if it diverged.
        steps: Training steps.
        data_tokens: Tokens read in training.
        parameters: Parameters of the model.
        seconds: Seconds of training steps, start-up and evaluation left out.
    """

    overrides: list[str]
    final_loss: float
    steps: int
    data_tokens: int
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """One run: a setting at a seed and a learning rate."""

    setting: Setting
    seed: int
    lr: float
    scale: Scale

    @property
    def name(self) -> str:
        """A name for files, unlike that of any other job of the scale."""
        return re.sub(r'[^a-z0-9.]+', '-', f'{self.setting.name} lr {self.lr:g} seed {self.seed}'.lower())

    def overrides(self, data: Path) -> list[str]:
        """llm-foundry's command line."""
        setting, scale = self.setting, self.scale
        steps = round(setting.length * scale.steps)
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


def train_all(jobs: Iterable[Job], data: Path, folder: Path, workers: int) -> dict[Job, Result]:
    """Train every job that has no result in ``folder`` yet, and return the results of all."""
    wanted = list(dict.fromkeys(jobs))
    results = {job: result for job in wanted if (result := read(job, data, folder))}
    missing = [(job, data, folder) for job in wanted if job not in results]
    if not missing:
        return results
    processes = multiprocessing.get_context('forkserver')
    processes.set_forkserver_preload(['llmfoundry.command_utils'])
    with processes.Pool(workers, maxtasksperchild=1) as pool:
        for job, result in tqdm(pool.imap_unordered(_train, missing), total=len(missing), unit='run', disable=None):
            results[job] = result
        pool.close()  # leaving the block would end workers in the middle of their start, which may hang
        pool.join()
    return {job: results[job] for job in wanted}


def read(job: Job, data: Path, folder: Path) -> Result | None:
    """The result of a job, if it has been trained with the settings it has now."""
    path = folder / f'{job.name}.json'
    if not path.exists():
        return None
    result = Result(**json.loads(path.read_text()))
    return result if result.overrides == job.overrides(data) else None


def _train(work: tuple[Job, Path, Path]) -> tuple[Job, Result]:
    job, data, folder = work
    overrides = job.overrides(data)
    run = folder / job.name
    place = [f'variables.folder={folder}', f'run_name={job.name}', 'python_log_level=warning']
    trainer = _run([*overrides, *place])
    loss = float(trainer.state.eval_metrics['eval']['LanguageCrossEntropy'].compute())
    result = Result(
        overrides=overrides,
        final_loss=loss if loss == loss else float('inf'),
        steps=int(trainer.state.timestamp.batch),
        data_tokens=int(trainer.state.timestamp.token),
        parameters=sum(weight.numel() for weight in trainer.state.model.parameters()),
        seconds=trainer.state.timestamp.total_wct.total_seconds(),
    )
    trainer.close()
    shutil.rmtree(run / 'checkpoints')
    path = folder / f'{job.name}.json'
    path.with_suffix('.part').write_text(json.dumps(asdict(result), indent=1) + '\n')
    path.with_suffix('.part').rename(path)
    return job, result


def _run(overrides: list[str], attempts: int = 3) -> 'Trainer':
    from llmfoundry.command_utils import train_from_yaml

    try:
        return train_from_yaml(str(YAML), overrides)
    except FileExistsError:
        # StreamingDatasets made at one moment may choose one name for their shared memory: the second finds it taken.
        if attempts == 1:
            raise
        return _run(overrides, attempts - 1)
