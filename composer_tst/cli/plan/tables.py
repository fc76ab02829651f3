"""Plans and sweeps as text for people."""

from __future__ import annotations

from typing import Any

from composer_tst.cli.plan.keys import RECIPE
from composer_tst.cli.plan.measured import is_sure
from composer_tst.cli.plan.units import si, size, span
from composer_tst.cli.plan.verdict import change


def table(plan: dict[str, Any], gpu: str, verbose: bool) -> str:
    """The plan in lines for people, the verdict last; all there is to say if verbose."""
    active = '' if plan['active_parameters'] == plan['parameters'] else f', {si(plan["active_parameters"])} active'
    lines = [
        f'parameters          {si(plan["parameters"])}{active}',
        '',
        'phase        bag      steps   data tokens' + ('   FLOPs per step' if verbose else ''),
    ]
    for cost in plan['phases']:
        name = 'superposed' if cost['bag_size'] > 1 else 'plain'
        line = f'{name:<10} {cost["bag_size"]:>5} {cost["steps"]:>10,} {si(cost["data_tokens"]):>13}'
        lines.append(line + (f' {cost["flops_per_step"]:>16.3g}' if verbose else ''))
    line = f'{"all":<16} {plan["steps"]:>10,} {si(plan["data_tokens"]):>13}'
    share = plan['superposed_share_of_steps']
    lines += [
        line + (f' {plan["flops"]:>16.3g} in all' if verbose else ''),
        '',
        f'superposed steps    {share:.1%} of all',
    ]
    if plan['share_of_tokens']:
        lines += [
            f'                    {plan["share_of_tokens"]} is a share of the data, of which a superposed step reads',
            '                    more: for that share of the steps give max_duration in ba.',
        ]
    lines.append(f'shards              {size(plan["shard_bytes"])}')
    passes = plan['passes_over_data']
    if passes is not None:
        repeats = 'no row is read twice' if passes <= 1 else 'data repeats: prepare more, or lower bag_size or duration'
        lines.append(f'passes over data    {passes:.2f}, {repeats}')
    lines.append(f'time                {span(plan["hours"])} on {gpu}')
    if verbose:
        lines += all_that_is_known(plan)
    if plan['remarks']:
        lines += ['', *plan['remarks']]
    return '\n'.join([*lines, '', *verdict_lines(plan)])


def verdict_lines(plan: dict[str, Any]) -> list[str]:
    """Whether the run is likely to gain, by which run that is known, and what to do."""
    found = plan['verdict']
    plain = '' if plan['superposed_share_of_steps'] else f'No superposition here; with {RECIPE}: '
    lines = [f'verdict             {plain}{found["verdict"]}. {found["why"]}']
    if found['nearest']:
        lines += [f'nearest run         {found["nearest"]}', f'                    {found["distance"]}']
    return [*lines, f'advice              {found["advice"]}']


def all_that_is_known(plan: dict[str, Any]) -> list[str]:
    """What plain training reads at this cost, and each change of the final loss that is known of these bags."""
    lines = [
        f'equivalent tokens   {si(plan["equivalent_tokens"])}: what plain training reads at this cost, '
        f'{plan["tokens_per_parameter"]:.3g} per parameter'
    ]
    expected = plan['expected']
    if expected:
        lines.append(
            f'expected loss       {change(expected["change"])} nats against plain training of as many steps, by '
            f'{expected["source"]}, {expected["tokens_per_parameter"]:.3g} tokens per parameter in '
            f'{expected["steps"]:,} steps ({span_of(expected)})'
        )
        if expected['extrapolation']:
            lines.append(f'                    This is an extrapolation: {expected["extrapolation"]}.')
    elif plan['superposed_share_of_steps']:
        lines.append('expected loss       not stated: nothing is known of these settings near this size and budget')
    found = plan['measured']
    if found:
        who = f'{found[0]["family"]} of {si(found[0]["parameters"])} parameters'
        lines.append(
            f'measured            in nats against plain training of as many steps, on {who} (docs/evidence.md), where '
            f'this run has {si(plan["parameters"])}:'
        )
    for of in found:
        told = change(of['change'], of['deviation'], is_sure(of['change'], of['deviation'], of['seeds']))
        lines.append(
            f'{told:>42} at {of["tokens_per_parameter"]:.2g} tokens per parameter, {of["steps"]:,} steps of '
            f'{of["text"]}, {of["seeds"]} seeds'
        )
    return lines


def span_of(expected: dict[str, Any]) -> str:
    """How much the expected loss differs over what it was read of."""
    if expected['low'] == expected['high']:
        return 'the only published grid of these settings'
    return f'{change(expected["low"])} to {change(expected["high"])}, {expected["range"]}'


def sweep_table(points: list[dict[str, Any]]) -> str:
    """The sweep as a grid: change of the final loss, and data tokens; and what to do."""
    shares = dict.fromkeys(point['share'] for point in points)
    known = [point for point in points if point['expected']]
    best = min((point['expected']['change'] for point in known), default=None)
    whys = list(dict.fromkeys(point['expected']['extrapolation'] for point in known))
    # What is true of all of them is said once.
    marks = {why: '*' * index for index, why in enumerate(sorted(filter(None, whys)), 1)} if len(whys) > 1 else {}
    repeats = False
    lines = ['bag size' + ''.join(f'r = {share}'.rjust(22) for share in shares)]
    for bag in dict.fromkeys(point['bag_size'] for point in points):
        cells = []
        for point in (point for point in points if point['bag_size'] == bag):
            expected = point['expected']
            cell = 'not stated' if point['superposed_steps'] else 'no step'
            if expected:
                cell = ('>' if expected['change'] == best else '') + change(expected['change'])
                cell += marks.get(expected['extrapolation'], '')
            again = (point['passes_over_data'] or 0) > 1
            repeats = repeats or again
            cells.append(f'{cell} {si(point["data_tokens"])}{"!" if again else ""}'.rjust(22))
        lines.append(f's = {bag}'.ljust(8) + ''.join(cells))
    lines += [
        '',
        's is the bag size, r the share of steps that are superposed (duration). Each cell: the expected change of the',
        'final loss in nats against plain training of as many steps, and the data tokens that are read.',
    ]
    if best is not None:
        lines.append(f'By {"; ".join(dict.fromkeys(point["expected"]["source"] for point in known))}.')
        lines.append('> marks the lowest expected loss.')
    if repeats:
        lines.append('! There is less data than that: some of it would be read more than once.')
    if len(whys) == 1 and whys[0]:
        lines.append(f'All of it is an extrapolation: {whys[0]}.')
    lines += [f'{mark} This is an extrapolation: {why}.' for why, mark in marks.items()]
    lines.append(points[0]['advice'])
    return '\n'.join(lines)
