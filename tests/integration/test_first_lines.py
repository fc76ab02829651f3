"""What a real run says at its start and its end, with nothing asked for."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from common.runs import Run
from common.trainers import llama, logged, make_trainer, random_loader
from composer import Trainer

from composer_tst import TokenSuperposition


class Joined:
    """Two batches of a loader as one; all else is the loader's."""

    def __init__(self, loader: Any):
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader) // 2

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)['_loader'], name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        for first, second in zip(batches, batches, strict=True):
            yield {key: torch.cat([first[key], second[key]]) for key in first}


def every_second(rows: list) -> dict[str, torch.Tensor]:
    return torch.utils.data.default_collate(rows[::2])


@pytest.mark.parametrize(
    ('train', 'expand', 'max_duration', 'steps'),
    [
        (lambda: random_loader(length=15), 'batch', '8ba', 8),
        (lambda: random_loader(length=15), 'none', '8ba', 8),
        (lambda: random_loader(length=15), 'sequence', '8ba', 8),
        # Counted in samples, 3 steps of 2 batches and then single ones: of 4 rows, though batch_size is 8, ...
        (lambda: random_loader(batch_size=8, rows=96, collate_fn=every_second), 'sequence', '40sp', 7),
        (lambda: Joined(random_loader(rows=96)), 'sequence', '64sp', 5),  # and of 8, though it is 4.
    ],
    ids=['batch', 'none', 'sequence', 'fewer rows', 'more rows'],
)
def test_what_is_announced_is_what_is_read(
    train: Any, expand: str, max_duration: str, steps: int, caplog: pytest.LogCaptureFixture
):
    algorithm = TokenSuperposition(2, '3ba', expand=expand)
    trainer, logger = make_trainer(llama(), train(), algorithm, max_duration, device_train_microbatch_size=4)
    with caplog.at_level(logging.INFO, logger='composer_tst'):
        trainer.fit()
    (says,) = (message for message in caplog.messages if message.startswith('Superposition until'))
    read = logged(logger, 'superposition/data_tokens')
    assert f'until step 3 of {steps}:' in says
    assert len(read) == steps
    announced = [int(amount.replace(',', '')) for amount in re.findall(r'([\d,]+) data tokens', says)]
    assert announced == [read[2], read[-1] - read[2]]
    (times,) = re.findall(r'It reads ([\d.]+) times', caplog.text)
    assert float(times) == pytest.approx(read[-1] / (steps * (read[-1] - read[-2])), abs=0.006)


@pytest.mark.parametrize('batch_size', [2, 8])
def test_a_resumed_run_with_another_batch_size_announces_what_it_reads(
    batch_size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def train(rows: int, **settings: Any) -> list[float]:
        phases = [{'bag_size': 4, 'until': '2ba'}, {'bag_size': 2, 'until': '5ba'}]
        loader, stack = random_loader(batch_size=rows, rows=480), TokenSuperposition(phases=phases)
        trainer, logger = make_trainer(llama(), loader, stack, '8ba', **settings)
        trainer.fit()
        trainer.close()
        return logged(logger, 'superposition/data_tokens')

    train(4, save_folder=str(tmp_path), save_interval='1ba')
    caplog.clear()
    with caplog.at_level(logging.INFO, logger='composer_tst'):
        read = train(batch_size, load_path=str(tmp_path / 'ep0-ba3-rank0.pt'))
    (says,) = (message for message in caplog.messages if message.startswith('Superposition until'))
    announced = [int(amount.replace(',', '')) for amount in re.findall(r'([\d,]+) data tokens', says)]
    assert [sum(announced[:2]), sum(announced)] == [read[1], read[-1]]  # read[0] is after step 4


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
    assert 'the next-token loss; in published runs it jumps by 1 to 2 nats. Compare runs by their valid' in said
    assert 'The run reads its data 8.3 times' in said
    assert 'Superposition: 40 steps read ' in said
