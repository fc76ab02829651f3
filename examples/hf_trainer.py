"""Token-superposition with ``transformers.Trainer``: a byte-level Llama on Python's own source.

    pip install transformers accelerate
    pip install --no-deps WHEEL      # beside any torch from 2.7; README says where the wheel is from
    python examples/hf_trainer.py OUTPUT [STEPS]      # the same again goes on from its last checkpoint

Right: gradient accumulation, several processes (``torchrun``; on CPUs set ``ACCELERATE_USE_CPU=true`` as well),
resumption, num_input_tokens_seen (data tokens), total_flos, and evaluation, which is plain. Not right, because the
Trainer does not know of bags:

- ``epoch`` is a share of the run. The rows come in random order, and anew when all were read.
- train_samples_per_second and train_tokens_per_second count superposed steps as plain ones.
- Rows with padding: a step's loss is the mean of its microbatches' losses, and
  ``include_num_input_tokens_seen='non_padding'`` counts bags.
- ``ignore_data_skip`` begins with bags again, and several GPUs in one process fail. Use neither.
"""

import sys
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator
from transformers.trainer_utils import get_last_checkpoint

from composer_tst import functional as F_tst

BAG_SIZE, SHARE, LENGTH = 6, 0.3, 64


class Batches(Sampler[list[int]]):
    """Superposition, 1 of 4: the rows of each microbatch of this process, 6 times as many while superposed."""

    def __init__(self, rows: int, args: TrainingArguments):
        self.rows, self.args = rows, args

    def __len__(self) -> int:
        return self.args.max_steps * self.args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        order = shuffled(self.rows, self.args.data_seed or self.args.seed)
        for index in range(len(self)):
            superposed = index // self.args.gradient_accumulation_steps < int(SHARE * self.args.max_steps)
            count = self.args.per_device_train_batch_size * (BAG_SIZE if superposed else 1)
            drawn = list(islice(order, count * self.args.world_size))
            yield drawn[self.args.process_index * count :][:count]


def shuffled(rows: int, seed: int) -> Iterator[int]:
    """Rows in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(rows, generator=generator).tolist()


class SuperposedTrainer(Trainer):
    """A Trainer that draws rows of bags, embeds bags, and predicts bags."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # so that the Trainer averages the losses of microbatches

    def get_train_dataloader(self) -> DataLoader:
        """Superposition, 2 of 4: a collator that folds. With bags of 1, all this is plain training."""
        dataset: Any = self.train_dataset

        def collate(rows: list[Any]) -> dict[str, Tensor]:
            return F_tst.fold_batch(default_data_collator(rows), len(rows) // self.args.per_device_train_batch_size)

        return DataLoader(dataset, batch_sampler=Batches(len(dataset), self.args), collate_fn=collate)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Superposition, 3 of 4: forward and backward pass, in which the embedding looks up the mean of a bag."""
        inputs = self._prepare_inputs(inputs)
        with F_tst.superposed(model, inputs) as given:
            return super().training_step(model, {**given, 'labels': inputs['labels']}, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Superposition, 4 of 4: each bag predicts the next one. Evaluation, whose labels are ``(B, L)``, is plain."""
        if inputs['labels'].ndim == 2:
            return super().compute_loss(model, inputs, *args, **kwargs)
        labels = inputs.pop('labels')
        return F_tst.multi_hot_cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten(0, 1))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Those of the positions: a bag costs what a token costs."""
        return super().floating_point_ops(inputs) // inputs['input_ids'].shape[2]


def source() -> list[dict[str, Tensor]]:
    """The standard library's top-level modules as bytes, in rows ``(L,)``."""
    files = sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
    data = torch.frombuffer(bytearray(b''.join(file.read_bytes() for file in files)), dtype=torch.uint8)
    return [{'input_ids': row, 'labels': row} for row in data.unfold(0, LENGTH, LENGTH).long()]


def make_trainer(output: str, steps: int, **settings: Any) -> SuperposedTrainer:
    """A Trainer of a small Llama; ``settings`` are TrainingArguments."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    options: dict[str, Any] = {
        'max_steps': steps,
        'per_device_train_batch_size': 8,
        'per_device_eval_batch_size': 64,
        'gradient_accumulation_steps': 2,
        'learning_rate': 2e-3,
        'lr_scheduler_type': 'warmup_stable_decay',
        'warmup_steps': steps // 20,  # shorter than the superposed steps
        'lr_scheduler_kwargs': {'num_decay_steps': steps // 10},
        'eval_strategy': 'steps',
        'save_strategy': 'steps',
        **dict.fromkeys(('eval_steps', 'save_steps', 'logging_steps'), max(steps // 5, 1)),
        'include_num_input_tokens_seen': True,
        'report_to': 'none',
    }
    args = TrainingArguments(output, **(options | settings))
    model = LlamaForCausalLM(config)
    rows: Any = source()
    return SuperposedTrainer(model, args, train_dataset=rows[:-1000], eval_dataset=rows[-1000:])


def main(output: str, steps: int) -> None:
    """Train superposed, then plain."""
    resumed = get_last_checkpoint(output) if Path(output).exists() else None
    make_trainer(output, steps).train(resume_from_checkpoint=resumed)


if __name__ == '__main__':
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 200)
