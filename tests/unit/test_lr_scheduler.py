"""WarmupStableDecayScheduler against its formula, on the learning rates of real Trainer runs."""

from typing import Any

import pytest
import torch
from composer import Callback, ComposerModel, DataSpec, State, Time, Trainer
from composer.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader

from composer_tst.lr_scheduler import WarmupStableDecayScheduler

PEAK = 0.5
ROWS, LENGTH, BATCHES = 2, 4, 10  # a batch is 2 samples of 4 tokens, an epoch 10 batches


class TinyModel(ComposerModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(LENGTH, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch)

    def loss(self, outputs: torch.Tensor, batch: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return outputs.square().mean()


class LearningRates(Callback):
    """The multiplier that each batch was trained with."""

    def __init__(self):
        self.multipliers: list[float] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        self.multipliers.append(state.optimizers[0].param_groups[0]['lr'] / PEAK)


def trainer_for(scheduler: WarmupStableDecayScheduler, max_duration: str, **kwargs: Any) -> Trainer:
    model = TinyModel()
    loader = DataLoader(torch.ones(ROWS * BATCHES, LENGTH), batch_size=ROWS)  # type: ignore[arg-type]
    return Trainer(
        model=model,
        train_dataloader=DataSpec(
            loader,
            get_num_samples_in_batch=len,
            get_num_tokens_in_batch=lambda batch: batch.numel(),
        ),
        optimizers=torch.optim.SGD(model.parameters(), lr=PEAK),
        schedulers=scheduler,
        max_duration=max_duration,
        callbacks=LearningRates(),
        device='cpu',
        progress_bar=False,
        **kwargs,
    )


def multipliers(trainer: Trainer) -> list[float]:
    """Of every batch trained, oldest first."""
    trainer.fit()
    return rates_of(trainer)


def rates_of(trainer: Trainer) -> list[float]:
    (rates,) = (callback for callback in trainer.state.callbacks if isinstance(callback, LearningRates))
    return rates.multipliers


def clock(batches: int) -> list[int]:
    """What Composer's clock shows when it reads each batch's rate, which it does before moving the clock."""
    return [0, *range(batches - 1)]


def formula(t: float, warmup: float, decay: float, end: float, alpha_f: float = 0.0) -> float:
    if t < warmup:
        return t / warmup
    if t < end - decay:
        return 1.0
    if t < end:
        return alpha_f + (1 - alpha_f) * (end - t) / decay
    return alpha_f


@pytest.mark.parametrize(
    ('max_duration', 't_warmup', 't_decay', 'warmup', 'decay', 'batches'),
    # warmup, decay and batches: the same in batches, of 8 tokens or 2 samples each
    [
        ('20ba', '5ba', '8ba', 5, 8, 20),
        ('20ba', '0.25dur', '0.4dur', 5, 8, 20),
        ('20ba', '0ba', '0ba', 0, 0, 20),
        ('20ba', '12ba', '8ba', 12, 8, 20),  # nothing in between
        ('20ba', '40tok', '8ba', 5, 8, 20),  # warmup on another clock
        ('160tok', '40tok', '64tok', 5, 8, 20),
        ('160tok', '5ba', '0.4dur', 5, 8, 20),
        ('157tok', '5ba', '64tok', 5, 8, 157 / 8),  # an end within a batch
        ('40sp', '10sp', '16sp', 5, 8, 20),
        ('2ep', '5ba', '0.4dur', 5, 8, 20),
        ('2ep', '0.25dur', '1ep', 5, 10, 20),
        ('2ep', '1ep', '7ba', 10, 7, 20),
        ('20ba', '5ba', '1ep', 5, 10, 20),
    ],
)
def test_every_batch_is_trained_at_the_formulas_rate(max_duration, t_warmup, t_decay, warmup, decay, batches):
    scheduler = WarmupStableDecayScheduler(t_warmup=t_warmup, t_decay=t_decay, alpha_f=0.1)
    expected = [formula(t, warmup, decay, batches, alpha_f=0.1) for t in clock(20)]
    assert multipliers(trainer_for(scheduler, max_duration)) == pytest.approx(expected)


def test_decay_defaults_to_the_last_tenth_and_to_nothing():
    expected = [formula(t, 2, 2, 20) for t in clock(20)]
    assert multipliers(trainer_for(WarmupStableDecayScheduler('2ba'), '20ba')) == pytest.approx(expected)


def test_times_may_be_time_objects():
    scheduler = WarmupStableDecayScheduler(Time(5, 'ba'), Time(0.4, 'dur'))
    expected = [formula(t, 5, 8, 20) for t in clock(20)]
    assert multipliers(trainer_for(scheduler, '20ba')) == pytest.approx(expected)


@pytest.mark.parametrize(('scale_warmup', 'warmup'), [(False, 4), (True, 8)])
@pytest.mark.parametrize('t_decay', ['6ba', '0.6dur'])
def test_scale_schedule_ratio_stretches_the_decay_and_if_asked_the_warmup(scale_warmup, warmup, t_decay):
    scheduler = WarmupStableDecayScheduler('4ba', t_decay, scale_warmup=scale_warmup)
    expected = [formula(t, warmup, 12, 20) for t in clock(20)]
    trainer = trainer_for(scheduler, '10ba', scale_schedule_ratio=2.0)
    assert multipliers(trainer) == pytest.approx(expected)


def test_schedule_ratio_below_1_shrinks_the_decay():
    expected = [formula(t, 4, 6, 20) for t in clock(20)]
    trainer = trainer_for(WarmupStableDecayScheduler('4ba', '12ba'), '40ba', scale_schedule_ratio=0.5)
    assert multipliers(trainer) == pytest.approx(expected)


def test_a_longer_second_fit_holds_again_and_decays_at_the_new_end():
    trainer = trainer_for(WarmupStableDecayScheduler('2ba', '4ba'), '10ba')
    trainer.fit()
    trainer.fit(duration='10ba')
    first = [formula(t, 2, 4, 10) for t in clock(10)]
    # the first batch of the second fit still has the rate that the first fit left behind
    second = [formula(9, 2, 4, 10)] + [formula(t, 2, 4, 20) for t in range(10, 19)]
    assert rates_of(trainer) == pytest.approx(first + second)


def test_at_and_after_the_end_the_multiplier_is_alpha_f():
    scheduler = WarmupStableDecayScheduler('2ba', '4ba', alpha_f=0.25)
    trainer = trainer_for(scheduler, '10ba')
    trainer.fit()
    assert scheduler(trainer.state) == 0.25
    trainer.state.max_duration = '8ba'
    assert scheduler(trainer.state) == 0.25


@pytest.mark.parametrize(
    ('max_duration', 't_warmup', 't_decay', 'message'),
    [
        ('20ba', '13ba', '8ba', 't_warmup=13ba and t_decay=8ba do not fit in max_duration=20ba'),
        ('160tok', '0.6dur', '0.5dur', 't_warmup=0.6dur and t_decay=0.5dur do not fit'),
        ('2ep', '1ep', '11ba', 't_warmup=1ep and t_decay=11ba do not fit'),
        (
            '160tok',
            '1ba',
            '8ba',
            't_decay=8ba cannot be counted back from max_duration=160tok; give it in tok',
        ),
        (
            '20ba',
            '1ba',
            '64tok',
            't_decay=64tok cannot be counted back from max_duration=20ba; give it in ba',
        ),
        ('40sp', '1ba', '1ep', 't_decay=1ep cannot be counted back from max_duration=40sp; give it in sp'),
    ],
)
def test_schedules_that_do_not_fit_are_refused_before_training(max_duration, t_warmup, t_decay, message):
    with pytest.raises(ValueError, match=message):
        trainer_for(WarmupStableDecayScheduler(t_warmup, t_decay), max_duration)


def test_overlap_of_units_that_cannot_be_compared_is_refused_where_the_decay_would_begin():
    trainer = trainer_for(WarmupStableDecayScheduler('13ba', '0.5dur'), '160tok')
    with pytest.raises(ValueError, match='t_warmup=13ba and t_decay=0.5dur do not fit in max_duration=160tok'):
        trainer.fit()
    assert trainer.state.timestamp.batch == 10


def test_epochs_of_unknown_length_are_refused():
    state = trainer_for(WarmupStableDecayScheduler('1ba'), '20ba').state
    state.set_dataloader(None)
    with pytest.raises(RuntimeError, match='dataloader_len is None'):
        WarmupStableDecayScheduler('1ep')(state)
