"""The method written out plainly, loops and all: what every test compares with."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

IGNORE = -100


class Position(NamedTuple):
    """One model position: its tokens, which of them are attended, what it predicts, its sequence id."""

    tokens: list[int]
    attended: list[bool]
    targets: list[int]
    sequence_id: int


def weights_of(weighting: Any, bag_size: int) -> list[float]:
    rules = {
        'uniform': lambda k: 1.0,
        'power_law': lambda k: 1 / k,
        'exponential': lambda k: math.exp(-k),
        'first': lambda k: float(k == 1),
    }
    if isinstance(weighting, str):
        return [rules[weighting](k) for k in range(1, bag_size + 1)]
    return [float(w) for w in weighting]


def fold(
    batches: Sequence[dict[str, Any]], bag_size: int, expand: str = 'sequence', superpose: str = 'both'
) -> list[list[Position]]:
    """Rows of positions, from the loader batches of one step."""
    rows = []
    for batch in batches:
        for r in range(len(batch['input_ids'])):
            tokens = []
            for t in range(len(batch['input_ids'][r])):
                attended = 'attention_mask' not in batch or bool(batch['attention_mask'][r][t])
                label = int(batch['labels'][r][t]) if attended else IGNORE
                sequence = int(batch['sequence_id'][r][t]) if 'sequence_id' in batch else 0
                tokens.append((int(batch['input_ids'][r][t]), attended, label, (r, sequence)))
            rows.append(tokens)
    if expand == 'sequence':
        rows = [list(itertools.chain(*rows[i : i + bag_size])) for i in range(0, len(rows), bag_size)]

    folded = []
    for row in rows:
        if superpose == 'output':
            folded.append(
                [
                    Position(
                        [row[t][0]],
                        [row[t][1]],
                        [row[t + k][2] if t + k < len(row) else IGNORE for k in range(1, bag_size + 1)],
                        hash(row[t][3]),
                    )
                    for t in range(len(row))
                ]
            )
            continue
        bags = [row[i * bag_size : (i + 1) * bag_size] for i in range(len(row) // bag_size)]
        positions = []
        for i, bag in enumerate(bags):
            targets = [token[2] for token in bags[i + 1]] if i + 1 < len(bags) else [IGNORE] * bag_size
            if superpose == 'input':
                targets = targets[:1] + [IGNORE] * (bag_size - 1)
            attended_ids = [token[3] for token in bag if token[1]] or [bag[-1][3]]
            positions.append(Position([t[0] for t in bag], [t[1] for t in bag], targets, hash(attended_ids[-1])))
        folded.append(positions)
    return folded


def rows_of(folded: dict[str, torch.Tensor]) -> list[list[Position]]:
    """The positions of a batch that is folded already, of one sequence each."""
    ids, labels = folded['input_ids'], folded['labels']
    mask = folded.get('bag_mask', torch.ones_like(ids)).bool()
    return [
        [Position(ids[b, p].tolist(), mask[b, p].tolist(), labels[b, p].tolist(), 0) for p in range(ids.shape[1])]
        for b in range(len(ids))
    ]


def mean_embeddings(embedding: torch.nn.Module, rows: list[list[Position]]) -> torch.Tensor:
    """(B, P, d): the mean over each bag's attended tokens, summed in float32; zeros where none is."""
    out = []
    for row in rows:
        vectors = []
        for position in row:
            chosen = [t for t, a in zip(position.tokens, position.attended, strict=True) if a]
            looked_up = embedding(torch.tensor(position.tokens))
            if not chosen:
                vectors.append(torch.zeros_like(looked_up[0]))
                continue
            total = torch.zeros_like(looked_up[0], dtype=torch.float32)
            for vector, attended in zip(looked_up, position.attended, strict=True):
                if attended:
                    total = total + vector.float()
            vectors.append((total / len(chosen)).to(looked_up.dtype))
        out.append(torch.stack(vectors))
    return torch.stack(out)


def multi_hot_loss(logits: torch.Tensor, rows: list[list[Position]], weights: Sequence[float]) -> torch.Tensor:
    """Weighted sum of ordinary cross-entropies over all valid targets, by the sum of their weights."""
    total = torch.zeros((), dtype=torch.float32)
    norm = 0.0
    for b, row in enumerate(rows):
        for p, position in enumerate(row):
            log_probs = torch.log_softmax(logits[b, p].float(), dim=-1)
            for weight, target in zip(weights, position.targets, strict=True):
                if target != IGNORE and weight:
                    total = total - weight * log_probs[target]
                    norm += weight
    return total / norm


def loss_of(hf_model: Any, rows: list[list[Position]], weights: Sequence[float], **inputs: Any) -> torch.Tensor:
    """The method on a causal LM that takes `inputs_embeds`, its router loss included."""
    embeddings = mean_embeddings(hf_model.get_input_embeddings(), rows)
    attended = torch.tensor([[any(p.attended) for p in row] for row in rows]).long()
    outputs = hf_model(inputs_embeds=embeddings, attention_mask=attended, **inputs)
    loss = multi_hot_loss(outputs.logits, rows, weights)
    if getattr(outputs, 'aux_loss', None) is not None:
        loss = loss + hf_model.config.router_aux_loss_coef * outputs.aux_loss
    return loss


class Extended(nn.Module):
    """The definition of an embedding that looks up bags: one with a row more for each bag of the batch."""

    def __init__(self, embedding: nn.Embedding, rows: Any):
        super().__init__()
        self.embedding, self.rows = embedding, rows

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        means = mean_embeddings(self.embedding, self.rows).flatten(0, 1)
        tokens = self.embedding(torch.arange(self.embedding.num_embeddings))
        return torch.cat([tokens, means])[ids]
