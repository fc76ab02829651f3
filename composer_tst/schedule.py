"""When each superposition phase ends, and what bag size a step therefore has."""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from composer.core import Time, Timestamp, TimeUnit

log = logging.getLogger(__name__)

_UNITS = (TimeUnit.DURATION, TimeUnit.BATCH, TimeUnit.TOKEN, TimeUnit.SAMPLE, TimeUnit.EPOCH)


@dataclass(frozen=True)
class Phase:
    """One superposition phase: bags of ``bag_size`` tokens ``until`` a moment of training."""

    bag_size: int
    until: Time


@dataclass(frozen=True)
class Plan:
    """The steps a run is expected to take.

    Attributes:
        ends: The step at which each phase ends.
        total: The steps in the run.
    """

    ends: list[int]
    total: int


def parse_phases(
    bag_size: int | None,
    duration: str | Time | None,
    phases: Sequence[Mapping[str, Any]] | None,
) -> list[Phase]:
    """Read the settings ``bag_size`` and ``duration``, or ``phases``.

    Raises:
        ValueError: If both or neither are given, a bag size is not an integer of at least 2 or grows from one
            phase to the next, or a moment is not a Composer Time in dur, ba, tok, sp or ep, is not positive,
            is at or past the end of training, or is not after the one before it.
    """
    if phases is None:
        if bag_size is None or duration is None:
            raise ValueError('Superposition needs bag_size and duration, or phases: give one or the other.')
        return [Phase(_bag_size(bag_size), _moment(duration, 'duration'))]
    if bag_size is not None or duration is not None:
        raise ValueError('phases says what bag_size and duration would: give phases, or bag_size and duration.')
    if len(phases) == 0:
        raise ValueError('phases is empty: give at least one {bag_size, until}.')
    parsed = []
    for phase in phases:
        if not isinstance(phase, Mapping) or set(phase) != {'bag_size', 'until'}:
            raise ValueError(f'A phase is {phase!r}: give it bag_size and until, and nothing else.')
        parsed.append(Phase(_bag_size(phase['bag_size']), _moment(phase['until'], 'until')))
    for before, after in itertools.pairwise(parsed):
        if after.bag_size > before.bag_size:
            raise ValueError(
                f'phases go from bag_size {before.bag_size} to {after.bag_size}: order them from coarse to fine.'
            )
        if after.until.unit == before.until.unit and after.until <= before.until:
            raise ValueError(
                f'phases end at {before.until.to_timestring()} and then at {after.until.to_timestring()}: '
                'give increasing times.'
            )
    return parsed


def _bag_size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        raise ValueError(f'bag_size is {value!r}: give an integer of at least 2.')
    return value


def _moment(value: Any, name: str) -> Time:
    try:
        moment = value if isinstance(value, Time) else Time.from_timestring(value)
    except (TypeError, ValueError):
        raise ValueError(
            f'{name} is {value!r}, which is no Composer Time: write it as 0.3dur, 6000ba, 100000tok, 500sp or 1ep.'
        ) from None
    if moment.unit not in _UNITS:
        raise ValueError(f'{name} is {value}: give it in dur, ba, tok, sp or ep.')
    if moment.value <= 0:
        raise ValueError(f'{name} is {value}, so no step would be superposed: give a positive time.')
    if moment.unit == TimeUnit.DURATION and moment.value >= 1:
        raise ValueError(
            f'{name} is {value}, so superposition would last to the end and leave no recovery phase: '
            'give less than 1dur.'
        )
    return moment


def plan_steps(
    phases: Sequence[Phase],
    draws: Sequence[int],
    max_duration: Time,
    per_batch: Mapping[TimeUnit, int | Fraction],
    began: int = 0,
) -> Plan | None:
    """Work out at which step each phase ends and how many steps the run takes.

    A share of the duration (``dur``) is a share of steps when ``max_duration`` counts batches or epochs, and a
    share of tokens or samples when it counts those.

    Args:
        phases: The phases, in order.
        draws: Loader batches read for one step of each phase.
        max_duration: The length of training, in ba, tok, sp or ep.
        per_batch: Tokens, samples and epochs in one loader batch, all ranks together, as far as they are known.
        began: The step at which superposition begins; each before it reads one loader batch.

    Returns:
        Plan | None: None if a time is given in a unit whose amount in a loader batch is not known.
    """
    units = {max_duration.unit} | {phase.until.unit for phase in phases}
    if not units <= {TimeUnit.DURATION, TimeUnit.BATCH, *per_batch}:
        return None
    counts_steps = max_duration.unit in (TimeUnit.BATCH, TimeUnit.EPOCH)

    def ends_if(total: int) -> tuple[list[int], int]:
        """The step each phase ends at in a run of ``total`` steps, and the loader batches such a run reads."""
        ends: list[int] = []
        step = read = min(began, total)
        for phase, drawn in zip(phases, draws, strict=True):
            until = phase.until
            if until.unit == TimeUnit.BATCH:
                end = until.value
            elif until.unit == TimeUnit.DURATION and counts_steps:
                end = int(until.value * total)
            else:
                if until.unit == TimeUnit.DURATION:
                    until = Time(int(until.value * max_duration.value), max_duration.unit)
                end = step + max(0, math.ceil((until.value / per_batch[until.unit] - read) / drawn))
            ends.append(int(end))
            superposed = max(0, min(ends[-1], total) - step)
            step, read = step + superposed, read + superposed * drawn
        return ends, read + total - step

    if max_duration.unit == TimeUnit.BATCH:
        total = int(max_duration.value)
        return Plan(ends_if(total)[0], total)
    # What a run reads grows with its steps, so the steps that read the data there is can be bisected.
    budget = math.ceil(max_duration.value / per_batch[max_duration.unit])
    low, total = 0, budget
    while low < total:
        middle = (low + total) // 2
        low, total = (low, middle) if ends_if(middle)[1] >= budget else (middle + 1, total)
    ends, read = ends_if(total)
    return Plan(ends, total - (read - budget))


