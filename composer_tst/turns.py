"""Where the learning rate of a run turns: when it has warmed up, and when it begins to decay for good."""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import wrapt
from composer.core import State, Time, Timestamp

# Steps at which a schedule is asked; between the two nearest to a turn, it is sought.
POINTS = 500


class _StateAt(wrapt.ObjectProxy):
    """A Trainer's state at another moment of training."""

    def __init__(self, state: State, timestamp: Timestamp):
        super().__init__(state)
        self._self_timestamp = timestamp

    @property
    def timestamp(self) -> Timestamp:
        return self._self_timestamp

    def get_elapsed_duration(self) -> Time[float]:
        longest = self.max_duration
        return self.timestamp.get(longest.unit) / longest


def turns_of(state: State, at: Callable[[int], Timestamp], total: int) -> tuple[int | None, int | None]:
    """As :func:`turns`, of a Trainer; None where no schedule of Composer's, llm-foundry's or ours sets the rate.

    Args:
        state: The Trainer's.
        at: What the clock shows at a step.
        total: The steps of the run.
    """
    rate = _rate_of(state, at)
    return (None, None) if rate is None else turns(rate, total)


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


def _rate_of(state: State, at: Callable[[int], Timestamp]) -> Callable[[int], float] | None:
    """The multiplier of the learning rate at a step.

    Composer keeps no schedule but in the functions of torch's ``LambdaLR`` that it makes of them. A schedule of the
    user's is not asked: it may keep what it was last asked for.
    """
    for compiled in state.schedulers:
        for function in getattr(compiled, 'lr_lambdas', ()):
            cells: dict[str, Any] = {
                name: cell.cell_contents
                for name, cell in zip(
                    getattr(getattr(function, '__code__', None), 'co_freevars', ()),
                    getattr(function, '__closure__', None) or (),
                    strict=True,
                )
            }
            if cells.keys() >= {'scheduler', 'scheduler_sig', 'ssr'}:
                schedule = cells['scheduler']
                if type(schedule).__module__.partition('.')[0] not in ('composer', 'llmfoundry', 'composer_tst'):
                    return None
                extra = (cells['ssr'],) if len(cells['scheduler_sig'].parameters) > 1 else ()
                return lambda step: float(schedule(_StateAt(state, at(step)), *extra))
    return None
