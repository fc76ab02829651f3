"""What a user sets: phases, how bags are made and weighed, and which settings may differ on resume."""

import difflib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import Time, TimeUnit

from composer_tst.ops.fold import check_bag_size, check_fold_settings

# The settings of `token_superposition` in a YAML.
SETTINGS = ('bag_size', 'duration', 'phases', 'superpose', 'expand', 'weighting')
_UNITS = (TimeUnit.DURATION, TimeUnit.BATCH, TimeUnit.TOKEN, TimeUnit.SAMPLE, TimeUnit.EPOCH)

Weighting = str | Sequence[float]

# Weight of the k-th target, k from 1, before normalising (arXiv 2605.06546).
_RULES = {
    'uniform': lambda k: 1.0,
    'power_law': lambda k: 1.0 / k,
    'exponential': lambda k: math.exp(-k),
    'first': lambda k: 1.0 if k == 1 else 0.0,
}


@dataclass(frozen=True)
class Phase:
    """A superposition phase: bags of ``bag_size`` tokens ``until`` a moment of training."""

    bag_size: int
    until: Time


@dataclass(frozen=True)
class Settings:
    """The checked settings of a run. They never change.

    Attributes:
        phases: From coarse to fine.
        superpose: ``both``, ``input`` or ``output``.
        expand: ``sequence``, ``batch`` or ``none``.
        weighting: The name of a rule, or the weights of a bag's targets.
    """

    phases: tuple[Phase, ...]
    superpose: str
    expand: str
    weighting: str | tuple[float, ...]

    def draws(self, bag_size: int) -> int:
        """Loader batches that one step reads."""
        return 1 if self.expand == 'none' else bag_size

    def microbatch_scale(self, bag_size: int) -> int:
        """How many times more rows a microbatch may have: rows are shorter, except with ``sequence`` and ``output``."""
        return 1 if self.expand == 'sequence' or self.superpose == 'output' else bag_size

    def weights(self, bag_size: int) -> torch.Tensor:
        """Weights of a bag's targets, ``(bag_size,)``. They sum to one."""
        return target_weights(self.weighting, bag_size)

    def as_dict(self) -> dict[str, Any]:
        """The settings in plain Python types."""
        return {
            'phases': [{'bag_size': phase.bag_size, 'until': phase.until.to_timestring()} for phase in self.phases],
            'superpose': self.superpose,
            'expand': self.expand,
            'weighting': self.weighting if isinstance(self.weighting, str) else list(self.weighting),
        }


def parse_settings(
    bag_size: int | None,
    duration: str | Time | None,
    superpose: str,
    expand: str,
    weighting: Weighting,
    phases: Sequence[Mapping[str, Any]] | None,
) -> Settings:
    """Check the settings of a run.

    Raises:
        ValueError: If a setting cannot be followed, or two settings exclude each other.
    """
    parsed = parse_phases(bag_size, duration, phases)
    check_fold_settings(expand, superpose)
    for phase in parsed:
        # A rule is checked by its name alone, so any number of weights will do.
        weights = target_weights(weighting, 1 if isinstance(weighting, str) else phase.bag_size)
        if superpose == 'input' and weights[0] == 0:
            raise ValueError(
                f'weighting is {weighting} but superpose: input predicts the first token alone: '
                'give that one a positive weight.'
            )
    if not isinstance(weighting, str):
        weighting = tuple(float(weight) for weight in weighting)
    return Settings(tuple(parsed), superpose, expand, weighting)


def refuse_unknown(name: str, unknown: Iterable[str], known: Sequence[str]) -> None:
    """Refuse, with a ValueError, settings that ``name`` does not have, and suggest the nearest ``known`` one."""
    for setting in unknown:
        nearest = difflib.get_close_matches(setting, known, 1)
        meant = f' (did you mean {nearest[0]}?)' if nearest else ''
        there_are = f'use {", ".join(known)}' if known else 'it has none'
        raise ValueError(f'{name}.{setting} is no setting{meant}: {there_are}.')


def parse_phases(
    bag_size: int | None,
    duration: str | Time | None,
    phases: Sequence[Mapping[str, Any]] | None,
) -> list[Phase]:
    """Read the settings ``bag_size`` and ``duration``, or ``phases``.

    Raises:
        ValueError: If both or neither are given; if a bag size is not an integer of at least 2, or grows from one
            phase to the next; if a moment is not a positive Composer Time in dur, ba, tok, sp or ep, is a share of
            1dur or more, or is not after the moment before it.
    """
    if phases is None:
        if bag_size is None or duration is None:
            raise ValueError(
                f'bag_size is {bag_size!r} and duration is {duration!r}: give both, as bag_size: 6 and duration: '
                '0.3dur, or give phases.'
            )
        return [Phase(check_bag_size(bag_size, 2), _moment(duration, 'duration'))]
    if bag_size is not None or duration is not None:
        raise ValueError('phases says what bag_size and duration would: give phases, or bag_size and duration.')
    if isinstance(phases, (str, Mapping)) or not isinstance(phases, Sequence) or not phases:
        raise ValueError(f'phases is {phases!r}: give a list of {{bag_size, until}}, from coarse to fine.')
    parsed = []
    for phase in phases:
        if not isinstance(phase, Mapping) or set(phase) != {'bag_size', 'until'}:
            raise ValueError(f'A phase is {phase!r}: give it bag_size and until, and nothing else.')
        parsed.append(Phase(check_bag_size(phase['bag_size'], 2), _moment(phase['until'], 'until')))
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


