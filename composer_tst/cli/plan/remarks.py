"""What may be amiss with a plan: what training would warn of, from the YAML alone."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from composer.core import Time, Timestamp
from omegaconf import DictConfig, OmegaConf

from composer_tst.cli.main import CommandError
from composer_tst.cli.plan.config import Run
from composer_tst.cli.plan.cost import steps_of
from composer_tst.cli.plan.stats import Data
from composer_tst.messages import recovery_is_short
from composer_tst.schedule import Plan


def remarks(config: DictConfig, run: Run, data: Data | None) -> list[str]:
    """What training would warn of, but for data that repeat, which a plan says elsewhere."""
    plan = steps_of(run, data.rows if data else None)
    if not run.phases or plan is None:
        return []
    return [*_of_the_rate(plan.ends[-1], *_turns(config, run, plan, data)), *recovery_is_short(plan)]


def _of_the_rate(end: int, warmup_ends: int | None, decay_begins: int | None) -> list[str]:
    """What may be amiss with the learning rate of a run that is superposed until step ``end``."""
    found = []
    if decay_begins is not None and decay_begins < end:
        found.append(
            f'The learning rate decays from step {decay_begins:,}, and superposition lasts until step {end:,}: '
            'end it earlier, or decay later, so that recovery has steps at the full rate.'
        )
    if warmup_ends is not None and warmup_ends > end:
        found.append(
            f'The learning rate warms up until step {warmup_ends:,}, and superposition lasts until step {end:,} '
            'alone: shorten t_warmup, or superpose for longer, else no superposed step has the full rate.'
        )
    return found


def _turns(config: DictConfig, run: Run, plan: Plan, data: Data | None) -> tuple[int | None, int | None]:
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
        batches = _batches_before(plan, step)
        now = Timestamp(batch=step, sample=batches * run.rows, token=batches * run.rows * run.length)
        state = SimpleNamespace(
            max_duration=run.max_duration,
            dataloader_len=None if data is None else Time.from_batch(data.rows // run.rows),
            timestamp=now,
            get_elapsed_duration=lambda: now.get(run.max_duration.unit) / run.max_duration,
        )
        return float(scheduler(state))

    try:
        return turns(rate, plan.total)
    except (RuntimeError, ValueError) as error:
        if data is None and isinstance(error, RuntimeError):
            return None, None  # it may need the length of an epoch, which only training knows
        raise CommandError(f'scheduler: {error}') from error


def _batches_before(plan: Plan, step: int) -> int:
    """Loader batches that the steps before this one read."""
    read = 0
    for stretch in plan.stretches:
        done = min(step, stretch.steps)
        read, step = read + (stretch.batches * done // stretch.steps if done else 0), step - done
    return read


# Steps at which a schedule is asked; between the two nearest to a turn, it is sought.
POINTS = 500


def turns(rate: Callable[[int], float], total: int) -> tuple[int | None, int | None]:
    """The first and the last step at the highest learning rate, whatever the schedule.

    Args:
        rate: The multiplier of the learning rate at a step.
        total: The steps of the run.

    Returns:
        tuple: None for a rate that is highest from the beginning, or to the end.
    """
    if total < 1:
        return None, None
    steps = sorted({(total - 1) * point // POINTS for point in range(POINTS + 1)})
    rates = [rate(step) for step in steps]
    top = max(rates) * (1 - 1e-9)
    if top <= 0:
        return None, None
    high = [index for index, each in enumerate(rates) if each >= top]
    warm, late = steps[high[0]], steps[high[-1]]
    if high[0]:
        between = range(steps[high[0] - 1], warm + 1)
        warm = between[bisect_left(between, True, key=lambda step: rate(step) >= top)]
        if rate(warm) > rates[high[0]]:  # the peak lies between two of the steps
            late, top = warm, rate(warm) * (1 - 1e-9)
    if following := [step for step in steps if step > late]:
        between = range(late, following[0] + 1)
        late = between[bisect_left(between, True, key=lambda step: rate(step) < top) - 1]
    return warm or None, late if late < total - 1 else None
