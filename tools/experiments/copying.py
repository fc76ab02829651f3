"""Where a run gains: on tokens that repeat what the row has said before, or on others.

    python -m tools.experiments.copying runs/evidence/python-40-*-seed-19-*/checkpoints/ep*-rank0.pt

A token repeats if it follows the token before it once more: the row has had the same two in a row earlier.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from streaming import StreamingDataset
from transformers import AutoConfig, AutoModelForCausalLM

CONFIG = 'yamls/evidence/llama'


def main(
    checkpoints: Annotated[list[Path], typer.Argument(help='Of runs that have ended.')],
    data: Annotated[Path, typer.Option(help='The data that they were trained on.')] = Path('data/tokens'),
) -> None:
    """Print the mean next-token loss of each checkpoint over the validation split, in nats."""
    rows = read_rows(data)
    again = repeats(rows)
    typer.echo(f'{len(rows):,} rows; {again.float().mean():.1%} of their tokens repeat')
    for checkpoint in checkpoints:
        found = losses(load(checkpoint), rows)
        told = (('all', found), ('repeats', found[again]), ('others', found[~again]))
        typer.echo(f'{checkpoint.parts[-3]}: {", ".join(f"{name} {each.mean():.3f}" for name, each in told)}')


def read_rows(data: Path) -> torch.Tensor:
    """The rows of the validation split, ``(N, T)``."""
    dataset = StreamingDataset(local=str(data), split='val', shuffle=False, batch_size=1)
    return torch.from_numpy(np.stack([sample['tokens'] for sample in dataset]).astype(np.int64))


def repeats(rows: torch.Tensor) -> torch.Tensor:
    """Whether each token but the first of a row has followed the one before it earlier in the row, ``(N, T - 1)``."""
    found = torch.zeros_like(rows[:, 1:], dtype=torch.bool)
    for t in range(1, rows.shape[1] - 1):
        same = (rows[:, :t] == rows[:, t, None]) & (rows[:, 1 : t + 1] == rows[:, t + 1, None])
        found[:, t] = same.any(1)
    return found


def load(checkpoint: Path) -> torch.nn.Module:
    """The model of a checkpoint of Composer's."""
    weights = torch.load(checkpoint, map_location='cpu', weights_only=False)['state']['model']
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CONFIG))
    model.load_state_dict({name.removeprefix('model.'): weight for name, weight in weights.items()})
    return model.eval()


@torch.no_grad()
def losses(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each token but the first of a row, ``(N, T - 1)``."""
    return torch.cat(
        [
            torch.nn.functional.cross_entropy(
                model(input_ids=some).logits[:, :-1].transpose(1, 2), some[:, 1:], reduction='none'
            )
            for some in rows.split(64)
        ]
    )


if __name__ == '__main__':
    typer.run(main)
