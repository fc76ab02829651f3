"""Which bag size a step has, when each phase ends, how many steps a run takes, and how far it has come."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from composer.core import Time, Timestamp, TimeUnit

from composer_tst.settings import Phase, Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """What the train loader gives, as far as it tells.

    Attributes:
        batches: Loader batches in an epoch, None if there is no end.
        samples: Samples in a loader batch, all ranks together.
        tokens: Tokens in a loader batch, all ranks together, if no row is padded.
        uses_tail: Whether an epoch's last batches make a step where they are fewer than a step reads.
        joined_rows: Where a step's rows are joined, the rows of a loader batch on one rank: a tail that has not enough
            of them for one row of bags makes no step.
    """

    batches: int | None = None
    samples: int | None = None
    tokens: int | None = None
    uses_tail: bool = False
    joined_rows: int | None = None

    def tail(self, left: int, drawn: int) -> int:
        """How many of the ``left`` last batches of an epoch are read, where a step reads ``drawn``."""
        joins = self.joined_rows is None or left * self.joined_rows >= drawn
        return left if self.uses_tail and joins else 0


@dataclass(frozen=True)
class Moment:
    """Where a run stands: steps, epochs, loader batches drawn in this epoch, and samples and tokens in all."""

    step: int = 0
    epoch: int = 0
    drawn: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Plan:
    """The steps a run is expected to take.

    Attributes:
        ends: The step at which each phase ends.
        total: The steps in the run.
        read: The loader batches that the steps of each phase read, and then those of recovery.
        epochs: The epochs that the run goes through, those before it begins too; None if they have no end.
    """

    ends: list[int]
    total: int
    read: list[int] = field(default_factory=list, compare=False)
    epochs: float | None = field(default=None, compare=False)


def same(time: Time | None, other: Time | None) -> bool:
    """Whether two times are one; Composer compares none of different units."""
    return time is not None and other is not None and time.to_timestring() == other.to_timestring()


def share_of(duration: Time, whole: int) -> int:
    """A share of the duration in whole units, rounded down: 0.29dur of 100 is 29, which floats make 28."""
    return int(Fraction(repr(float(duration.value))) * whole)


def plan_steps(
    phases: Sequence[Phase], draws: Sequence[int], max_duration: Time, data: Data, now: Moment
) -> Plan | None:
    """Work out at which step each phase ends and how many steps the run takes.

    A share of the duration (``dur``) is a share of steps when ``max_duration`` counts batches or epochs, and a
    share of tokens or samples when it counts those.

    Args:
        phases: The phases to come, in order.
        draws: Loader batches read for one step of each phase.
        max_duration: The length of training, in ba, tok, sp or ep.
        data: What a loader batch and an epoch hold.
        now: Where the run stands.

    Returns:
        Plan | None: None if a time is given in a unit whose amount in a loader batch is not known.

    Raises:
        ValueError: If an epoch is too short for a step.
    """
    known = {
        TimeUnit.BATCH: True,
        TimeUnit.DURATION: True,
        TimeUnit.EPOCH: data.batches is not None,
        TimeUnit.SAMPLE: data.samples is not None,
        TimeUnit.TOKEN: data.tokens is not None,
    }
    if not all(known[time.unit] for time in (max_duration, *(phase.until for phase in phases))):
        return None

    def walk(total: int) -> Plan:
        """The plan if shares of the duration are those of ``total``."""
        unit = TimeUnit.BATCH if max_duration.unit == TimeUnit.EPOCH else max_duration.unit
        ends = [
            Time(share_of(phase.until, total), unit) if phase.until.unit == TimeUnit.DURATION else phase.until
            for phase in phases
        ]
        return _walk(ends, draws, max_duration, data, now)

    if max_duration.unit != TimeUnit.EPOCH:
        return walk(int(max_duration.value))
    # The more steps are superposed, the fewer an epoch has: bisect for the total whose shares give that total.
    low, high = now.step, _walk([], [], max_duration, data, now).total
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if walk(middle).total <= middle else (middle + 1, high)
    # Where whole epochs fall out, the share may not be met; then rather a little less than no recovery.
    plan, less = walk(high), walk(high - 1)
    return less if phases and plan.ends[-1] >= plan.total and less.ends[-1] < less.total else plan


def check_epochs_end(phases: Sequence[Phase], max_duration: Time, data: Data) -> None:
    """Refuse, with a ValueError, a phase until an epoch that may never come: of a loader without a length."""
    if data.batches is not None or max_duration.unit == TimeUnit.EPOCH:
        return
    for phase in phases:
        if phase.until.unit == TimeUnit.EPOCH:
            raise ValueError(
                f'Superposition until {phase.until.to_timestring()} may never end, because the train loader does not '
                'say when an epoch does: give duration and until in ba, tok, sp or dur.'
            )


def simulate(ends: Sequence[Time], draws: Sequence[int], max_duration: Time, data: Data) -> Plan:
    """A whole run whose phases end at moments that are known.

    Args:
        ends: When each phase ends; no shares of the duration.
        draws: Loader batches read for one step of each phase.
        max_duration: The length of training.
        data: What a loader batch and an epoch hold.
    """
    return _walk(ends, draws, max_duration, data, Moment())


def _walk(ends: Sequence[Time], draws: Sequence[int], max_duration: Time, data: Data, now: Moment) -> Plan:
    """Go through a run, as many steps at a time as are alike."""
    found: list[int] = []
    read = [0] * (len(ends) + 1)
    steps_in_epoch = now.drawn  # or batches: nonzero if the epoch has had a step
    while True:
        while len(found) < len(ends) and _reached(ends[len(found)], now):
            found.append(now.step)
        if _reached(max_duration, now):
            # Phases that the run does not come to end behind its end.
            epochs = None if data.batches is None else now.epoch + now.drawn / data.batches
            return Plan(found + [now.step] * (len(ends) - len(found)), now.step, read, epochs)
        superposed = len(found) < len(ends)
        drawn = draws[len(found)] if superposed else 1
        moments = [ends[len(found)], max_duration] if superposed else [max_duration]
        steps: float = min(_steps_to(moment, now, drawn, data) for moment in moments)
        if data.batches is not None:
            left = data.batches - now.drawn
            if left < drawn:
                used = data.tail(left, drawn)
                steps_in_epoch += used
                read[len(found)] += used
                if not steps_in_epoch:
                    raise too_short(data.batches, drawn)
                now = replace(_after(now, 1, used, data) if used else now, epoch=now.epoch + 1, drawn=0)
                steps_in_epoch = 0
                continue
            steps = min(steps, left // drawn)
        now = _after(now, int(steps), drawn, data)
        read[len(found)] += int(steps) * drawn
        steps_in_epoch += int(steps)


def too_short(batches: int, drawn: int) -> ValueError:
    """What to say of an epoch that has no whole step."""
    return ValueError(
        f'The train loader has {batches} batches but one superposed step reads {drawn}: '
        'use a smaller bag_size, more data, or a smaller batch.'
    )


def _reached(moment: Time, now: Moment) -> bool:
    amounts = {
        TimeUnit.BATCH: now.step,
        TimeUnit.EPOCH: now.epoch,
        TimeUnit.SAMPLE: now.samples,
        TimeUnit.TOKEN: now.tokens,
    }
    return amounts[TimeUnit(moment.unit)] >= moment.value


def _steps_to(moment: Time, now: Moment, drawn: int, data: Data) -> float:
    if moment.unit == TimeUnit.BATCH:
        return moment.value - now.step
    if moment.unit == TimeUnit.SAMPLE and data.samples:
        return math.ceil((moment.value - now.samples) / (drawn * data.samples))
    if moment.unit == TimeUnit.TOKEN and data.tokens:
        return math.ceil((moment.value - now.tokens) / (drawn * data.tokens))
    return math.inf  # an epoch ends where its batches do


def _after(now: Moment, steps: int, drawn: int, data: Data) -> Moment:
    read = steps * drawn
    return Moment(
        now.step + steps,
        now.epoch,
        now.drawn + read,
        now.samples + read * (data.samples or 0),
        now.tokens + read * (data.tokens or 0),
    )


@dataclass
class Progress:
    """How far a run has come: all that its checkpoints keep of it.

    Attributes:
        began: The batch at which superposition began, None before training: 0 unless it was added to a run already
            under way.
        ended: For each phase that has ended, the batch at which it did.
        ends: The moment each phase ends, once the length of training is known.
        max_duration: The length of training that these moments are of.
        s_tokens: Model positions so far, all ranks together.
        left_out: Samples drawn and left out so far, all ranks together.
        dropped: Tokens drawn but dropped at the ends of rows so far, all ranks together.
        drawn: Loader batches drawn in this epoch, None if that is not known.
        batch_samples: Samples of each of these, all ranks together, None if that is not known.
    """

    began: int | None = None
    ended: list[int] = field(default_factory=list)
    ends: list[Time] = field(default_factory=list)
    max_duration: Time | None = None
    s_tokens: int = 0
    left_out: int = 0
    dropped: int = 0
    drawn: int | None = None
    batch_samples: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """The same in plain Python types."""
        return {
            'began': self.began,
            'ended': list(self.ended),
            'ends': [end.to_timestring() for end in self.ends],
            'max_duration': None if self.max_duration is None else self.max_duration.to_timestring(),
            's_tokens': self.s_tokens,
            'left_out': self.left_out,
            'dropped': self.dropped,
            'drawn': self.drawn,
            'batch_samples': self.batch_samples,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> 'Progress':
        """Where a checkpoint left off.

        Raises:
            ValueError: If an earlier version saved it, which did not count the batches drawn.
        """
        if 'drawn' not in state:
            raise ValueError(
                'The checkpoint is of an earlier composer-tst, which did not save how many loader batches its epoch '
                'drew: resume it with that version, or load it by load_path with load_ignore_keys: [state/algorithms].'
            )
        longest = state['max_duration']
        return cls(
            state['began'],
            list(state['ended']),
            [Time.from_timestring(end) for end in state['ends']],
            None if longest is None else Time.from_timestring(longest),
            state['s_tokens'],
            state['left_out'],
            state['dropped'],
            state['drawn'],
            state.get('batch_samples'),  # which earlier checkpoints do not have
        )


class Schedule:
    """The phases of a run, which of them have ended, and the bag size of the coming step.

    A phase that has ended never begins again, whatever happens to the length of training.
    """

    def __init__(self, settings: Settings, progress: Progress):
        self.phases = settings.phases
        self.progress = progress

    @property
    def finished(self) -> bool:
        """Whether the last phase has ended."""
        return len(self.progress.ended) >= len(self.phases)

    @property
    def bag_size(self) -> int:
        """Bag size of the coming step: 1 in the recovery phase."""
        return 1 if self.finished else self.phases[len(self.progress.ended)].bag_size

    def phases_begun(self, batch: int) -> int:
        """How many phases have taken a step once ``batch`` steps are done; recovery counts as one."""
        if self.progress.began is None:
            return 0
        ended = self.progress.ended
        return len(ended) + (batch > [self.progress.began, *ended][-1])

    def resolve(self, max_duration: Time, plan: Plan | None) -> None:
        """Fix the moment each phase to come ends, now that the length of training is known.

        Args:
            max_duration: The length of training.
            plan: The expected steps of the phases to come, or None where they cannot be known before training.

        Raises:
            ValueError: If a share of epochs cannot be placed without a plan.
        """
        ended = self.progress.ended
        ends = [Time(batch, TimeUnit.BATCH) for batch in ended]
        for index, phase in enumerate(self.phases[len(ended) :]):
            end = phase.until
            if end.unit == TimeUnit.DURATION and max_duration.unit != TimeUnit.EPOCH:
                end = Time(share_of(end, int(max_duration.value)), max_duration.unit)
            elif end.unit == TimeUnit.DURATION:
                if plan is None:
                    raise ValueError(
                        f'{end.to_timestring()} of {max_duration.to_timestring()} cannot be placed because the '
                        'train loader does not say what a batch holds: give max_duration in ba.'
                    )
                end = Time(plan.ends[index], TimeUnit.BATCH)
            ends.append(end)
        self.progress.ends, self.progress.max_duration = ends, max_duration

    def check(self, now: Timestamp, plan: Plan | None, whole: bool, more_comes: bool = False) -> None:
        """Refuse a phase without steps, and a run that ends without a recovery phase.

        A plan takes rows for full. Padding can only put off a moment given in tokens, so that what the plan says of an
        order is certain where the later moment is in another unit, and otherwise a warning.

        Args:
            now: Where the run stands.
            plan: The expected steps of the phases to come, or None if they are not known.
            whole: Whether training ends where this fit does. If it may go on, a fit without recovery is a warning.
            more_comes: Whether it is known to go on, so that recovery may come later.

        Raises:
            ValueError: If that is so for certain.
        """
        longest = self.progress.max_duration
        assert longest is not None
        to_come = range(len(self.progress.ended), len(self.phases))
        last = self.progress.ends[-1]
        past = last.unit == longest.unit and last >= longest
        if not more_comes and (past or (plan is not None and plan.ends[-1] >= plan.total)):
            problem = (
                f'Superposition lasts until {self.phases[-1].until.to_timestring()} but training ends at '
                f'{longest.to_timestring()}, so there would be no recovery phase: end it earlier or train longer.'
            )
            _refuse_or_warn(problem, past or longest.unit != TimeUnit.TOKEN, whole)
        if plan is None:
            return
        start, previous_end = int(now.batch), Time(int(now.batch), TimeUnit.BATCH)
        with_steps = self.phases_begun(int(now.batch))
        for index, end in zip(to_come, plan.ends, strict=True):
            moment, phase = self.progress.ends[index], self.phases[index]
            if index < with_steps:
                start, previous_end = max(start, end), moment
                continue
            # One that is past already is left out, and said to be.
            if end <= start and moment.value > 0 and now.get(moment.unit) < moment:
                problem = (
                    f'The phase with bag_size {phase.bag_size} until {phase.until.to_timestring()} has no steps: '
                    f'it begins at step {start} and ends at step {end} of {plan.total}: '
                    f'give it until at least {start + 1}ba.'
                )
                certain = previous_end.unit == moment.unit or moment.unit != TimeUnit.TOKEN
                _refuse_or_warn(problem, certain, whole)
            elif moment.value <= 0:
                raise ValueError(
                    f'The phase with bag_size {phase.bag_size} until {phase.until.to_timestring()} has no steps: it '
                    f'is less than one step of {longest.to_timestring()}: give it until at least {start + 1}ba.'
                )
            start, previous_end = max(start, end), moment

    def advance(self, timestamp: Timestamp) -> bool:
        """End the phases whose moment has come.

        Args:
            timestamp: Composer's progress, in data batches, samples and tokens.

        Returns:
            bool: Whether any phase ended.
        """
        before = len(self.progress.ended)
        while not self.finished:
            end = self.progress.ends[len(self.progress.ended)]
            if timestamp.get(end.unit) < end:
                break
            self.progress.ended.append(int(timestamp.batch))
        return len(self.progress.ended) > before


def schedule_of(algorithms: Iterable[Any]) -> Schedule | None:
    """That of the algorithm that has one, None if none has."""
    found = (getattr(algorithm, 'schedule', None) for algorithm in algorithms)
    return next((schedule for schedule in found if isinstance(schedule, Schedule)), None)


def _refuse_or_warn(problem: str, certain: bool, whole: bool) -> None:
    if certain and whole:
        raise ValueError(problem)
    log.warning('%s%s', problem, '' if certain else ' This is so if no row is padded.')
