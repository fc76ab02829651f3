"""Token-superposition in a Composer Trainer of one's own: a byte-level Llama on Python's own source.

python examples/composer_script.py FOLDER [STEPS]
"""

import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.metrics import LanguageCrossEntropy
from composer.models import HuggingFaceModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from composer_tst import PhaseCheckpointer, TokenSuperposition, WarmupStableDecayScheduler

LENGTH = 64


def source() -> list[dict[str, Tensor]]:
    """The standard library's top-level modules as bytes, in rows ``(L,)``."""
    files = sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py'))
    data = torch.frombuffer(bytearray(b''.join(file.read_bytes() for file in files)), dtype=torch.uint8)
    return [{'input_ids': row, 'labels': row} for row in data.unfold(0, LENGTH, LENGTH).long()]


def make_trainer(folder: str, steps: int) -> Trainer:
    """A Trainer of a small Llama, superposed for 30 % of its steps."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = HuggingFaceModel(LlamaForCausalLM(config), eval_metrics=[LanguageCrossEntropy()], use_logits=True)
    rows: Any = source()
    return Trainer(
        model=model,
        optimizers=torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95)),
        train_dataloader=DataLoader(rows[:-1000], batch_size=16, shuffle=True, drop_last=True),
        eval_dataloader=DataLoader(rows[-1000:], batch_size=64),
        eval_interval=f'{max(steps // 5, 1)}ba',
        max_duration=f'{steps}ba',
        # Superposition: bags of 6 for the first 30 % of the steps, then plain training.
        algorithms=[TokenSuperposition(bag_size=6, duration='0.3dur')],
        # The warmup is shorter than the superposed steps, the decay long after them.
        schedulers=[WarmupStableDecayScheduler(t_warmup='0.05dur', t_decay='0.1dur')],
        # A checkpoint when the bags end, from which other plain runs can be forked.
        callbacks=[PhaseCheckpointer()],
        save_folder=folder,
        save_interval='1dur',
    )


if __name__ == '__main__':
    make_trainer(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 200).fit()
