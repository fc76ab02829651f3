"""What a real run says at its start and its end, with nothing asked for."""

import logging
from pathlib import Path
from typing import Any

import pytest
from common.runs import Run
from common.trainers import llama, make_trainer, random_loader
from composer import Trainer

from composer_tst import TokenSuperposition, WarmupStableDecayScheduler

pytestmark = pytest.mark.streaming


def plain_trainer(yaml: str) -> Trainer:
    algorithm = TokenSuperposition(bag_size=4, duration='0.5dur')
    trainer, _ = make_trainer(llama(), random_loader(), algorithm, '40ba')
    trainer.fit()
    return trainer


def test_a_plain_trainer_says_what_it_is_going_to_do(tmp_path: Path):
    """In a process of its own, where no test has set up a log."""
    said = Run({}, tmp_path / 'log', train=plain_trainer).wait().printed()
    # 12 loader batches of 48 tokens: 20 steps of 4 and 20 of one.
    assert 'Superposition until step 20 of 40: bags of 4 for 20 steps' in said
    assert 'It reads 2.50 times the data of a plain run of as many steps, 8.3 epochs of this loader.' in said
    assert 'the training loss jumps, in published runs by 1 to 2 nats' in said
    assert 'The run reads its data 8.3 times' in said
    assert 'Superposition: 40 steps read ' in said


@pytest.mark.parametrize(
    ('settings', 'warning'),
    [
        ({'t_warmup': '12ba', 't_decay': '10ba'}, 'The learning rate warms up until step 12, and'),
        ({'t_warmup': '2ba', 't_decay': '36ba'}, 'The learning rate decays from step 4, and super'),
    ],
)  # fmt: skip
def test_a_schedule_that_does_not_fit_is_warned_of(
    settings: dict[str, Any], warning: str, caplog: pytest.LogCaptureFixture
):
    algorithm = TokenSuperposition(bag_size=2, duration='10ba')
    schedulers = WarmupStableDecayScheduler(**settings)
    trainer, _ = make_trainer(llama(), random_loader(rows=400), algorithm, '40ba', schedulers=schedulers)
    with caplog.at_level(logging.WARNING, logger='composer_tst'):
        trainer.fit()
    assert [record.getMessage() for record in caplog.records if record.getMessage().startswith(warning)]
