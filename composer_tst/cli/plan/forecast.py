"""The plan of a run, and what other bag sizes and shares of its steps would bring.

FLOPs are those of matrix products, forward and backward: 6 for each active parameter that multiplies (all but the
input embedding) and 12 * layers * width of attention * length for attention, each per model position.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from typing import Any

from composer.core import Time, TimeUnit
from omegaconf import DictConfig

from composer_tst.cli.plan.config import Run, equal_steps
from composer_tst.cli.plan.cost import cost_phases, steps_of
from composer_tst.cli.plan.expected import expect
from composer_tst.cli.plan.measured import same_bags
from composer_tst.cli.plan.model import Model
from composer_tst.cli.plan.remarks import remarks
from composer_tst.cli.plan.stats import Data
from composer_tst.cli.plan.verdict import advice, but_for, judge
from composer_tst.settings import Phase

SWEEP_BAGS = (2, 3, 4, 6, 8, 12, 16)
SWEEP_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
BYTES_A_TOKEN = 4  # int32, where no stats.json says what shards come to


def make_plan(config: DictConfig, run: Run, model: Model, data: Data | None, speed: float) -> dict[str, Any]:
    """Everything there is to say, as JSON.

    Args:
        config: the YAML.
        run: what of it decides the cost.
        model: its model.
        data: the part of the data that the run reads, if it is known.
        speed: FLOP/s of all GPUs together, at the MFU reached.
    """
    costs = cost_phases(run, model, data.rows if data else None)
    flops = sum(cost.steps * cost.flops_per_step for cost in costs)
    steps = sum(cost.steps for cost in costs)
    tokens = sum(cost.data_tokens for cost in costs)
    equivalent = flops / model.flops(run.length)
    superposed = costs[:-1]
    share = sum(cost.steps for cost in superposed) / steps
    plan: dict[str, Any] = {
        'parameters': model.parameters,
        'active_parameters': model.active,
        'phases': [asdict(cost) for cost in costs],
        'steps': steps,
        'superposed_share_of_steps': share,
        'data_tokens': tokens,
        'equivalent_tokens': equivalent,
        'tokens_per_parameter': equivalent / model.parameters,
        'flops': flops,
        'hours': flops / speed / 3600,
        'shard_bytes': tokens * (data.bytes / data.tokens if data else BYTES_A_TOKEN),
        'passes_over_data': tokens / data.tokens if data else None,
        'share_of_tokens': _share_of_tokens(run),
        'expected': None,
        'measured': [],
        'remarks': remarks(config, run, data),
    }
    if superposed:
        bag = sum(cost.steps * cost.bag_size for cost in superposed) / sum(cost.steps for cost in superposed)
        shares = [end / steps for end in itertools.accumulate(cost.steps for cost in superposed)]
    else:  # what there is to gain with the published recipe
        run = replace(run, phases=(Phase(6, Time(0.3, TimeUnit.DURATION)),))
        bag, share, shares = 6, 0.3, [0.3]
    measured = same_bags(run, model, shares)
    plan['verdict'] = asdict(but_for(config, judge(run, model, equivalent, steps, share, bag, measured)))
    if superposed:
        expected = expect(run, model, equivalent, steps, share, bag, measured)
        plan['expected'] = expected and asdict(expected)
        plan['measured'] = [asdict(each) for each in measured]
    return plan


def _share_of_tokens(run: Run) -> str | None:
    """The `duration` where it is a share of tokens or samples, and so another one of steps."""
    if run.phases and run.max_duration.unit in (TimeUnit.TOKEN, TimeUnit.SAMPLE):
        until = run.phases[-1].until
        if until.unit == TimeUnit.DURATION:
            return f'{until.to_timestring()} of {run.max_duration.to_timestring()}'
    return None


def sweep(run: Run, model: Model, data: Data | None) -> list[dict[str, Any]]:
    """The plain run's steps with every bag size and share of them: data tokens and the expected change."""
    plain = replace(run, max_duration=equal_steps(run), phases=())
    steps = int(plain.max_duration.value)
    positions = steps * run.rows * run.length
    found = []
    for bag in SWEEP_BAGS:
        for share in SWEEP_SHARES:
            superposed = int(share * steps)
            this = replace(plain, phases=(Phase(bag, Time(share, TimeUnit.DURATION)),))
            planned = steps_of(this)
            assert planned is not None  # its length is in steps
            tokens = sum(planned.tokens_of(stretch) or 0 for stretch in planned.stretches)
            measured = same_bags(this, model, [share])
            expected = expect(this, model, positions, steps, share, bag, measured) if superposed else None
            found.append(
                {
                    'bag_size': bag,
                    'share': share,
                    'superposed_steps': superposed,
                    'data_tokens': tokens,
                    'passes_over_data': tokens / data.tokens if data else None,
                    'expected': expected and asdict(expected),
                    'advice': advice(model, positions / model.parameters, steps),
                }
            )
    return found
