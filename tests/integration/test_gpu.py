"""What only a GPU shows: whole trainings in bfloat16, compiled and deterministic, and how often the host waits."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from common.trainers import llama, logged, make_trainer, random_loader

from composer_tst import TokenSuperposition

PHASES = [{'bag_size': 3, 'until': '2ba'}, {'bag_size': 2, 'until': '4ba'}]


@pytest.fixture(autouse=True)
def on_a_gpu(device: torch.device) -> Iterator[None]:
    if device.type != 'cuda':
        pytest.skip('needs a GPU: pytest --device cuda')
    yield
    torch.cuda.set_sync_debug_mode('default')
    torch.use_deterministic_algorithms(False)


def losses(device: str, algorithm: Any, **settings: Any) -> list[float]:
    """Of six steps on padded rows."""
    loader = random_loader(rows=96, pad_from=lambda i: 12 if i % 3 == 0 else 1 + i % 12, pin_memory=device == 'gpu')
    trainer, logger = make_trainer(llama(), loader, algorithm, '6ba', device=device, **settings)
    trainer.fit()
    trainer.close()
    return logged(logger, 'loss/train/total')


@pytest.mark.parametrize('superposition', [{}, {'expand': 'batch'}, {'expand': 'none', 'superpose': 'output'}])
def test_a_training_is_that_on_the_cpu(superposition: dict[str, Any]):
    algorithms = [TokenSuperposition(phases=PHASES, **superposition) for _ in range(2)]
    expected = losses('cpu', algorithms[0], device_train_microbatch_size=2)
    assert len(expected) == 6
    assert losses('gpu', algorithms[1], device_train_microbatch_size=2) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    'settings',
    [
        {'precision': 'amp_bf16'},
        {'compile_config': {}},
        {'precision': 'amp_bf16', 'compile_config': {}},
        {'deterministic_mode': True},
    ],
)
def test_a_training_in_other_ways_is_near_it(settings: dict[str, Any]):
    torch._dynamo.reset()
    expected = losses('cpu', TokenSuperposition(phases=PHASES))
    tolerance = 2e-2 if 'precision' in settings else 1e-3
    assert losses('gpu', TokenSuperposition(phases=PHASES), **settings) == pytest.approx(expected, rel=tolerance)


def test_a_superposed_step_waits_no_more_often_than_a_plain_one():
    def waits(algorithm: Any) -> list[str]:
        loader = random_loader(rows=480, pin_memory=True)
        trainer, _ = make_trainer(llama(), loader, algorithm, '20ba', device='gpu')
        trainer.fit(duration='2ba')  # the first steps wait to make what they need
        torch.cuda.set_sync_debug_mode('warn')
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            trainer.fit(duration='10ba')
        torch.cuda.set_sync_debug_mode('default')
        trainer.close()
        return [f'{w.filename}:{w.lineno}' for w in seen if 'synchroniz' in str(w.message)]

    plain, superposed = waits(None), waits(TokenSuperposition(bag_size=3, duration='13ba'))
    assert len(superposed) <= len(plain), set(superposed) - set(plain)
