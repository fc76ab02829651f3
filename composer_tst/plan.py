"""How many steps a run will take, and at which of them each phase ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from composer.core import Time, TimeUnit

from composer_tst.settings import Phase


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
    """

    ends: list[int]
    total: int


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


def _walk(ends: Sequence[Time], draws: Sequence[int], max_duration: Time, data: Data, now: Moment) -> Plan:
    """Go through a run, as many steps at a time as are alike."""
    found: list[int] = []
    steps_in_epoch = now.drawn  # or batches: whether there are any is what counts
    while True:
        while len(found) < len(ends) and _reached(ends[len(found)], now):
            found.append(now.step)
        if _reached(max_duration, now):
            # Phases that the run does not come to end behind its end.
            return Plan(found + [now.step] * (len(ends) - len(found)), now.step)
        superposed = len(found) < len(ends)
        drawn = draws[len(found)] if superposed else 1
        moments = [ends[len(found)], max_duration] if superposed else [max_duration]
        steps: float = min(_steps_to(moment, now, drawn, data) for moment in moments)
        if data.batches is not None:
            left = data.batches - now.drawn
            if left < drawn:
                used = data.tail(left, drawn)
                steps_in_epoch += used
                if not steps_in_epoch:
                    raise too_short(data.batches, drawn)
                now = replace(_after(now, 1, used, data) if used else now, epoch=now.epoch + 1, drawn=0)
                steps_in_epoch = 0
                continue
            steps = min(steps, left // drawn)
        now = _after(now, int(steps), drawn, data)
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
