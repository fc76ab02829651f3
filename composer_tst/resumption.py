"""Which settings may differ between a checkpoint and the run that resumes from it."""

from collections.abc import Mapping
from typing import Any

from composer_tst.settings import Phase, parse_phases

INSIST = 'load it by load_path, not autoresume, with load_ignore_keys: [state/algorithms]'


def check_resumed_settings(saved: Mapping[str, Any], current: Mapping[str, Any], begun: int, under_way: bool) -> str:
    """Compare the settings in a checkpoint with those of the run that resumes from it.

    What has been trained cannot be changed: the bag sizes of the phases that have begun (recovery counts as one, of
    bag size 1), the end of the one under way, and how bags are made and weighed once there were any. What concerns
    phases to come, or the end of one that has ended, is harmless.

    Args:
        saved: The checkpoint's ``phases`` (a list of ``{bag_size, until}``), ``superpose``, ``expand`` and
            ``weighting``.
        current: The same of the run.
        begun: How many phases have taken a step, recovery included.
        under_way: Whether the last of them may take more.

    Returns:
        str: The settings that differ harmlessly, as a sentence; empty if there are none.

    Raises:
        ValueError: If a setting differs that has already been trained with.
    """
    before, now = _phases(saved), _phases(current)
    for index in range(begun):
        _refuse_if_changed('bag_size', _bag_size(before, index), _bag_size(now, index))
    if under_way and begun <= len(before):
        name = 'duration' if len(before) == len(now) == 1 else 'until'
        _refuse_if_changed(name, before[begun - 1].until.to_timestring(), now[begun - 1].until.to_timestring())
    names = ('superpose', 'expand', 'weighting')
    if begun:
        for name in names:
            _refuse_if_changed(name, saved[name], current[name])

    changes = [f'{name} is {current[name]} and was {saved[name]}' for name in names if current[name] != saved[name]]
    if saved['phases'] != current['phases']:
        changes.append(f'phases is {current["phases"]} and was {saved["phases"]}')
    return '; '.join(changes)


def _phases(settings: Mapping[str, Any]) -> list[Phase]:
    return parse_phases(None, None, settings['phases'])


def _bag_size(phases: list[Phase], index: int) -> int:
    return phases[index].bag_size if index < len(phases) else 1


def _refuse_if_changed(name: str, saved: Any, current: Any) -> None:
    if current != saved:
        raise ValueError(
            f'{name} is {current} but the checkpoint was trained with {saved}: set it back or, to go on with '
            f'{current} from here all the same, {INSIST}.'
        )
