"""Plans and sweeps as text for people."""

from __future__ import annotations

from typing import Any


def table(plan: dict[str, Any], gpu: str) -> str:
    """The plan in lines for people."""
    active = '' if plan['active_parameters'] == plan['parameters'] else f', {si(plan["active_parameters"])} active'
    lines = [
        f'parameters          {si(plan["parameters"])}{active}',
        '',
        'phase        bag      steps   data tokens   FLOPs per step',
    ]
    for cost in plan['phases']:
        name = 'superposed' if cost['bag_size'] > 1 else 'plain'
        lines.append(
            f'{name:<10} {cost["bag_size"]:>5} {cost["steps"]:>10,} {si(cost["data_tokens"]):>13}'
            f' {cost["flops_per_step"]:>16.3g}'
        )
    lines += [
        f'{"all":<16} {plan["steps"]:>10,} {si(plan["data_tokens"]):>13} {plan["flops"]:>16.3g} in all',
        '',
        f'superposed steps    {plan["superposed_share_of_steps"]:.1%} of all',
        f'equivalent tokens   {si(plan["equivalent_tokens"])}: what plain training reads at this cost',
        f'shards              {plan["shard_bytes"] / 1e9:,.1f} GB',
    ]
    passes = plan['passes_over_data']
    if passes is not None:
        repeats = 'no row is read twice' if passes <= 1 else 'data repeats: prepare more, or lower bag_size or duration'
        lines.append(f'passes over data    {passes:.2f}, {repeats}')
    lines.append(f'time                {plan["hours"]:,.1f} hours on {gpu}')
    expected = plan['expected']
    if expected:
        lines.append(
            f'expected loss       {expected["change"]:+.3f} nats against plain training at this cost, by '
            f'{expected["source"]} ({over_scales(expected)})'
        )
        if expected['extrapolation']:
            lines.append(f'                    This is an extrapolation: {expected["extrapolation"]}.')
    elif plan['superposed_share_of_steps']:
        lines.append('expected loss       not stated: no published grid has this bag size, share and weighting')
    return '\n'.join(lines)


def over_scales(expected: dict[str, Any]) -> str:
    """How much the published grids differ."""
    if expected['low'] == expected['high']:
        return 'the only published grid of these settings'
    return f'{expected["low"]:+.3f} to {expected["high"]:+.3f} over published scales'


def si(number: float) -> str:
    """A number with three digits and a suffix."""
    for size, suffix in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if number >= size:
            return f'{number / size:.3g}{suffix}'
    return f'{number:.3g}'


def sweep_table(points: list[dict[str, Any]]) -> str:
    """The sweep as a grid: change of the final loss, and data tokens."""
    shares = dict.fromkeys(point['share'] for point in points)
    lines = ['bag size' + ''.join(f'r = {share}'.rjust(18) for share in shares)]
    whys: dict[str, str] = {}
    for bag in dict.fromkeys(point['bag_size'] for point in points):
        cells = []
        for point in (point for point in points if point['bag_size'] == bag):
            expected = point['expected']
            change = f'{expected["change"]:+.3f}' if expected else 'not stated'
            if expected and expected['extrapolation']:
                change += whys.setdefault(expected['extrapolation'], '*' * (len(whys) + 1))
            cells.append(f'{change} {si(point["data_tokens"])}'.rjust(18))
        lines.append(f'{bag:>8}' + ''.join(cells))
    lines.append('Each: expected change of the final loss in nats, and data tokens.')
    lines += [f'{mark} This is an extrapolation: {why}.' for why, mark in whys.items()]
    return '\n'.join(lines)
