"""Where schedules turn, of Composer's, llm-foundry's and this package's, against the steps that their settings name."""

from typing import Any

import pytest
from common.trainers import llama, make_trainer, random_loader
from composer.core import Timestamp
from composer.optim import (
    ConstantScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearScheduler,
    LinearWithWarmupScheduler,
    MultiStepScheduler,
)

from composer_tst import TokenSuperposition, WarmupStableDecayScheduler
from composer_tst.lr_scheduler import turns_of

TOKENS_A_BATCH = 4 * 12  # of random_loader


def at(step: int) -> Timestamp:
    return Timestamp(batch=step, sample=4 * step, token=TOKENS_A_BATCH * step)


@pytest.mark.parametrize(
    ('scheduler', 'max_duration', 'turns'),
    [
        (WarmupStableDecayScheduler('30ba', '0.25dur'), '200ba', (30, 150)),
        (WarmupStableDecayScheduler('30ba', '0.25dur'), '2000ba', (30, 1500)),
        (WarmupStableDecayScheduler('777ba', '1234ba'), '9000ba', (777, 7766)),
        (WarmupStableDecayScheduler('0.1dur', '0.2dur'), f'{200 * TOKENS_A_BATCH}tok', (20, 160)),
        (WarmupStableDecayScheduler('0ba', '0ba'), '200ba', (None, None)),
        (CosineAnnealingWithWarmupScheduler('30ba'), '200ba', (30, 30)),
        (CosineAnnealingScheduler(), '200ba', (None, 0)),
        (LinearScheduler(), '200ba', (None, 0)),
        (LinearWithWarmupScheduler('40sp'), '800sp', (10, 10)),
        (MultiStepScheduler(['120ba', '160ba']), '200ba', (None, 119)),
        (ConstantWithWarmupScheduler('25ba'), '200ba', (25, None)),
        (ConstantScheduler(), '200ba', (None, None)),
        ([], '200ba', (None, None)),
    ],
)
def test_turns(scheduler: Any, max_duration: str, turns: tuple[int | None, int | None]):
    trainer, _ = make_trainer(llama(), random_loader(), max_duration=max_duration, schedulers=scheduler)
    longest = trainer.state.max_duration
    assert longest is not None
    total = {'ba': 1, 'sp': 4, 'tok': TOKENS_A_BATCH}
    assert turns_of(trainer.state, at, int(longest.value) // total[longest.unit.value]) == turns


def test_a_schedule_of_the_users_is_not_asked_ahead():
    asked = []

    def remembers(state: Any) -> float:
        asked.append(int(state.timestamp.batch))
        return 1.0

    trainer, _ = make_trainer(llama(), random_loader(), TokenSuperposition(2, '3ba'), '8ba', schedulers=remembers)
    trainer.fit()
    assert asked
    assert asked == sorted(asked)
    assert turns_of(trainer.state, at, 8) == (None, None)


def test_a_run_warns_of_any_schedule_that_turns_too_early_or_too_late(caplog: pytest.LogCaptureFixture):
    def said(scheduler: Any, max_duration: str = '20ba') -> str:
        caplog.clear()
        algorithm = TokenSuperposition(2, '0.3dur')
        trainer, _ = make_trainer(llama(), random_loader(), algorithm, max_duration, schedulers=scheduler)
        trainer.fit()
        return caplog.text

    assert 'warms up until step 15, and superposition lasts until step 6 alone' in said(
        CosineAnnealingWithWarmupScheduler('15ba')
    )
    assert 'decays from step 0, and superposition lasts until step 6' in said(LinearScheduler())
    # Bags of 2 until 288 of 960 tokens: 3 steps, and 14 of one batch each.
    text = said(WarmupStableDecayScheduler('0ba', '0.9dur'), f'{20 * TOKENS_A_BATCH}tok')
    assert 'decays from step 1, and superposition lasts until step 3' in text
    assert 'The learning rate' not in said(WarmupStableDecayScheduler('2ba', '0.1dur'))
