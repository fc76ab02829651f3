"""What a run says of its phases, in the log or, where nothing shows that, on the console."""

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

from composer.core import State, Time, Timestamp, TimeUnit
from composer.utils import dist

from composer_tst.announcing import Course, first_lines, last_line, unknown_course, warnings_of
from composer_tst.lr_scheduler import turns_of
from composer_tst.schedule import Data, Plan, Progress, Schedule
from composer_tst.settings import Settings

log = logging.getLogger(__name__)


def say(lines: Iterable[str]) -> None:
    """Say what a user should see without having asked for a log, on rank 0.

    Python shows no log of the level INFO unless it is told to. Composer's own progress bar and console logger print to
    stderr for that reason; so does this, where the log would not show it.
    """
    if dist.get_global_rank():
        return
    shown = log.isEnabledFor(logging.INFO) and log.hasHandlers()
    for line in lines:
        if shown:
            log.info('%s', line)
        else:
            print(line, file=sys.stderr, flush=True)


def report_course(schedule: Schedule, settings: Settings, plan: Plan | None, data: Data, state: State) -> None:
    """Say what the run is going to do, and warn of what may be amiss with that.

    Args:
        schedule: The phases, resolved.
        settings: Those of the run.
        plan: The expected steps of the phases to come, or None if they are not known.
        data: What a loader batch and an epoch hold.
        state: The Trainer's.
    """
    sizes = [phase.bag_size for phase in schedule.phases]
    if plan is None:
        say(unknown_course(schedule.phases[-1].until.to_timestring(), sizes))
        return
    progress = schedule.progress
    course = Course(
        sizes,
        [*progress.ended, *plan.ends],
        plan.total,
        [settings.draws(size) for size in sizes],
        progress.began or 0,
        data.tokens,
        data.batches,
    )

    def at(step: int) -> Timestamp:
        batches = course.batches_before(step)
        return Timestamp(batch=step, sample=batches * (data.samples or 0), token=batches * (data.tokens or 0))

    warmup_ends, decay_begins = turns_of(state, at, plan.total)
    course = replace(course, warmup_ends=warmup_ends, decay_begins=decay_begins)
    say(first_lines(course))
    if not dist.get_global_rank():
        for warning in warnings_of(course):
            log.warning('%s', warning)


def report_end(progress: Progress, timestamp: Timestamp) -> None:
    """Say what the run has read."""
    say([last_line(int(timestamp.batch), int(timestamp.token) - progress.dropped, progress.s_tokens)])


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
