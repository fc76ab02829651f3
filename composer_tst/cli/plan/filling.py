"""The YAML to run, filled in, and what of it was changed."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from composer_tst.cli.main import CommandError
from composer_tst.cli.plan.config import Run, equal_steps

# That of README's five lines.
SCHEDULER = {'name': 'warmup_stable_decay', 't_warmup': '0.05dur', 't_decay': '0.1dur', 'alpha_f': 0.0}


def fill_in(config: DictConfig, run: Run) -> tuple[DictConfig, list[str]]:
    """The YAML with the steps of the plain run, and a scheduler where it has another; and each change in a line."""
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
        was = OmegaConf.select(config, 'scheduler.t_warmup')
        config.scheduler = dict(SCHEDULER)
        changes.append(f'scheduler is {_inline(config.scheduler)} and was {scheduler}')
        changes.append(f'scheduler.t_warmup is {SCHEDULER["t_warmup"]} and was {was}')
        changes.append('The baseline needs the same scheduler, or the two runs differ in more than the method.')
    decay = str(OmegaConf.select(config, 'scheduler.t_decay', default='0.1dur'))
    if not decay.endswith(('dur', 'ba', 'ep')):
        raise CommandError(
            f'scheduler.t_decay is {decay}: give it in dur or ba, since --write counts max_duration in ba'
        )
    return config, [*changes, 'Comments are lost.']


def _inline(settings: Any) -> str:
    return '{' + ', '.join(f'{key}: {item}' for key, item in settings.items()) + '}'
