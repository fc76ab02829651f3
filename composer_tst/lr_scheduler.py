"""The learning rate: warmup, stable, decay as in the published runs."""

from __future__ import annotations

from typing import Any

from composer.core import State, Time, TimeUnit
from composer.optim import ComposerScheduler
from composer.optim.scheduler import _convert_time

from composer_tst.settings import refuse_unknown


class WarmupStableDecayScheduler(ComposerScheduler):
    r"""Warms the learning rate up linearly, holds it, and decays it linearly at the end of training.

    Specifically, the learning rate multiplier :math:`\alpha` can be expressed as:

    .. math::
        \alpha(t) = \begin{cases}
            t / t_{warmup}, & \text{if } t < t_{warmup} \\
            1, & \text{if } t_{warmup} \leq t < t_{max} - t_{decay} \\
            \alpha_f + (1 - \alpha_f) \times (t_{max} - t) / t_{decay},
                & \text{if } t_{max} - t_{decay} \leq t < t_{max} \\
            \alpha_f, & \text{otherwise}
        \end{cases}

    Where :math:`t_{warmup}` represents the warmup time, :math:`t_{decay}` the length of the decay,
    :math:`t_{max}` the trainer's ``max_duration``, and :math:`\alpha_f` the multiplier to decay to.

    ``t_warmup`` may have another unit than ``max_duration`` (``2000ba`` where training lasts a number of
    tokens): it is measured on its own clock. ``t_decay`` counts back from the end, so it must have the unit
    of ``max_duration``, or be a share of it (``dur``); epochs and batches convert into each other.

    Composer reads all its schedulers before it moves its clock. So batch ``n``, counted from 0, is trained with
    :math:`\alpha` of ``n - 1`` batches, and batch 0 with :math:`\alpha` of none.

    .. warning::
        By default, initial warmup time is **not** scaled according to any provided scale schedule ratio.
        To change this behavior, set ``scale_warmup=True``. The decay always is.

    Args:
        t_warmup (str | Time): Warmup time; ``'0ba'`` for none.
        t_decay (str | Time): Length of the decay, at the end of training. Default = ``"0.1dur"``.
        alpha_f (float): Multiplier to decay to, from 0 to 1. Default = ``0.0``.
        scale_warmup (bool): SSR also scales the warmup period. Default = ``False``.

    Raises:
        ValueError: On construction, if a time is not a Composer time, is negative or on the wall clock, or if
            ``alpha_f`` is not a number from 0 to 1. When the trainer is built, if ``t_decay`` cannot be converted to
            the unit of ``max_duration``, or if warmup and decay do not fit in ``max_duration``. If their units cannot
            be compared, that is an error only at the batch where the decay would begin.
        RuntimeError: When the trainer is built, if a time needs the length of an epoch and the train loader has none.
    """

    def __init__(
        self,
        t_warmup: str | Time,
        t_decay: str | Time = '0.1dur',
        alpha_f: float = 0.0,
        scale_warmup: bool = False,
        **unknown: Any,
    ):
        refuse_unknown('scheduler', unknown, ('t_warmup', 't_decay', 'alpha_f', 'scale_warmup'))
        if isinstance(alpha_f, bool) or not isinstance(alpha_f, (int, float)) or not 0 <= alpha_f <= 1:
            raise ValueError(f'alpha_f={alpha_f!r} must be a number from 0 to 1: it is a share of the learning rate.')
        if not isinstance(scale_warmup, bool):
            raise ValueError(f'scale_warmup={scale_warmup!r} must be true or false.')
        self.t_warmup = _parse('t_warmup', t_warmup)
        self.t_decay = _parse('t_decay', t_decay)
        self.alpha_f = alpha_f
        self.scale_warmup = scale_warmup

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        """The multiplier at ``state.timestamp``; ``ssr`` as in :class:`~composer.optim.ComposerScheduler`."""
        assert state.max_duration is not None, 'max_duration should be set whenever schedulers are invoked'
        t_warmup = _convert_time(self.t_warmup, state, ssr if self.scale_warmup else 1.0)
        t_decay = _convert_time(self.t_decay, state, ssr)
        t_max = _convert_time(Time.from_duration(1.0), state)
        if t_decay.unit != t_max.unit:
            raise ValueError(
                f't_decay={self.t_decay.to_timestring()} cannot be counted back from '
                f'max_duration={state.max_duration.to_timestring()}; '
                f'give it in {state.max_duration.unit.value}, or as a share such as 0.1dur.'
            )

        elapsed = state.timestamp.get(t_warmup.unit)
        remaining = t_max - state.timestamp.get(t_max.unit)
        warming_up, decaying = elapsed < t_warmup, remaining <= t_decay
        too_long = t_decay > t_max or (t_warmup.unit == t_max.unit and t_warmup + t_decay > t_max)
        # Trainer(scale_schedule_ratio=...) calls its schedulers once before it scales max_duration.
        before_scaling = ssr != 1.0 and state.timestamp.batch == 0
        if (too_long or (warming_up and decaying)) and not before_scaling:
            raise ValueError(
                f't_warmup={self.t_warmup.to_timestring()} and t_decay={self.t_decay.to_timestring()} '
                f'do not fit in max_duration={state.max_duration.to_timestring()}; '
                'shorten one of them or train for longer.'
            )

        if warming_up:
            return elapsed.value / t_warmup.value
        if decaying:
            left = remaining.value / t_decay.value if remaining.value > 0 else 0.0
            return self.alpha_f + (1 - self.alpha_f) * left
        return 1.0


def _parse(name: str, value: str | Time) -> Time:
    """Read a time that a schedule can be measured in, or raise a ValueError that names the setting."""
    try:
        time = Time.from_input(value)
    except (ValueError, RuntimeError, TypeError, OverflowError):
        raise ValueError(f"{name}={value!r} is not a Composer time; write a number and a unit, as '2000ba'.") from None
    if time.unit == TimeUnit.SECOND:
        raise ValueError(f'{name}={value} is on the wall clock; give it in dur, ba, tok, sp or ep.')
    if not time.value >= 0:
        raise ValueError(f'{name}={value} is negative; give a length of time.')
    return time
