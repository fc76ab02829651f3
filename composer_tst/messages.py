"""What a run says: its course as it starts, what may be amiss, each change, and what it has read."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from composer.core import Time, Timestamp, TimeUnit
from composer.utils import dist

from composer_tst.schedule import Data, Plan, Progress, Schedule, simulate
from composer_tst.settings import Settings

log = logging.getLogger(__name__)

# A recovery phase below this share of the steps is short: at 0.8 superposed a third of the published gain is left.
ENOUGH_RECOVERY = Fraction(1, 2)
JUMP = (
    'When recovery begins, the training loss jumps, in published runs by 1 to 2 nats: from there on it is the '
    'next-token loss, which the loss of a bag is not. Compare runs by their validation loss.'
)


@dataclass(frozen=True)
class Course:
    """What a run is going to do, step by step.

    Args:
        bag_sizes: Bag size of each superposition phase.
        ends: The step at which each of them ends.
        total: Steps of the run.
        draws: Loader batches that one step of each phase reads.
        began: The step at which superposition begins; those before it read one loader batch each.
        tokens_a_batch: Data tokens in a loader batch over all ranks, if no row is padded; None if unknown.
        batches_an_epoch: Loader batches in an epoch; None if unknown.
        read: Loader batches that each phase and recovery read, if that is not as many as their steps ask for.
        goes_through: Epochs that the run goes through, if ends of epochs are left out or make smaller steps.
    """

    bag_sizes: Sequence[int]
    ends: Sequence[int]
    total: int
    draws: Sequence[int]
    began: int = 0
    tokens_a_batch: float | None = None
    batches_an_epoch: int | None = None
    read: Sequence[int] | None = None
    goes_through: float | None = None

    @property
    def superposed_until(self) -> int:
        """The step with which recovery begins."""
        return self.ends[-1]

    @property
    def phases(self) -> list[tuple[int, int, int]]:
        """Bag size, steps and loader batches of each stretch that has steps, plain ones (bag size 1) included."""
        starts = [0, self.began, *self.ends]
        stops = [self.began, *self.ends, self.total]
        sizes, draws = [1, *self.bag_sizes, 1], [1, *self.draws, 1]
        asked = [(stop - start) * drawn for drawn, start, stop in zip(draws, starts, stops, strict=True)]
        read = asked if self.read is None else [self.began, *self.read]
        return [
            (size, stop - start, batches)
            for size, batches, start, stop in zip(sizes, read, starts, stops, strict=True)
            if stop > start
        ]

    @property
    def batches(self) -> int:
        """Loader batches that the run reads."""
        return self.batches_before(self.total)

    def batches_before(self, step: int) -> int:
        """Loader batches that the steps before this one read."""
        read = 0
        for _, steps, batches in self.phases:
            done = min(step, steps)
            read, step = read + batches * done // steps, step - done
        return read

    @property
    def times_plain(self) -> float:
        """How many times the data of a plain run of as many steps it reads."""
        return self.batches / self.total

    @property
    def epochs(self) -> float | None:
        """Epochs of this loader that it reads; None if their length is not known."""
        if self.batches_an_epoch is None:
            return None
        return self.batches / self.batches_an_epoch if self.goes_through is None else self.goes_through


def first_lines(course: Course) -> list[str]:
    """What the run is going to do, a sentence a line."""
    if course.began:
        superposed = f'from step {course.began:,} to step {course.superposed_until:,} of {course.total:,}'
    else:
        superposed = f'until step {course.superposed_until:,} of {course.total:,}'
    parts = []
    for size, steps, batches in course.phases:
        what = f'bags of {size}' if size > 1 else 'plain tokens'
        tokens = '' if course.tokens_a_batch is None else f', {_si(batches * course.tokens_a_batch)} data tokens'
        parts.append(f'{what} for {_count(steps, "step")}{tokens}')
    reads = f'It reads {course.times_plain:.2f} times the data of a plain run of as many steps'
    epochs = course.epochs
    reads += '.' if epochs is None else f', {_round(epochs)} epochs of this loader.'
    return [f'Superposition {superposed}: {"; ".join(parts)}.', reads, JUMP]


def unknown_course(until: str, bag_sizes: Sequence[int]) -> list[str]:
    """The same where the steps cannot be known before training.

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


