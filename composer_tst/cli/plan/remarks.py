"""What may be amiss with a plan: what training would warn of, from the YAML alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from composer.core import Time, Timestamp
from omegaconf import DictConfig, OmegaConf

from composer_tst.cli.main import CommandError
from composer_tst.cli.plan.config import Run
from composer_tst.cli.plan.cost import PhaseCost
from composer_tst.cli.plan.stats import Data
from composer_tst.lr_scheduler import turns
from composer_tst.messages import Course, warnings_of


def remarks(config: DictConfig, run: Run, costs: list[PhaseCost], data: Data | None) -> list[str]:
    """What training would warn of, but for data that repeat, which a plan says elsewhere."""
    if not run.phases:
        return []
    *ends, total = itertools.accumulate(cost.steps for cost in costs)
    course = Course([phase.bag_size for phase in run.phases], ends, total, run.draws)
    warmup_ends, decay_begins = _turns(config, run, course, data)
    return warnings_of(replace(course, warmup_ends=warmup_ends, decay_begins=decay_begins))


def _turns(config: DictConfig, run: Run, course: Course, data: Data | None) -> tuple[int | None, int | None]:
    from llmfoundry import registry
    from llmfoundry.utils.builders import build_scheduler

    found: Any = OmegaConf.to_container(config.get('scheduler') or OmegaConf.create(), resolve=True)
    name = found.pop('name', None)
    if name not in registry.schedulers.get_all():
        return None, None  # a module of the user's may bring it
    try:
        scheduler: Any = build_scheduler(name, found)
    except (TypeError, ValueError) as error:
        raise CommandError(f'scheduler: {error}') from error

    def rate(step: int) -> float:
        batches = course.batches_before(step)
        now = Timestamp(batch=step, sample=batches * run.rows, token=batches * run.rows * run.length)
        state = SimpleNamespace(
            max_duration=run.max_duration,
            dataloader_len=None if data is None else Time.from_batch(data.rows // run.rows),
            timestamp=now,
            get_elapsed_duration=lambda: now.get(run.max_duration.unit) / run.max_duration,
        )
        return float(scheduler(state))

    try:
        return turns(rate, course.total)
    except (RuntimeError, ValueError) as error:
        if data is None:
            return None, None  # it may need the length of an epoch, which only training knows
        raise CommandError(f'scheduler: {error}') from error