class Schedule:
    """The phases of a run, which of them have ended, and the bag size of any step so far.

    A phase that has ended never begins again, whatever happens to the length of training. The record is what
    lets a run resumed in the middle of an epoch draw its data in the same groups as before.

    Attributes:
        phases: The phases, from coarse to fine.
        began: The batch at which superposition began, None before training: 0 unless it was added to a run already
            under way.
        ended: For each phase that has ended, the batch at which it did.
        ends: The moment each phase ends, once the length of training is known.
    """

    def __init__(self, phases: Sequence[Phase]):
        self.phases = list(phases)
        self.began: int | None = None
        self.ended: list[int] = []
        self.ends: list[Time] = []

    @property
    def finished(self) -> bool:
        """Whether the last phase has ended."""
        return len(self.ended) >= len(self.phases)

    @property
    def placed(self) -> list[Phase]:
        """The phases, with those that have ended placed where they did, whatever the length of training is now."""
        ended = [
            Phase(phase.bag_size, Time(end, TimeUnit.BATCH))
            for phase, end in zip(self.phases, self.ended, strict=False)
        ]
        return ended + self.phases[len(ended) :]

    def phases_begun(self, batch: int) -> int:
        """How many phases have taken a step once ``batch`` steps are done; recovery counts as one."""
        if self.began is None:
            return 0
        return len(self.ended) + (batch > [self.began, *self.ended][-1])

    @property
    def bag_size(self) -> int:
        """Bag size of the coming step: 1 in the recovery phase."""
        return 1 if self.finished else self.phases[len(self.ended)].bag_size

    def bag_size_at(self, batch: int) -> int:
        """Bag size that step ``batch`` had, or will have if it is the coming one."""
        if batch < (self.began or 0):
            return 1
        for phase, end in zip(self.phases, self.ended, strict=False):
            if batch < end:
                return phase.bag_size
        return self.bag_size

    def resolve(self, max_duration: Time, plan: Plan | None, resumed: bool = False) -> None:
        """Fix the moment each phase ends, now that the length of training is known.

        Args:
            max_duration: The length of training.
            plan: The expected steps, or None where they cannot be known before training.
            resumed: Whether some of training is done, which may have read other amounts than the plan says.

        Raises:
            ValueError: If it is certain that a phase has no steps, or that the last one ends at or past the end of
                training. If that is so only where no row is padded, a warning says so.
        """
        self.ends = []
        for index, phase in enumerate(self.placed):
            end = phase.until
            if end.unit == TimeUnit.DURATION:
                if max_duration.unit == TimeUnit.EPOCH:
                    if plan is None:
                        raise ValueError(
                            f'{end.to_timestring()} of {max_duration.to_timestring()} cannot be placed because the '
                            'train loader does not say what a batch holds: give max_duration in ba.'
                        )
                    end = Time(plan.ends[index], TimeUnit.BATCH)
                else:
                    end = Time(int(end.value * max_duration.value), max_duration.unit)
            self.ends.append(end)
        self._check(max_duration, plan, resumed)

    def _check(self, max_duration: Time, plan: Plan | None, resumed: bool) -> None:
        last = self.phases[-1].until.to_timestring()
        past_end = (
            f'Superposition lasts until {last} but training ends at {max_duration.to_timestring()}, so there would '
            'be no recovery phase: end it earlier or train longer.'
        )
        if plan is None:
            if self.ends[-1].unit == max_duration.unit and self.ends[-1] >= max_duration:
                raise ValueError(past_end)
            return

        def refuse(reason: str, earlier: Time, later: Time) -> None:
            """Refuse two moments that come in the wrong order by the plan, if they do for certain."""
            same_unit = earlier.unit == later.unit
            # Padded rows hold fewer tokens, so that a number of tokens may take more steps than planned.
            if (same_unit and earlier >= later) or (later.unit != TimeUnit.TOKEN and (same_unit or not resumed)):
                raise ValueError(reason)
            if not resumed:
                log.warning('%s This is so if no row is padded.', reason)

        if plan.ends[-1] >= plan.total:
            refuse(past_end, self.ends[-1], max_duration)
        began = self.began or 0
        moments = [Time(began, TimeUnit.BATCH), *self.ends]
        starts = [began, *plan.ends]
        for index, (phase, start, end) in enumerate(zip(self.phases, starts, plan.ends, strict=False)):
            # One that was past when superposition was added to a run is left out, and said to be.
            if index >= len(self.ended) and end <= start and not 0 < end <= began:
                refuse(
                    f'The phase with bag_size {phase.bag_size} until {phase.until.to_timestring()} has no steps: '
                    f'it begins at step {start} and ends at step {end} of {plan.total}.',
                    moments[index],
                    moments[index + 1],
                )

    def advance(self, timestamp: Timestamp) -> bool:
        """End the phases whose moment has come.

        Args:
            timestamp: Composer's progress, in data batches, samples and tokens.

        Returns:
            bool: Whether any phase ended.
        """
        batch = int(timestamp.batch)
        before = len(self.ended)
        while not self.finished:
            end = self.ends[len(self.ended)]
            if timestamp.get(end.unit) < end:
                break
            self.ended.append(batch)
        return len(self.ended) > before