def warnings_of(course: Course) -> list[str]:
    """What may be amiss, each with the number and what to do."""
    found = []
    end = course.superposed_until
    if course.epochs is not None and course.epochs > 1:
        assert course.batches_an_epoch is not None
        plain = course.total / course.batches_an_epoch
        smaller = ', or a smaller bag_size or duration' if course.batches > course.total else ''
        found.append(
            f'The run reads its data {_round(course.epochs)} times (a plain run of these steps: {_round(plain)}), and '
            f'superposition gains most from fresh data: give it more{smaller}.'
        )
    if course.total - end < ENOUGH_RECOVERY * course.total:
        found.append(
            f'Recovery has {course.total - end:,} of {course.total:,} steps, less than half, and a short one loses the '
            'gain: superposing 20 to 40 % of the steps gained most in published runs.'
        )
    return found


def last_line(steps: int, data_tokens: int, s_tokens: int) -> str:
    """What the run has read, at its end.

    Args:
        steps: Steps trained.
        data_tokens: Data tokens read, all ranks together.
        s_tokens: Model positions, all ranks together: the data tokens that a plain run of this cost reads.
    """
    return (
        f'Superposition: {_count(steps, "step")} read {_si(data_tokens)} data tokens in {_si(s_tokens)} positions of '
        'the model. Beside a plain run: composer-tst compare BASELINE_DIR TST_DIR --output PICTURE.'
    )


def no_save_folder(folder: str) -> str:
    """Where phase_checkpointer writes when the run saves nothing itself."""
    return f'phase_checkpointer: this run has no save_folder, so checkpoints of its phases go to {folder}.'


def _count(number: int, unit: str) -> str:
    return f'{number:,} {unit}{"" if number == 1 else "s"}'


def _round(number: float) -> str:
    """Two digits where it is small, one after the point elsewhere; never rounded down to 1 from above it."""
    text = f'{number:.2g}' if number < 1 else f'{number:.1f}'
    return f'{math.ceil(number * 1000) / 1000:g}' if number > 1 and float(text) == 1 else text


def _si(number: float) -> str:
    for size, suffix in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M')):
        if number >= size:
            return f'{number / size:.3g}{suffix}'
    return f'{number:,.0f}'


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


def report_course(schedule: Schedule, settings: Settings, plan: Plan | None, data: Data) -> None:
    """Say what the run is going to do, and warn of what may be amiss with that.

    Args:
        schedule: The phases, resolved.
        settings: Those of the run.
        plan: The expected steps of the phases to come, or None if they are not known.
        data: What a loader batch and an epoch hold.
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

    # A loader that is too short for a phase that has ended is another than that phase had.
    if course.began == 0 and (data.batches is None or max(course.draws) <= data.batches):
        assert progress.max_duration is not None
        whole = simulate(progress.ends, course.draws, progress.max_duration, data)
        if whole.ends == list(course.ends) and whole.total == course.total:
            course = replace(course, read=whole.read, goes_through=whole.epochs)
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
            'Superposition reads %s in about %d steps, fewer than plain training, but a scheduler, save_interval or '
            'eval_interval in dur counts the steps of plain training: give max_duration as %dba.',
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


def report_change(before: int, now: int, timestamp: Timestamp, dropped: int) -> None:
    """Say that the bag size has changed, when, and after how much data."""
    recovers = ' (the recovery phase begins)' if now == 1 else ''
    say(
        [
            f'Superposition: bag size goes from {before} to {now}{recovers} at batch {int(timestamp.batch)}, after '
            f'{int(timestamp.token) - dropped:,} data tokens.'
        ]
    )


def report_no_recovery(schedule: Schedule, timestamp: Timestamp) -> None:
    """Say that training stops while superposed."""
    log.warning(
        'Training stops at %s, before superposition ends at %s: the model has had no recovery phase.',
        timestamp.batch.to_timestring(),
        schedule.phases[-1].until.to_timestring(),
    )
