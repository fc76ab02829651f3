"""A whole training step through Composer's Trainer, superposed, recovering and plain."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from composer import Callback, State, Trainer
from composer.loggers import Logger
from composer.models import HuggingFaceModel
from greenlet import greenlet
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from composer_tst import TokenSuperposition
from tools.benchmarks.measure import Case, Other

BAG_SIZE = 6
SUPERPOSED = '999999ba'


def step_cases(device: torch.device) -> Iterator[Case]:
    """A step of a Llama on random tokens: data, forward, backward, optimizer."""
    for length in (512, 2048):
        yield from cases_of(device, Shape.of(device, length))


def compiled_cases(device: torch.device) -> Iterator[Case]:
    """The same step, compiled."""
    yield from cases_of(device, Shape.of(device, 512), compiled=True)


def cases_of(device: torch.device, shape: 'Shape', compiled: bool = False) -> Iterator[Case]:
    """A superposed step in both layouts, and one in recovery, each beside what it replaces."""
    gpu = device.type == 'cuda'

    def steps(duration: str | None, expand: str = 'sequence') -> Any:
        """A training run; on a GPU, where only one at a time may be alive, what makes it."""

        def make() -> Steps:
            return Steps(device, shape, duration and TokenSuperposition(BAG_SIZE, duration, expand=expand), compiled)

        return make if gpu else make()

    kind = f'{shape}{", compiled" if compiled else ""}'
    at_most = 1.0 if gpu else 1.02
    settings = {'seconds': 5.0 if gpu else 20.0, 'apart': gpu}
    plain, sequence = steps(None), steps(SUPERPOSED)
    yield Case(
        f'step, expand: sequence, s={BAG_SIZE} {kind}',
        sequence,
        (Other('plain step', plain, time_at_most=at_most, memory_at_most=1.0 if gpu else 1.01),),
        **settings,
    )
    batch = steps(SUPERPOSED, 'batch')
    yield Case(f'step, expand: batch, s={BAG_SIZE} {kind}', batch, (Other('expand: sequence', sequence),), **settings)
    recovery = steps('1ba')
    yield Case(f'step, recovery {kind}', recovery, (Other('plain step, no package', plain),), **settings)


@dataclass(frozen=True)
class Shape:
    """A Llama and its batches."""

    batch_size: int
    length: int
    width: int
    layers: int
    vocabulary: int

    @classmethod
    def of(cls, device: torch.device, length: int) -> 'Shape':
        """270M parameters on a GPU, and what a CPU trains in a second."""
        if device.type == 'cuda':
            return cls(16384 // length, length, 1024, 12, 32768)
        return cls(2048 // length, length, 256, 2, 8192)

    def config(self) -> LlamaConfig:
        """The model's."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            max_position_embeddings=self.length,
        )

    def __str__(self) -> str:
        return f'B={self.batch_size} L={self.length} d={self.width} layers={self.layers} V={self.vocabulary}'


class Steps:
    """A training run that goes one step on at each call: from the end of a batch to the end of the next."""

    def __init__(self, device: torch.device, shape: Shape, algorithm: Any, compiled: bool = False):
        gpu = device.type == 'cuda'
        torch.manual_seed(0)
        model = HuggingFaceModel(LlamaForCausalLM(shape.config()), shift_labels=True)
        self._trainer = Trainer(
            model=model,
            train_dataloader=DataLoader(_Rows(shape.length, shape.vocabulary), shape.batch_size, pin_memory=gpu),
            algorithms=algorithm,
            optimizers=torch.optim.AdamW(model.parameters(), 1e-4),
            callbacks=[_Pause(greenlet.getcurrent())],
            max_duration='1000000ba',
            precision='amp_bf16' if gpu else 'fp32',
            device='gpu' if gpu else 'cpu',
            progress_bar=False,
            seed=0,
            compile_config={} if compiled else None,
        )
        self._training = greenlet(self._trainer.fit)
        self()  # the first step of all, which in the recovery run is the last one that is superposed

    def __call__(self) -> None:
        """Go one step on."""
        self._training.switch()

    def close(self) -> None:
        """End the training where it is, and let go of it."""
        self._training.throw()
        # Not closed: Composer's engine, closed, keeps its state to the process's end, and let go of, does not.
        del self._trainer, self._training


class _Pause(Callback):
    """Goes back to whoever called for a step, when it is done."""

    def __init__(self, caller: greenlet):
        self.caller = caller

    def batch_end(self, state: State, logger: Logger) -> None:
        self.caller.switch()


class _Rows(Dataset):
    """Random tokens, in memory."""

    def __init__(self, length: int, vocabulary: int):
        self.ids = torch.randint(vocabulary, (1 << 20 >> length.bit_length(), length))

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index % len(self.ids)]
        return {'input_ids': ids, 'labels': ids}
