"""Where a run gains: on tokens that repeat what the row has said before, or on others.

    python -m tools.experiments.copying

A token repeats if it follows the token before it once more: the row has had the same two in a row earlier.
"""

from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from streaming import StreamingDataset
from transformers import AutoConfig, AutoModelForCausalLM

from tools.experiments import run
from tools.experiments.questions import at_40_and_80
from tools.experiments.record import COPYING, RUNS, Record, read, read_copying, write_copying
from tools.experiments.train import name

CONFIG = 'yamls/evidence/llama'


def main(
    folder: Annotated[Path, typer.Option(help='Where runs keep checkpoints.')] = Path('runs/evidence'),
) -> None:
    """Measure every run at 40 and 80 tokens per parameter that is judged and whose last checkpoint is kept."""
    record = read(RUNS)
    measure(record, folder, COPYING)
    run.write(record)


def measure(record: Record, folder: Path, path: Path) -> None:
    """Write the mean next-token loss of each run that has none yet, over the validation split, in nats."""
    found = read_copying(path, record)
    for job in at_40_and_80(record):
        checkpoint = folder / name(job) / 'checkpoints' / f'ep0-ba{job.steps}-rank0.pt'
        if job.key in found:
            continue
        if not checkpoint.exists():
            typer.echo(f'{checkpoint} is not there: the run is left out.')
            continue
        rows = read_rows(Path(job.scale.data))
        again = repeats(rows)
        loss = losses(load(checkpoint), rows)
        found[job.key] = [round(float(each.mean()), 4) for each in (loss, loss[again], loss[~again])]
        write_copying(path, record, found)
        typer.echo(f'{name(job)}: all {found[job.key][0]}, repeats {found[job.key][1]}, others {found[job.key][2]}')


@cache
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
