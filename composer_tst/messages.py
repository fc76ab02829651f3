"""What a run says: its plan at the start, warnings, each change of bag size, and what it has read."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction

from composer.core import Time, Timestamp, TimeUnit
from composer.utils import dist

from composer_tst.schedule import Plan, Schedule, same

log = logging.getLogger(__name__)

# Recovery is short below this share of the steps. With 80% of steps superposed, a third of the published gain is left.
ENOUGH_RECOVERY = Fraction(1, 2)
JUMP = (
    'When recovery begins, the training loss becomes another quantity, the next-token loss; in published runs it jumps '
    'by 1 to 2 nats. Compare runs by their validation loss.'
)


def first_lines(plan: Plan) -> list[str]:
    """What the run is going to do, one sentence a line."""
    parts = []
    before = plan.stretches[0] if plan.stretches[0].bag_size == 1 else None
    # The last batch of an epoch may be smaller.
    up_to = 'up to ' if plan.data.uses_tail and (plan.epochs or 0) >= 1 else ''
    for stretch in plan.stretches:
        # Steps before superposition need not be plain: the checkpoint may have been loaded without algorithms.
        what = f'bags of {stretch.bag_size} for ' if stretch.bag_size > 1 else 'plain tokens for '
        what = 'before it ' if stretch is before else what
        tokens = plan.tokens_of(stretch)
        reads = '' if tokens is None else f', {up_to}{_si(tokens)} data tokens'
        if stretch.steps:
            parts.append(f'{what}{_count(stretch.steps, "step")}{reads}')
    begins = f'from step {before.steps:,} to' if before and before.steps else 'until'
    reads = f'It reads {plan.times:.2f} times the data of a plain run of as many steps'
    reads += '.' if plan.epochs is None else f', {_round(plan.epochs)} epochs of this loader.'
    does = f'Superposition {begins} step {plan.ends[-1]:,} of {plan.total:,}: {"; ".join(parts)}.'
    return [does, reads, JUMP]


def unknown_course(until: str, bag_sizes: Sequence[int]) -> list[str]:
    """What the run is going to do, if its steps are not known before training.

    Args:
        until: When superposition ends, as the user wrote it.
        bag_sizes: Bag size of each phase.
    """
    bags = ', then '.join(str(size) for size in bag_sizes)
    return [
        f'Superposition until {until} with bags of {bags}: at which step that is, and how much data is read, cannot be '
        'told before training, for the train loader does not say what a batch holds.',
        JUMP,
    ]


def data_repeat(plan: Plan) -> list[str]:
    """Warn, in one sentence, of a run that reads its data more than once."""
    if plan.epochs is None or plan.epochs <= 1:
        return []
    assert plan.data.batches is not None
    plain = plan.total / plan.data.batches
    smaller = ', or a smaller bag_size or duration' if plan.times > 1 else ''
    return [
        f'The run reads its data {_round(plan.epochs)} times (a plain run of these steps: {_round(plain)}), and '
        f'superposition gains most from fresh data: give it more{smaller}.'
    ]


def recovery_is_short(plan: Plan) -> list[str]:
    """Warn, in one sentence, of a short recovery."""
    recovery = plan.total - plan.ends[-1]
    if recovery >= ENOUGH_RECOVERY * plan.total:
        return []
    return [
        f'Recovery has {recovery:,} of {plan.total:,} steps, less than half, and a short one loses the gain: '
        'superposing 20 to 40 % of the steps gained most in published runs.'
    ]


def last_line(steps: int, data_tokens: int, s_tokens: int) -> str:
    """What the run has read, at its end.

    Args:
        steps: Steps trained.
        data_tokens: Data tokens read, all ranks together.
        s_tokens: Model positions, all ranks together. A plain run of this cost reads as many data tokens.
    """
    return (
        f'Superposition: {_count(steps, "step")} read {_si(data_tokens)} data tokens in {_si(s_tokens)} positions of '
        'the model. Beside a plain run: composer-tst compare BASELINE_DIR TST_DIR --output PICTURE.'
    )


def _count(number: int, unit: str) -> str:
    return f'{number:,} {unit}{"" if number == 1 else "s"}'


def _round(number: float) -> str:
    """Two digits if it is below 1, else one after the point. A number above 1 is never shown as 1."""
    text = f'{number:.2g}' if number < 1 else f'{number:.1f}'
    return f'{math.ceil(number * 1000) / 1000:g}' if number > 1 and float(text) == 1 else text


def _si(number: float) -> str:
    for size, suffix in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M')):
        if number >= 0.9995 * size:  # which three digits round up
            return f'{number / size:.3g}{suffix}'
    return f'{number:,.0f}'


def say(lines: Iterable[str]) -> None:
    """Show lines to the user, on rank 0.

    By default, Python shows no log of level INFO. Then print to stderr, as Composer's progress bar does.
    """
    if dist.get_global_rank():
        return
    shown = log.isEnabledFor(logging.INFO) and log.hasHandlers()
    for line in lines:
        if shown:
            log.info('%s', line)
        else:
            print(line, file=sys.stderr, flush=True)


def report_plan(schedule: Schedule, plan: Plan | None, now: Timestamp) -> None:
    """Say what the run is going to do, and warn of what may go wrong.

    Args:
        schedule: The phases, with their ends fixed.
        plan: The expected steps of the phases to come, or None if they are not known.
        now: Where the run stands.
    """
    if plan is None:
        phases = schedule.settings.phases
        say(unknown_course(phases[-1].until.to_timestring(), [phase.bag_size for phase in phases]))
        return
    whole = schedule.whole(plan, now)
    say(first_lines(whole))
    if not dist.get_global_rank():
        for warning in [*data_repeat(whole), *recovery_is_short(whole)]:
            log.warning('%s', warning)


def report_moved_ends(schedule: Schedule, before: Sequence[Time]) -> None:
    """Say which phases to come no longer end at the moments ``before``, which the checkpoint had."""
    longest = schedule.progress.max_duration
    assert longest is not None
    for phase, old, new in zip(schedule.phases_to_come, before, schedule.ends_to_come, strict=False):
        if not same(old, new):
            log.info(
                f'The phase with bag_size {phase.bag_size} now ends at {new.to_timestring()}, not '
                f'{old.to_timestring()}: it lasts until {phase.until.to_timestring()} of a max_duration of '
                f'{longest.to_timestring()}.'
            )


def report_shares(schedule: Schedule, plan: Plan | None) -> None:
    """Warn if a share of the duration is not a share of steps, or if an epoch has fewer steps than in a plain run."""
    until, longest = schedule.settings.phases[-1].until, schedule.progress.max_duration
    assert longest is not None
    if longest.unit in (TimeUnit.TOKEN, TimeUnit.SAMPLE) and until.unit == TimeUnit.DURATION:
        steps = 'an unknown share of the steps'
        if plan is not None:
            steps = f'{plan.ends[-1]} of about {plan.total} steps ({plan.ends[-1] / plan.total:.0%})'
        log.warning(
            f'{until.to_timestring()} of {longest.to_timestring()} is a share of {longest.unit.name.lower()}s, not of '
            f'steps: superposition lasts {steps}.'
        )
    if longest.unit == TimeUnit.EPOCH and schedule.draws > 1 and plan is not None:
        log.warning(
            f'Superposition reads {longest.to_timestring()} in about {plan.total} steps, fewer than plain training, '
            'but a scheduler, save_interval or eval_interval in dur counts the steps of plain training: give '
            f'max_duration as {plan.total}ba.'
        )


def report_dropped(dropped: int, length: int, bag_size: int, expand: str) -> None:
    """Warn that tokens at the ends of rows are left out."""
    log.warning(
        f'bag_size {bag_size} does not divide rows of {length} tokens: expand: {expand} drops {dropped} tokens a step '
        'on each rank.'
    )


def report_change(before: int, now: int, timestamp: Timestamp, dropped: int) -> None:
    """Say at which batch the bag size has changed, and after how many data tokens."""
    recovers = ' (the recovery phase begins)' if now == 1 else ''
    say(
        [
            f'Superposition: bag size goes from {before} to {now}{recovers} at batch {int(timestamp.batch)}, after '
            f'{int(timestamp.token) - dropped:,} data tokens.'
        ]
    )


def report_no_recovery(schedule: Schedule, timestamp: Timestamp) -> None:
    """Warn that training stops before recovery."""
    log.warning(
        f'Training stops at {timestamp.batch.to_timestring()}, before superposition ends at '
        f'{schedule.settings.phases[-1].until.to_timestring()}: the model has had no recovery phase.'
    )
