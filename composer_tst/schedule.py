"""Which bag size a step has, when each phase ends, how many steps a run takes, and how far it has come."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        uses_tail: Whether the last batches of an epoch make a step if they are fewer than a step reads.
        joined_rows: Rows of a loader batch on one rank, if rows are joined, else None. A tail with too few rows for
            one row of bags makes no step.
        row_length: Tokens in a row, if each row is bagged by itself, else None. Tokens at its end that fill no bag
            are dropped.
    """

    batches: int | None = None
    samples: int | None = None
    tokens: int | None = None
    uses_tail: bool = False
    joined_rows: int | None = None
    row_length: int | None = None

    def read(self, bag_size: int) -> int | None:
        """The tokens of a loader batch that bags of this size read, None if they are not known."""
        if self.tokens is None or self.row_length is None:
            return self.tokens
        return self.tokens // self.row_length * (self.row_length - self.row_length % bag_size)

    def tail(self, left: int, per_step: int) -> int:
        """How many of the ``left`` last batches of an epoch are read, if a step reads ``per_step``."""
        joins = self.joined_rows is None or left * self.joined_rows >= per_step
        return left if self.uses_tail and joins else 0


@dataclass(frozen=True)
class Stretch:
    """Consecutive steps of one bag size, and the loader batches that they read.

    ``batches`` of the steps so far is computed from tokens and may be a fraction.
    """

    bag_size: int
    steps: int
    batches: int | Fraction


@dataclass(frozen=True)
class Plan:
    """The steps a run is expected to take.

    Attributes:
        stretches: One for each phase and, last, one for recovery. A stretch may have no steps.
        data: What the train loader gives.
        start: The step at which the first stretch begins.
        epochs: The epochs of the run, those before ``start`` too; None if an epoch has no end.
    """

    stretches: list[Stretch]
    data: Data
    start: int = 0
    epochs: float | None = None

    @property
    def ends(self) -> list[int]:
        """The step at which each phase ends."""
        steps = (stretch.steps for stretch in self.stretches)
        return list(itertools.accumulate(steps, initial=self.start))[1:-1]

    @property
    def total(self) -> int:
        """The steps in the run."""
        return self.start + sum(stretch.steps for stretch in self.stretches)

    @property
    def times(self) -> float:
        """The data that the run reads, divided by what a plain run with as many steps reads."""
        if not self.data.tokens:
            return float(sum(stretch.batches for stretch in self.stretches) / self.total)
        return sum(self.tokens_of(stretch) or 0 for stretch in self.stretches) / (self.total * self.data.tokens)

    def tokens_of(self, stretch: Stretch) -> int | None:
        """The tokens that a stretch reads, None if they are not known."""
        read = self.data.read(stretch.bag_size)
        return None if read is None else int(stretch.batches * read)


def same(time: Time | None, other: Time | None) -> bool:
    """Whether two times have one value and unit. Composer cannot compare times of different units."""
    return time is not None and other is not None and time.to_timestring() == other.to_timestring()


def later(time: Time | None, other: Time) -> Time:
    """The later of two times, or ``other`` if their units differ."""
    return time if time is not None and time.unit == other.unit and time > other else other


def share_of(duration: Time, whole: int) -> int:
    """A share of the duration in whole units, rounded down. 0.29dur of 100 is 29; with floats it would be 28."""
    return int(Fraction(repr(float(duration.value))) * whole)