def _moment(value: Any, name: str) -> Time:
    try:
        moment = value if isinstance(value, Time) else Time.from_timestring(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f'{name} is {value!r}, which is no Composer Time: write it as 0.3dur, 6000ba, 100000tok, 500sp or 1ep.'
        ) from None
    if moment.unit not in _UNITS:
        raise ValueError(f'{name} is {value}: give it in dur, ba, tok, sp or ep.')
    if not moment.value > 0:  # true of NaN too
        raise ValueError(f'{name} is {value}, so no step would be superposed: give a positive time.')
    if moment.unit == TimeUnit.DURATION and moment.value >= 1:
        raise ValueError(
            f'{name} is {value}, so superposition would last to the end and leave no recovery phase: '
            'give less than 1dur.'
        )
    return moment


def target_weights(weighting: Weighting, bag_size: int) -> torch.Tensor:
    """Compute the weights of the targets in one bag. They sum to one.

    Args:
        weighting: ``uniform``, ``power_law`` (``1/k``), ``exponential`` (``exp(-k)``), ``first``, or a
            sequence of ``bag_size`` numbers.
        bag_size: Targets in a bag, ``s``.

    Returns:
        torch.Tensor: Float32 of shape ``(s,)``, on the CPU.

    Raises:
        ValueError: If the name is unknown, or the sequence has the wrong length, a negative or non-finite
            number, or sums to zero.
    """
    try:
        rule = _RULES[weighting] if isinstance(weighting, str) else None
        values = [float(w) for w in weighting] if rule is None else [rule(k) for k in range(1, bag_size + 1)]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f'weighting is {weighting!r}: use one of {", ".join(_RULES)}, or a list of numbers.') from None
    if len(values) != bag_size:
        raise ValueError(
            f'weighting has {len(values)} numbers but bag_size is {bag_size}: give one number for each target.'
        )
    if any(not math.isfinite(w) or w < 0 for w in values) or sum(values) == 0:
        raise ValueError(f'weighting is {values}: give finite numbers that are not negative and do not all vanish.')
    weights = torch.tensor(values, dtype=torch.float64)
    return (weights / weights.sum()).float()


def check_resumed_settings(saved: Mapping[str, Any], settings: Settings, begun: int, under_way: bool) -> str:
    """Compare the settings in a checkpoint with the settings of the run that resumes from it.

    What has been trained cannot change: the bag sizes of phases that have begun, the end of the phase under way, and
    once a phase has begun, how bags are made and weighed. Recovery counts as a phase of bag size 1. Settings of phases
    to come may change, and so may the end of a phase that has ended.

    Args:
        saved: The settings in the checkpoint, as :meth:`Settings.as_dict` gives them.
        settings: The settings of the run.
        begun: How many phases have taken a step, recovery included.
        under_way: Whether the last phase that has begun may take more steps.

    Returns:
        str: The harmless differences, as a sentence; empty if there are none.

    Raises:
        ValueError: If a setting differs that has already been trained with.
    """
    before, current = parse_phases(None, None, saved['phases']), settings.as_dict()
    recovery = Phase(1, Time(1.0, TimeUnit.DURATION))
    trained = list(itertools.zip_longest(before, settings.phases, fillvalue=recovery))[:begun]
    for was, now in trained:
        _refuse_if_changed('bag_size', was.bag_size, now.bag_size)
    if under_way and begun <= len(before):
        name = 'duration' if len(before) == len(settings.phases) == 1 else 'until'
        _refuse_if_changed(name, *(phase.until.to_timestring() for phase in trained[-1]))
    names = ('superpose', 'expand', 'weighting')
    if begun:
        for name in names:
            _refuse_if_changed(name, saved[name], current[name])
    return '; '.join(
        f'{name} is {current[name]} and was {saved[name]}'
        for name in (*names, 'phases')
        if current[name] != saved[name]
    )


def _refuse_if_changed(name: str, saved: Any, current: Any) -> None:
    if current != saved:
        raise ValueError(
            f'{name} is {current} but the checkpoint was trained with {saved}: set it back or, to go on with '
            f'{current} from here all the same, load it by load_path, not autoresume, with load_ignore_keys: '
            '[state/algorithms].'
        )
