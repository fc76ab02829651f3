"""Where schedules turn, of Composer's and this package's, against the steps that their settings name."""

from types import SimpleNamespace
from typing import Any

import pytest
from composer.core import Time, Timestamp
from composer.optim import (
    ConstantScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearScheduler,
    LinearWithWarmupScheduler,
    MultiStepScheduler,
)

from composer_tst import WarmupStableDecayScheduler
from composer_tst.cli.plan.remarks import turns

ROWS, TOKENS = 4, 48  # of a batch


@pytest.mark.parametrize(
    ('scheduler', 'max_duration', 'expected'),
    [
        (WarmupStableDecayScheduler('30ba', '0.25dur'), '200ba', (30, 150)),
        (WarmupStableDecayScheduler('30ba', '0.25dur'), '2000ba', (30, 1500)),
        (WarmupStableDecayScheduler('777ba', '1234ba'), '9000ba', (777, 7766)),
        (WarmupStableDecayScheduler('0.1dur', '0.2dur'), f'{200 * TOKENS}tok', (20, 160)),
        (WarmupStableDecayScheduler('0ba', '0ba'), '200ba', (None, None)),
        (CosineAnnealingWithWarmupScheduler('30ba'), '200ba', (30, 30)),
        (CosineAnnealingScheduler(), '200ba', (None, 0)),
        (LinearScheduler(), '200ba', (None, 0)),
        (LinearWithWarmupScheduler('40sp'), '800sp', (10, 10)),
        (MultiStepScheduler(['120ba', '160ba']), '200ba', (None, 119)),
        (ConstantWithWarmupScheduler('25ba'), '200ba', (25, None)),
        (ConstantScheduler(), '200ba', (None, None)),
    ],
)
def test_turns(scheduler: Any, max_duration: str, expected: tuple[int | None, int | None]):
    longest = Time.from_timestring(max_duration)

    def rate(step: int) -> float:
        now = Timestamp(batch=step, sample=ROWS * step, token=TOKENS * step)
        elapsed = now.get(longest.unit) / longest
        state: Any = SimpleNamespace(max_duration=longest, timestamp=now, get_elapsed_duration=lambda: elapsed)
        return scheduler(state)

    steps = int(longest.value) // {'ba': 1, 'sp': ROWS, 'tok': TOKENS}[longest.unit.value]
    assert turns(rate, steps) == expected
