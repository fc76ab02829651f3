"""What a run says of its phases in the log."""

import logging
from collections.abc import Sequence

from composer.core import Time, Timestamp, TimeUnit

from composer_tst.plan import Plan
from composer_tst.schedule import Schedule

log = logging.getLogger(__name__)


def report_moved_ends(schedule: Schedule, before: Sequence[Time]) -> None:
    """Say which phases end elsewhere than at the moments ``before``, which a resumed run had of its checkpoint."""
    progress = schedule.progress
    moments = list(zip(schedule.phases, before, progress.ends, strict=False))
    for phase, old, new in moments[len(progress.ended) :]:
        if old.to_timestring() != new.to_timestring():  # times of different units cannot be compared
            assert progress.max_duration is not None
            log.info(
                'The phase with bag_size %d now ends at %s, not %s: it lasts until %s of a max_duration of %s.',
                phase.bag_size,
                new.to_timestring(),
                old.to_timestring(),
                phase.until.to_timestring(),
                progress.max_duration.to_timestring(),
            )


def report_shares(schedule: Schedule, plan: Plan | None, draws_more: bool) -> None:
    """Say what a share of the duration comes to where it is not plainly one of steps.

    Args:
        schedule: The phases, resolved.
        plan: The expected steps, or None if they are not known.
        draws_more: Whether a superposed step draws more loader batches than a plain one.
    """
    until, max_duration = schedule.phases[-1].until, schedule.progress.max_duration
    assert max_duration is not None
    if max_duration.unit in (TimeUnit.TOKEN, TimeUnit.SAMPLE) and until.unit == TimeUnit.DURATION:
        steps = 'an unknown share of the steps'
        if plan is not None:
            steps = f'{plan.ends[-1]} of about {plan.total} steps ({plan.ends[-1] / plan.total:.0%})'
        log.warning(
            '%s of %s is a share of %ss, not of steps: superposition lasts %s.',
            until.to_timestring(),
            max_duration.to_timestring(),
            max_duration.unit.name.lower(),
            steps,
        )
    if max_duration.unit == TimeUnit.EPOCH and draws_more and plan is not None:
        log.warning(
            'Superposition reads %s in about %d steps, fewer than plain training, but a scheduler in dur counts '
            'the steps of plain training: give max_duration as %dba for a schedule that ends with training.',
            max_duration.to_timestring(),
            plan.total,
            plan.total,
        )


def report_dropped(dropped: int, length: int, bag_size: int, expand: str) -> None:
    """Say how many tokens of a step are left out, at the ends of its rows."""
    log.warning(
        'bag_size %d does not divide rows of %d tokens: expand: %s drops %d tokens a step on each rank.',
        bag_size,
        length,
        expand,
        dropped,
    )


def report_change(before: int, now: int, timestamp: Timestamp) -> None:
    """Say that the bag size has changed, when, and after how much data."""
    log.info(
        'Superposition: bag size goes from %d to %d%s at batch %d, after %s data tokens.',
        before,
        now,
        ' (the recovery phase begins)' if now == 1 else '',
        int(timestamp.batch),
        f'{int(timestamp.token):,}',
    )


def report_no_recovery(schedule: Schedule, timestamp: Timestamp) -> None:
    """Say that training stops while superposed."""
    log.warning(
        'Training stops at %s, before superposition ends at %s: the model has had no recovery phase.',
        timestamp.batch.to_timestring(),
        schedule.phases[-1].until.to_timestring(),
    )
