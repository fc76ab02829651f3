"""The ways to train that the evidence compares."""

import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Args:
        name: How rows and tables call it.
        algorithm: What superposes, as llm-foundry's command line takes it; nothing for a baseline.
        length: Steps, as a multiple of the scale's.
    """

    name: str
    algorithm: tuple[str, ...] = ()
    length: float = 1.0


def superposed(name: str, **settings: object) -> Setting:
    """A setting with superposition."""
    return Setting(name, tuple(f'algorithms.token_superposition.{key}={json.dumps(settings[key])}' for key in settings))


def one_size(bag_size: int, share: float, **others: str) -> Setting:
    """One bag size until a share of the steps."""
    name = ', '.join((f's = {bag_size}', f'r = {share:g}', *others.values()))
    return superposed(name, bag_size=bag_size, duration=f'{share:g}dur', **others)


def phases(*steps: tuple[int, float], **others: str) -> Setting:
    """Several phases, ``(bag size, share of steps at which it ends)`` each."""
    listed = [{'bag_size': bag_size, 'until': f'{until:g}dur'} for bag_size, until in steps]
    name = f'phases {", ".join(str(s) for s, _ in steps)} until {", ".join(f"{until:g}" for _, until in steps)}'
    return superposed(', '.join((name, *others.values())), phases=listed, **others)


def limited(setting: Setting) -> Setting:
    """The same on a split that holds little more than a baseline reads."""
    return Setting(f'{setting.name}, {LIMITED}', (*setting.algorithm, 'train_loader.dataset.split=limited'))


def weighted(bag_size: int) -> list[Setting]:
    """One bag size with each weighting but the uniform one."""
    return [one_size(bag_size, 0.3, weighting=rule) for rule in ('power_law', 'exponential', 'first')]


def bags(setting: Setting) -> tuple[str, str, str] | None:
    """Bag sizes, the shares at which they end, and `expand`; None if a setting is more, or costs less than plain."""
    start = 'algorithms.token_superposition.'
    named = (part.removeprefix(start).split('=', 1) for part in setting.algorithm if part.startswith(start))
    given = {name: json.loads(value) for name, value in named}
    told = given.keys() <= {'bag_size', 'duration', 'phases', 'expand'} and len(given) == len(setting.algorithm)
    if not given or not told or setting.length != 1:
        return None
    if given.get('expand') == 'none':
        return None
    listed = given.get('phases') or [{'bag_size': given['bag_size'], 'until': given['duration']}]
    sizes, ends = zip(*((str(each['bag_size']), each['until'].removesuffix('dur')) for each in listed), strict=True)
    return ' '.join(sizes), ' '.join(ends), given.get('expand', 'sequence')


BASELINE = Setting('baseline')
LIMITED = 'limited data'
LONGER = tuple(Setting(f'baseline, {length:g} times the steps', length=length) for length in (1.5, 2))
PUBLISHED = one_size(6, 0.3)  # every published run of a dense model outside the grids
S4 = one_size(4, 0.3)
S4_BATCH = one_size(4, 0.3, expand='batch')
PUBLISHED_BATCH = one_size(6, 0.3, expand='batch')
SMALL_BAGS = one_size(2, 0.4)
# Phases from coarse to fine: which bag sizes, how they share the steps, where they end.
TO_FINE = (
    ((8, 0.1), (4, 0.2), (2, 0.3)),
    ((4, 0.2), (2, 0.3)),
    ((16, 0.1), (8, 0.2), (4, 0.3), (2, 0.4)),
    ((16, 0.075), (8, 0.15), (4, 0.225), (2, 0.3)),
    ((8, 0.2), (4, 0.3), (2, 0.35)),  # geometric shares, most of the data first
    ((8, 0.05), (4, 0.15), (2, 0.35)),  # geometric shares, most of the steps last
    ((8, 0.067), (4, 0.133), (2, 0.2)),
    ((8, 0.133), (4, 0.267), (2, 0.4)),
    ((8, 0.167), (4, 0.333), (2, 0.5)),
)
PHASES, PHASES_16, PHASES_05 = (phases(*TO_FINE[i]) for i in (0, 3, 8))
PHASES_BATCH = phases(*TO_FINE[0], expand='batch')
PHASES_BATCHES = tuple(phases(*TO_FINE[i], expand='batch') for i in (3, 7, 8))


def beyond() -> Sequence[Setting]:
    """What the paper did not try, at the cost of bags of 4 for 30 % of the steps."""
    return [*(phases(*steps) for steps in TO_FINE), phases(*TO_FINE[0], weighting='power_law'), PHASES_BATCH]


def by_batch() -> Sequence[Setting]:
    """Phases and single bag sizes, in rows folded by themselves."""
    return [
        *(phases(*steps, expand='batch') for steps in TO_FINE),
        *(one_size(bag_size, share, expand='batch') for bag_size, share in ((2, 0.3), (4, 0.3), (4, 0.5), (8, 0.3))),
    ]
