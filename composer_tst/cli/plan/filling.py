"""The YAML to run, filled in, and what of it was changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from composer_tst.cli.main import CommandError
from composer_tst.cli.plan.config import Run, equal_steps
from composer_tst.cli.plan.cost import steps_of

PUBLISHED_WARMUP = 2000


def fill_in(config: DictConfig, run: Run) -> tuple[DictConfig, list[str]]:
    """The YAML with the steps of the plain run, and a scheduler where it has another; and each change in a line."""
    if not run.phases:
        raise CommandError(
            '--write needs a superposition: give --bag-size and --duration, or the algorithm in the YAML'
        )
    config = config.copy()
    settings: Any = OmegaConf.to_container(config.algorithms.token_superposition, resolve=True)
    changes = [f'algorithms.token_superposition is {_inline(settings)}']
    steps = equal_steps(run)
    before = str(config.max_duration)
    if before != steps.to_timestring():
        # A share of tokens would be another share of steps.
        config.max_duration = steps.to_timestring()
        changes.append(
            f'max_duration is {config.max_duration} and was {before}: the steps of a plain run of that length'
        )
    scheduler = OmegaConf.select(config, 'scheduler.name')
    if scheduler != 'warmup_stable_decay':
        plan = steps_of(replace(run, max_duration=steps))
        # Before recovery, where that is known, the rate should have warmed up.
        warmup = min(PUBLISHED_WARMUP, int(steps.value) // 10, *(plan.ends[-1:] if plan else ()))
        was = OmegaConf.select(config, 'scheduler.t_warmup')
        config.scheduler = {
            'name': 'warmup_stable_decay', 't_warmup': f'{warmup}ba', 't_decay': '0.1dur', 'alpha_f': 0.0
        }  # fmt: skip
        changes.append(f'scheduler is {_inline(config.scheduler)} and was {scheduler}')
        changes.append(f'scheduler.t_warmup is {warmup}ba and was {was}')
        changes.append('The baseline needs the same scheduler, or the two runs differ in more than the method.')
    decay = str(OmegaConf.select(config, 'scheduler.t_decay', default='0.1dur'))
    if not decay.endswith(('dur', 'ba', 'ep')):
        raise CommandError(
            f'scheduler.t_decay is {decay}: give it in dur or ba, since --write counts max_duration in ba'
        )
    return config, [*changes, 'Comments are lost.']


def _inline(settings: Any) -> str:
    return '{' + ', '.join(f'{key}: {item}' for key, item in settings.items()) + '}'


def write(config: DictConfig, path: str) -> None:
    """Write a YAML where there is none."""
    if Path(path).exists():
        raise CommandError(f'--write {path}: it exists: remove it or name another')
    try:
        Path(path).write_text(OmegaConf.to_yaml(config))
    except OSError as error:
        raise CommandError(f'--write {path}: {error.strerror}') from error
