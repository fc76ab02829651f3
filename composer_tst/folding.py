"""Folding: a plain batch becomes rows of bags and the bags they must predict."""

from collections.abc import Mapping
from typing import Any

import torch

EXPAND = ('sequence', 'batch', 'none')
SUPERPOSE = ('both', 'input', 'output')

IGNORE_INDEX = -100


def check_fold_settings(expand: str, superpose: str) -> None:
    """Refuse settings that name no fold.

    Raises:
        ValueError: If either is unknown, or ``superpose: output`` comes with another ``expand`` than ``none``.
    """
    if expand not in EXPAND:
        raise ValueError(f'expand is {expand!r}: use one of {", ".join(EXPAND)}.')
    if superpose not in SUPERPOSE:
        raise ValueError(f'superpose is {superpose!r}: use one of {", ".join(SUPERPOSE)}.')
    if superpose == 'output' and expand != 'none':
        raise ValueError(
            f'superpose: output reads single tokens, so expand: {expand} has no s-fold data to place: set expand: none.'
        )


def is_plain(value: Any) -> bool:
    """Whether a batch's value is one for all rows: a number, a string or a flag."""
    return isinstance(value, (int, float, str))


def rows_per_fold(bag_size: int, expand: str) -> int:
    """Loader rows that make one row of bags: ``bag_size`` for ``expand: sequence``, otherwise one."""
    return bag_size if expand == 'sequence' else 1


