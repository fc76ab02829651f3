"""What of a YAML decides a run's cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

from composer.core import Time, Timestamp, TimeUnit
from llmfoundry.command_utils.train import TrainConfig
from omegaconf import DictConfig, OmegaConf

from composer_tst import TokenSuperposition, WarmupStableDecayScheduler
from composer_tst.cli.main import CommandError, meant
from composer_tst.cli.plan.keys import check, superposition_settings
from composer_tst.settings import Settings


@dataclass(frozen=True)
class Run(Settings):
    """What of a YAML decides its cost: superposition, rows and their tokens in a loader batch, and max_duration."""

    rows: int
    length: int
    max_duration: Time


def read_run(config: DictConfig) -> Run:
    """Check the keys that decide the cost."""
    check(config)
    rows, length, text = (config[key] for key in ('global_train_batch_size', 'max_seq_len', 'max_duration'))
    known = {field.name for field in fields(TrainConfig)}
    for key in config:
        if key not in known:
            raise CommandError(
                f'{key} is no key of llm-foundry{meant(str(key), known)}: remove it, or put it under variables'
            )
    try:
        max_duration = Time.from_timestring(text)
    except (TypeError, ValueError, OverflowError):
        raise CommandError(f'max_duration is {text!r}: give a Composer Time in ba, tok, sp or ep, as 20000ba') from None
    if max_duration.unit not in (TimeUnit.BATCH, TimeUnit.TOKEN, TimeUnit.SAMPLE, TimeUnit.EPOCH):
        raise CommandError(f'max_duration is {text}: give it in ba, tok, sp or ep')
    if max_duration.value < 1:
        raise CommandError(f'max_duration is {text}: give a positive time')
    check_scheduler(config, max_duration)
    given = superposition_settings(config)
    try:
        settings = (
            Settings((), 'both', 'sequence', 'uniform') if given is None else TokenSuperposition(**given).settings
        )
    except (TypeError, ValueError) as error:
        raise CommandError(f'algorithms.token_superposition: {error}') from error
    return Run(**vars(settings), rows=rows, length=length, max_duration=max_duration)


def check_scheduler(config: DictConfig, max_duration: Time) -> None:
    """Refuse what warmup_stable_decay refuses in training, if it is the YAML's scheduler."""
    found: Any = OmegaConf.select(config, 'scheduler')
    if found is not None and not isinstance(found, DictConfig):
        raise CommandError(f'scheduler is {found!r}: give its settings by name, as name: warmup_stable_decay')
    if found is None or found.get('name') != 'warmup_stable_decay':
        return
    settings: Any = OmegaConf.to_container(found, resolve=True)
    del settings['name']
    state: Any = SimpleNamespace(max_duration=max_duration, timestamp=Timestamp(), dataloader_len=None)
    try:
        WarmupStableDecayScheduler(**settings)(state)
    except RuntimeError:
        pass  # it needs the length of an epoch, which only the loader knows
    except (TypeError, ValueError) as error:
        raise CommandError(f'scheduler: {error}') from error


def equal_steps(run: Run) -> Time:
    """The steps of the plain run that `max_duration` describes."""
    per_batch = {TimeUnit.BATCH: 1, TimeUnit.TOKEN: run.rows * run.length, TimeUnit.SAMPLE: run.rows}
    if run.max_duration.unit not in per_batch:
        raise CommandError(f'max_duration is {run.max_duration.to_timestring()}: give it in ba, tok or sp')
    return Time.from_batch(math.ceil(run.max_duration.value / per_batch[run.max_duration.unit]))
