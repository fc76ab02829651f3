"""A whole training step through Composer's Trainer, superposed, recovering and plain."""

from collections.abc import Iterator

import torch
from composer import Callback, State, Trainer
from composer.loggers import Logger
from composer.models import HuggingFaceModel
from greenlet import greenlet
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from composer_tst import TokenSuperposition

from .measure import Case, Other

BAG_SIZE = 6
SECONDS = 20.0


def step_cases(device: torch.device) -> Iterator[Case]:
    """A step of a Llama on random tokens: data, forward, backward, optimizer."""
    for length in (512, 2048):
        plain = _Steps(device, length, None)
        sequence = _Steps(device, length, TokenSuperposition(BAG_SIZE, '999999ba'))
        yield Case(
            f'step, expand: sequence, s={BAG_SIZE} {sequence.shape}',
            sequence,
            (Other('plain step', plain, time_at_most=1.02, memory_at_most=1.01),),
            SECONDS,
        )
        batch = _Steps(device, length, TokenSuperposition(BAG_SIZE, '999999ba', expand='batch'))
        yield Case(
            f'step, expand: batch, s={BAG_SIZE} {batch.shape}', batch, (Other('expand: sequence', sequence),), SECONDS
        )
        recovery = _Steps(device, length, TokenSuperposition(BAG_SIZE, '1ba'))
        yield Case(f'step, recovery {recovery.shape}', recovery, (Other('plain step, no package', plain),), SECONDS)


class _Steps:
    """A training run that goes one step on at each call: from the end of a batch to the end of the next."""

    def __init__(self, device: torch.device, length: int, algorithm: TokenSuperposition | None):
        gpu = device.type == 'cuda'
        width, layers, vocabulary, tokens = (1024, 12, 131072, 16384) if gpu else (256, 2, 8192, 2048)
        batch_size = tokens // length
        self.shape = f'B={batch_size} L={length} d={width} layers={layers} V={vocabulary}'
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            max_position_embeddings=length,
        )
        model = HuggingFaceModel(LlamaForCausalLM(config), shift_labels=True)
        trainer = Trainer(
            model=model,
            train_dataloader=DataLoader(_Rows(length, vocabulary), batch_size),
            algorithms=algorithm,
            optimizers=torch.optim.AdamW(model.parameters(), 1e-4),
            callbacks=[_Pause(greenlet.getcurrent())],
            max_duration='1000000ba',
            precision='amp_bf16' if gpu else 'fp32',
            device='gpu' if gpu else 'cpu',
            progress_bar=False,
            seed=0,
        )
        self._training = greenlet(trainer.fit)
        self()  # the first step of all, which in the recovery run is the last one that is superposed

    def __call__(self) -> None:
        self._training.switch()


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