def fold_batch(
    batch: Mapping[str, Any],
    bag_size: int,
    expand: str = 'sequence',
    superpose: str = 'both',
) -> dict[str, Any]:
    """Fold a batch of tokens into a batch of bags (paper, section 3; patch-level training for ``none``).

    With ``s = bag_size`` and ``R`` rows of ``L`` tokens, the result has ``B`` rows of ``P`` positions:

    ======== ================ =========== ================================================
    expand   B                P           what becomes of a row
    ======== ================ =========== ================================================
    sequence ``R / s``        ``L``       ``s`` consecutive rows are joined, then bagged
    batch    ``R``            ``L // s``  bagged by itself, a tail of ``L mod s`` dropped
    none     ``R``            ``L // s``  the same, for a batch that was not enlarged
    ======== ================ =========== ================================================

    The bag at position ``t`` predicts the tokens of the bag at ``t + 1``. With ``superpose: input`` it
    predicts the first of them. With ``superpose: output`` nothing is bagged, ``P = L``, and position ``t``
    predicts tokens ``t + 1 .. t + s``.

    Args:
        batch: ``input_ids`` and ``labels``, both ``(R, L)``; ``labels[t]`` is the label of token ``t`` itself,
            as in Hugging Face and MPT batches, with -100 where there is none. Optional: ``attention_mask`` and
            ``sequence_id``, ``(R, L)``; llm-foundry's lists ``total_tokens`` and ``loss_generating_tokens``,
            ``R`` long; plain numbers, strings and flags, which are kept; ``token_type_ids`` of nothing but 0, which
            are left out.
        bag_size: Tokens in a bag, ``s``.
        expand: ``sequence``, ``batch`` or ``none``.
        superpose: ``both``, ``input`` or ``output``.

    Returns:
        dict: ``input_ids`` ``(B, P, s)`` (``(B, L)`` for ``superpose: output``) and ``labels`` ``(B, P, s)``,
        -100 where there is no target. An s-token's ``attention_mask`` is set if any of its tokens is attended;
        its ``sequence_id`` is that of its last attended token, kept apart between joined rows. ``bag_mask``
        ``(B, P, s)`` is there only if some token is not attended. ``loss_generating_tokens`` counts targets.

    Raises:
        ValueError: If a needed key is missing, a key cannot be folded, or the shapes do not fit.
    """
    check_fold_settings(expand, superpose)
    _check_batch(batch, bag_size, expand, superpose)
    ids = batch['input_ids']
    rows, length = ids.shape
    joined = rows_per_fold(bag_size, expand)

    def bags(tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.reshape(rows // joined, joined * length)
        whole = tokens.shape[1] // bag_size * bag_size
        return tokens[:, :whole].reshape(rows // joined, -1, bag_size)

    labels = batch['labels']
    mask = batch.get('attention_mask')
    if mask is not None:
        labels = labels.masked_fill(~mask.bool(), IGNORE_INDEX)

    folded: dict[str, Any] = {key: value for key, value in batch.items() if is_plain(value)}
    if superpose == 'output':
        folded |= {key: batch[key] for key in ('input_ids', 'attention_mask', 'sequence_id') if key in batch}
        following = torch.nn.functional.pad(labels[:, 1:], (0, bag_size), value=IGNORE_INDEX)
        folded['labels'] = following.unfold(1, bag_size, 1).contiguous()
    else:
        folded['input_ids'] = bags(ids)
        folded['labels'] = _next_bags(bags(labels), only_first=superpose == 'input')
        bag_mask = None
        if mask is not None:
            bag_mask = bags(mask.bool())
            folded['attention_mask'] = bag_mask.any(-1).to(mask.dtype)
            if bag_mask.all():
                bag_mask = None
            else:
                folded['bag_mask'] = bag_mask
        if 'sequence_id' in batch:
            separate = _separate_joined_rows(batch['sequence_id'], joined)
            folded['sequence_id'] = _last_attended(bags(separate), bag_mask)

    if 'total_tokens' in batch:
        totals = batch['total_tokens']
        folded['total_tokens'] = [sum(totals[row : row + joined]) for row in range(0, rows, joined)]
    if 'loss_generating_tokens' in batch:
        folded['loss_generating_tokens'] = (folded['labels'] != IGNORE_INDEX).sum((1, 2)).tolist()
    return folded


_FOLDED_KEYS = {
    'input_ids',
    'labels',
    'attention_mask',
    'sequence_id',
    'total_tokens',
    'loss_generating_tokens',
}


def _check_batch(batch: Mapping[str, Any], bag_size: int, expand: str, superpose: str) -> None:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f'The train loader yields {type(batch).__name__}: superposition needs a mapping with input_ids and labels.'
        )
    if 'inputs_embeds' in batch:
        raise ValueError('The batch has inputs_embeds: superposition bags token ids, give input_ids instead.')
    for key in ('input_ids', 'labels'):
        if key not in batch:
            raise ValueError(f'The batch has no {key} (it has {", ".join(batch)}): have the collator add it.')
    unknown = [
        key
        for key, value in batch.items()
        if key not in _FOLDED_KEYS and not is_plain(value) and not _says_nothing(key, value)
    ]
    if unknown:
        raise ValueError(
            f'Superposition cannot fold {", ".join(unknown)}: have the collator leave it out of the batch.'
        )
    shape = tuple(batch['input_ids'].shape)
    if len(shape) != 2:
        raise ValueError(f'input_ids has shape {shape}: superposition folds batches of shape (rows, tokens).')
    for key in ('labels', 'attention_mask', 'sequence_id'):
        if key in batch and tuple(batch[key].shape) != shape:
            raise ValueError(f'{key} has shape {tuple(batch[key].shape)} but input_ids {shape}: give both the same.')
    rows, length = shape
    if rows % rows_per_fold(bag_size, expand):
        raise ValueError(
            f'expand: sequence joins {bag_size} rows into one, but the batch has {rows} rows: '
            f'give a multiple of {bag_size}.'
        )
    if expand != 'sequence' and length < bag_size * (1 if superpose == 'output' else 2):
        raise ValueError(
            f'bag_size is {bag_size} but a row has {length} tokens, so that no bag has a whole next one to predict: '
            'use a smaller bag_size, longer rows, or expand: sequence.'
        )


def _says_nothing(key: str, value: Any) -> bool:
    """Whether it is what Hugging Face's tokenizers add for models that read pairs of texts, where there are none."""
    return key == 'token_type_ids' and not torch.as_tensor(value).any()


def _next_bags(labels: torch.Tensor, only_first: bool) -> torch.Tensor:
    """Targets of each bag, ``(B, P, s)``: the labels of the next one, none for the last."""
    following = torch.full_like(labels, IGNORE_INDEX)
    kept = 1 if only_first else labels.shape[2]
    following[:, :-1, :kept] = labels[:, 1:, :kept]
    return following


def _separate_joined_rows(sequence_id: torch.Tensor, joined: int) -> torch.Tensor:
    """Shift the ids of ``joined`` consecutive rows so that no two of them share one; -1 (padding) stays."""
    if joined == 1:
        return sequence_id
    groups = sequence_id.reshape(-1, joined, sequence_id.shape[1])
    used = groups.amax(2, keepdim=True).clamp(min=-1) + 1
    shift = used.cumsum(1) - used
    return torch.where(groups < 0, groups, groups + shift).reshape(sequence_id.shape)


def _last_attended(sequence_id: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Sequence id of each bag's last attended token, ``(B, P)``; of its last token where none is attended."""
    if mask is None:
        return sequence_id[..., -1].contiguous()
    order = torch.arange(1, mask.shape[2] + 1, device=mask.device)
    last = torch.where(mask.any(-1), (mask * order).argmax(-1), mask.shape[2] - 1)
    return sequence_id.gather(2, last.unsqueeze(-1)).squeeze(-1)
