"""What a run says at its start of what it is going to do, and what may be amiss with that: sentences from numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

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
        warmup_ends: The step at which the learning rate has warmed up; None without a warmup or if unknown.
        decay_begins: The step at which its last decay begins; None without a decay or if unknown.
    """

    bag_sizes: Sequence[int]
    ends: Sequence[int]
    total: int
    draws: Sequence[int]
    began: int = 0
    tokens_a_batch: float | None = None
    batches_an_epoch: int | None = None
    warmup_ends: int | None = None
    decay_begins: int | None = None

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
        return [
            (size, stop - start, (stop - start) * drawn)
            for size, drawn, start, stop in zip(sizes, draws, starts, stops, strict=True)
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
            read, step = read + batches // steps * done, step - done
        return read

    @property
    def times_plain(self) -> float:
        """How many times the data of a plain run of as many steps it reads."""
        return self.batches / self.total

    @property
    def epochs(self) -> float | None:
        """Epochs of this loader that it reads; None if their length is not known."""
        return None if self.batches_an_epoch is None else self.batches / self.batches_an_epoch


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
    if course.decay_begins is not None and course.decay_begins < end:
        found.append(
            f'The learning rate decays from step {course.decay_begins:,}, and superposition lasts until step {end:,}: '
            'end it earlier, or decay later, so that recovery has steps at the full rate.'
        )
    if course.warmup_ends is not None and course.warmup_ends > end:
        found.append(
            f'The learning rate warms up until step {course.warmup_ends:,}, and superposition lasts until step {end:,} '
            'alone: shorten t_warmup, or superpose for longer, else no superposed step has the full rate.'
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