def plan_steps(
    phases: Sequence[Phase],
    draws: Callable[[int], int],
    max_duration: Time,
    data: Data,
    now: Timestamp | None = None,
    drawn: int = 0,
) -> Plan | None:
    """Work out at which step each phase ends and how many steps the run takes.

    A share of the duration (``dur``) is a share of steps when ``max_duration`` counts batches or epochs, and a
    share of tokens or samples when it counts those.

    Args:
        phases: The phases to come, in order.
        draws: Loader batches read for one step of a bag size.
        max_duration: The length of training, in ba, tok, sp or ep.
        data: What a loader batch and an epoch hold.
        now: Where the run stands; by default at its beginning.
        drawn: Loader batches drawn in this epoch.

    Returns:
        Plan | None: None if a time is in a unit of which a loader batch holds an unknown amount.

    Raises:
        ValueError: If an epoch is too short for a step, or ``max_duration`` is in another unit.
    """
    if max_duration.unit == TimeUnit.ITERATION:
        raise ValueError(
            f'max_duration is {max_duration.to_timestring()}: superposition needs it in ba, tok, sp or ep.'
        )
    needed = {TimeUnit.EPOCH: data.batches, TimeUnit.SAMPLE: data.samples, TimeUnit.TOKEN: data.tokens}
    if any(needed.get(time.unit, 0) is None for time in (max_duration, *(phase.until for phase in phases))):
        return None
    now = now or Timestamp()
    of_batch = {TimeUnit.SAMPLE: data.samples or 0, TimeUnit.TOKEN: data.tokens or 0}
    unit = TimeUnit.BATCH if max_duration.unit == TimeUnit.EPOCH else max_duration.unit

    def placed(phase: Phase, total: int) -> Phase:
        """The phase, with a share of the duration as a share of ``total``."""
        share = phase.until.unit == TimeUnit.DURATION
        return replace(phase, until=Time(share_of(phase.until, total), unit)) if share else phase

    def walk(total: int | None) -> Plan:
        """Go through the run, many equal steps at a time; if ``total`` is None, without the phases."""
        course = [] if total is None else [placed(phase, total) for phase in phases]
        course.append(Phase(1, max_duration))  # recovery
        counts = {each: int(now.get(each).value) for each in (TimeUnit.BATCH, TimeUnit.EPOCH, *of_batch)}
        steps, batches = [0] * len(course), [0] * len(course)
        current, in_epoch = 0, drawn

        def reached(moment: Time) -> bool:
            return counts[moment.unit] >= moment.value

        def steps_to(moment: Time, reads: int) -> float:
            of_step = 1 if moment.unit == TimeUnit.BATCH else of_batch.get(moment.unit, 0) * reads
            # An epoch ends when its batches are drawn.
            return math.ceil((moment.value - counts[moment.unit]) / of_step) if of_step else math.inf

        while not reached(max_duration):
            while reached(course[current].until):
                current += 1
            reads = draws(course[current].bag_size)
            some = min(steps_to(moment, reads) for moment in (course[current].until, max_duration))
            # A resumed run may have fewer batches in an epoch than were drawn of it before.
            left = math.inf if data.batches is None else max(0, data.batches - in_epoch)
            epoch_ends = left < reads
            if epoch_ends:
                tail = data.tail(int(left), reads)
                if not in_epoch + tail:
                    raise too_short(int(left), reads)
                some, reads = min(1, tail), tail
            elif data.batches is not None:
                some = min(some, left // reads)
            counts[TimeUnit.BATCH] += int(some)
            for each, amount in of_batch.items():
                counts[each] += int(some) * reads * amount
            steps[current] += int(some)
            batches[current] += int(some) * reads
            in_epoch += int(some) * reads
            if epoch_ends:
                counts[TimeUnit.EPOCH] += 1
                in_epoch = 0
        epochs = None if data.batches is None else counts[TimeUnit.EPOCH] + in_epoch / data.batches
        sizes = [phase.bag_size for phase in course]
        return Plan([Stretch(*each) for each in zip(sizes, steps, batches, strict=True)], data, int(now.batch), epochs)

    if max_duration.unit != TimeUnit.EPOCH:
        return walk(int(max_duration.value))
    # Each superposed step shortens its epoch, so the total depends on the share and the share on the total: bisect.
    low, high = int(now.batch), walk(None).total
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if walk(middle).total <= middle else (middle + 1, high)
    # No total may fit exactly. If the plan has no recovery and the one for one step less has, take that.
    plan, less = walk(high), walk(high - 1)
    return less if phases and plan.ends[-1] >= plan.total and less.ends[-1] < less.total else plan


def check_epochs_end(phases: Sequence[Phase], max_duration: Time, data: Data) -> None:
    """Refuse, with a ValueError, a phase that ends in epochs if the loader has no length: an epoch may never end."""
    if data.batches is not None or max_duration.unit == TimeUnit.EPOCH:
        return
    for phase in phases:
        if phase.until.unit == TimeUnit.EPOCH:
            raise ValueError(
                f'Superposition until {phase.until.to_timestring()} may never end, because the train loader does not '
                'say when an epoch does: give duration and until in ba, tok, sp or dur.'
            )


def too_short(batches: int, per_step: int) -> ValueError:
    """The refusal of an epoch that has no whole step."""
    return ValueError(
        f'The train loader has {batches} batches but one superposed step reads {per_step}: '
        'use a smaller bag_size, more data, or a smaller batch.'
    )


@dataclass
class Progress:
    """How far a run has come. Checkpoints keep all of it.

    Attributes:
        began: The batch at which superposition began, None before training. It is above 0 if superposition was added
            to a run under way.
        ended: The batch at which each phase ended, for the phases that have ended.
        ends: The moment at which each phase ends, once the length of training is known.
        max_duration: The length of training for which ``ends`` was computed.
        s_tokens: Model positions so far, all ranks together.
        left_out: Samples drawn and left out so far, all ranks together.
        dropped: Tokens that Composer's clock has counted and the model has not read so far, all ranks together.
        drawn: Loader batches drawn in this epoch, None if not known.
        batch_samples: Samples in a loader batch of this epoch, all ranks together, None if not known.
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
        """The progress in plain Python types."""
        return {
            **vars(self),
            'ended': list(self.ended),
            'ends': [end.to_timestring() for end in self.ends],
            'max_duration': None if self.max_duration is None else self.max_duration.to_timestring(),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> 'Progress':
        """The progress that a checkpoint has kept.

        Raises:
            ValueError: If an earlier version saved it, which did not count the batches drawn.
        """
        if 'drawn' not in state:
            raise ValueError(
                'The checkpoint is of an earlier composer-tst, which did not save how many loader batches its epoch '
                'drew: resume it with that version, or load it by load_path with load_ignore_keys: [state/algorithms].'
            )
        longest = state['max_duration']
        all_of_it: dict[str, Any] = {'batch_samples': None, **state}  # earlier checkpoints have none
        kept = {name: all_of_it[name] for name in vars(cls())}
        kept['ended'] = list(state['ended'])
        kept['ends'] = [Time.from_timestring(end) for end in state['ends']]
        kept['max_duration'] = None if longest is None else Time.from_timestring(longest)
        return cls(**kept)


class Schedule:
    """The phases of a run, which of them have ended, and the bag size of the next step.

    A phase that has ended never begins again, even if the length of training changes.
    """

    def __init__(self, settings: Settings, progress: Progress):
        self.settings = settings
        self.progress = progress

    @property
    def phases_to_come(self) -> tuple[Phase, ...]:
        """The phases that have not ended, the one under way first."""
        return self.settings.phases[len(self.progress.ended) :]

    @property
    def ends_to_come(self) -> list[Time]:
        """When each phase to come ends."""
        return self.progress.ends[len(self.progress.ended) :]

    @property
    def finished(self) -> bool:
        """Whether the last phase has ended."""
        return not self.phases_to_come

    @property
    def bag_size(self) -> int:
        """Bag size of the next step: 1 in recovery."""
        return 1 if self.finished else self.phases_to_come[0].bag_size

    @property
    def draws(self) -> int:
        """The loader batches that the next step reads."""
        return self.settings.draws(self.bag_size)

    def phases_begun(self, batch: int) -> int:
        """How many phases have taken a step when ``batch`` steps are done. Recovery counts as a phase."""
        if self.progress.began is None:
            return 0
        ended = self.progress.ended
        return len(ended) + (batch > [self.progress.began, *ended][-1])

    def plan(self, max_duration: Time, data: Data, now: Timestamp) -> Plan | None:
        """The expected steps of the phases to come, None if they are not known."""
        drawn = self.progress.drawn or 0
        return plan_steps(self.phases_to_come, self.settings.draws, max_duration, data, now, drawn)

    def whole(self, plan: Plan, now: Timestamp) -> Plan:
        """The plan of the whole run: steps before superposition, steps of the phases so far, and ``plan``.

        Tokens counted beyond those of the phases are taken as read before superposition. All steps so far have read as
        many tokens as are counted.
        """
        assert self.progress.began is not None
        sizes = [1, *(phase.bag_size for phase in self.settings.phases)]
        marks = [0, self.progress.began, *self.progress.ended, plan.start]
        done = [
            Stretch(size, stop - start, (stop - start) * self.settings.draws(size))
            for size, (start, stop) in zip(sizes, itertools.pairwise(marks), strict=False)
        ]
        if plan.data.tokens:
            read = int(now.token) - self.progress.dropped
            if self.progress.began:
                before = read - sum(plan.tokens_of(each) or 0 for each in done[1:])
                done[0] = replace(done[0], batches=Fraction(max(0, before), plan.data.tokens))
            # Batches may have been of another size.
            counted = sum(plan.tokens_of(each) or 0 for each in done)
            done = [replace(each, batches=each.batches * Fraction(read, counted or 1)) for each in done]
        *done, under_way = done
        first, *rest = plan.stretches
        first = Stretch(first.bag_size, under_way.steps + first.steps, under_way.batches + first.batches)
        return replace(plan, stretches=[*done, first, *rest], start=0)

    def resolve(self, max_duration: Time, plan: Plan | None) -> None:
        """Fix the moment at which each phase to come ends.

        Args:
            max_duration: The length of training.
            plan: The expected steps of the phases to come, or None if they are not known before training.

        Raises:
            ValueError: If a share of epochs cannot be placed without a plan.
        """
        ends = [Time(batch, TimeUnit.BATCH) for batch in self.progress.ended]
        for index, phase in enumerate(self.phases_to_come):
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

        The plan assumes that no row is padded and that no batch is smaller. Padding can only delay a moment given in
        tokens. A small last batch can delay one in samples too. So the plan can be wrong about the order of two
        moments only if the later one is in such a unit and the units differ: that is a warning. All else is an error.

        Args:
            now: Where the run stands.
            plan: The expected steps of the phases to come, or None if they are not known.
            whole: Whether training ends with this fit. If not, what is an error otherwise is a warning.
            more_comes: Whether another fit will follow, so that recovery may come later.

        Raises:
            ValueError: If there will certainly be such a phase or end.
        """
        longest, last = self.progress.max_duration, self.progress.ends[-1]
        assert longest is not None
        past = last.unit == longest.unit and last >= longest
        may_be_late = {TimeUnit.TOKEN}
        if plan is not None and plan.data.uses_tail:  # also where it is not known when an epoch ends
            may_be_late.add(TimeUnit.SAMPLE)
        if not more_comes and (past or (plan is not None and plan.ends[-1] >= plan.total)):
            problem = (
                f'Superposition lasts until {self.settings.phases[-1].until.to_timestring()} but training ends at '
                f'{longest.to_timestring()}, so there would be no recovery phase: end it earlier or train longer.'
            )
            _refuse_or_warn(problem, past or longest.unit not in may_be_late, whole)
        has_steps = self.phases_begun(int(now.batch)) > len(self.progress.ended)  # the phase under way has taken one
        skip = 1 if has_steps else 0
        for phase, moment in list(zip(self.phases_to_come, self.ends_to_come, strict=True))[skip:]:
            if moment.value <= 0:
                raise ValueError(
                    f'The phase with bag_size {phase.bag_size} until {phase.until.to_timestring()} has no steps: '
                    f'it is less than 1{moment.unit.value} of {longest.to_timestring()}: give it a later moment.'
                )
        if plan is None:
            return
        start, before = plan.start, TimeUnit.BATCH
        for phase, moment, end in zip(self.phases_to_come, self.ends_to_come, plan.ends, strict=True):
            # A phase whose moment is past already is left out, and a message says so.
            if end <= start and not has_steps and now.get(moment.unit) < moment:
                problem = (
                    f'The phase with bag_size {phase.bag_size} until {phase.until.to_timestring()} has no steps: '
                    f'it begins at step {start} and ends at step {end} of {plan.total}: give it until at least '
                    f'{start + 1}ba.'
                )
                _refuse_or_warn(problem, moment.unit == before or moment.unit not in may_be_late, whole)
            start, before, has_steps = max(start, end), moment.unit, False

    def advance(self, timestamp: Timestamp) -> bool:
        """End the phases whose moment has come, and return whether any did."""
        before = len(self.progress.ended)
        while self.phases_to_come and timestamp.get(self.ends_to_come[0].unit) >= self.ends_to_come[0]:
            self.progress.ended.append(int(timestamp.batch))
        return len(self.progress.ended) > before


def schedule_of(algorithms: Iterable[Any]) -> Schedule | None:
    """The schedule of the first algorithm that has one, None if none has."""
    found = (getattr(algorithm, 'schedule', None) for algorithm in algorithms)
    return next((schedule for schedule in found if isinstance(schedule, Schedule)), None)


def _refuse_or_warn(problem: str, certain: bool, whole: bool) -> None:
    if certain and whole:
        raise ValueError(problem)
    log.warning('%s%s', problem, '' if certain else ' This is so if no row is padded and no batch is smaller.')
