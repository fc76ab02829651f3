"""Folding: a plain batch becomes rows of bags and the bags they must predict, in two steps.

:func:`lay_out` puts the tokens in the rows that the model will see, in a batch that is plain for all that handles it.
:func:`bag_rows` turns such rows into bags, and :func:`bag_targets` their labels into targets. A run does so for each
microbatch: just before the model gets it, and when its loss is computed.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch

EXPAND = ('sequence', 'batch', 'none')
SUPERPOSE = ('both', 'input', 'output')

IGNORE_INDEX = -100

# Of a batch's tensors, those with a value for each token: the rest cannot be folded.
_PER_TOKEN = ('input_ids', 'labels', 'attention_mask', 'sequence_id')
# What llm-foundry's count of tokens weighs microbatches by, a value for each row.
_PER_ROW = ('total_tokens', 'loss_generating_tokens')
# What is made anew for bags, if it says no more than a model takes for granted.
_TAKEN_FOR_GRANTED = ('token_type_ids', 'position_ids')
# What may hold a value for each row.
_OF_ROWS = (torch.Tensor, list, tuple)
# What rows weigh if nothing at all is to be predicted: Composer divides by the sum of their weights.
_NEXT_TO_NOTHING = 1e-12


class Layout(NamedTuple):
    """What one step is made of.

    Attributes:
        batch: A plain batch of ``B`` rows of ``P * s`` tokens, whose labels are -100 but at the tokens that some bag
            predicts.
        positions: Model positions, ``B * P``.
        dropped: Attended tokens at the ends of rows that do not fill a bag and are left out.
    """

    batch: dict[str, Any]
    positions: int
    dropped: int


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


def check_bag_size(value: Any, least: int = 1) -> int:
    """Return a bag size; refuse, with a ValueError, what is not an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f'bag_size is {value!r}: give an integer of at least {least}.')
    return value


def is_plain(value: Any) -> bool:
    """Whether a batch's value is one for all rows: a number, a string, a flag, or a tensor without dimensions."""
    return isinstance(value, (int, float, str)) or (isinstance(value, torch.Tensor) and value.ndim == 0)


def is_needed(key: str, takes: Collection[str] | None) -> bool:
    """Whether a batch's value is read: by superposition, or by a model that takes these, or all if None."""
    return takes is None or key in takes or key in _PER_TOKEN or key in _PER_ROW


def is_full(mask: torch.Tensor | None) -> bool:
    """Whether all tokens are attended. It reads the mask: on a GPU, that would wait for it."""
    return mask is None or not mask.numel() or bool(mask.min() > 0)  # `all` takes a CPU three times as long


def _any_ignored(labels: torch.Tensor) -> bool:
    """Whether some label is -100, or else a number that is no token's."""
    if labels.dtype == torch.int64 and labels.stride(-1) == 1:
        labels = labels.view(torch.int32)  # half of a negative number is negative, and a CPU compares halves faster
    return bool(labels.numel()) and bool(labels.min() < 0)


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
            as in Hugging Face and MPT batches, with -100 where there is none, and they are the ids if absent. Optional:
            ``attention_mask`` and ``sequence_id``, ``(R, L)``; llm-foundry's lists ``total_tokens`` and
            ``loss_generating_tokens``, ``R`` long; plain numbers, strings and flags, which are kept; other values of
            whole rows, which are kept unless rows are joined; ``token_type_ids`` of nothing but 0 and
            ``position_ids`` that count from 0 in each row, which are so ``(B, P)`` again.
        bag_size: Tokens in a bag, ``s``; 1 for plain training.
        expand: ``sequence``, ``batch`` or ``none``.
        superpose: ``both``, ``input`` or ``output``.

    Returns:
        dict: ``input_ids`` ``(B, P, s)`` (``(B, L)`` for ``superpose: output``) and ``labels`` ``(B, P, s)``,
        -100 where there is no target. An s-token's ``attention_mask`` is set if any of its tokens is attended;
        its ``sequence_id`` is that of its last attended token, kept apart between joined rows. ``bag_mask``
        ``(B, P, s)`` is there only if some token is not attended. ``loss_generating_tokens`` counts targets. All but
        the labels may share memory with the batch.

    Raises:
        ValueError: If a needed key is missing, a key cannot be folded, or the shapes do not fit.
    """
    laid_out = lay_out(batch, bag_size, expand, superpose).batch
    mask = laid_out.get('attention_mask')
    folded = bag_rows(laid_out, bag_size, superpose, padded=not is_full(mask))
    folded['labels'] = bag_targets(laid_out['labels'], mask, bag_size, superpose)
    if 'loss_generating_tokens' in batch:
        folded['loss_generating_tokens'] = (folded['labels'] != IGNORE_INDEX).sum((1, 2)).tolist()
    if 'total_tokens' in batch:
        folded['total_tokens'] = laid_out['total_tokens']
    return folded


def lay_out(
    batch: Mapping[str, Any],
    bag_size: int,
    expand: str,
    superpose: str,
    weights: torch.Tensor | None = None,
    pin: bool = False,
    takes: Collection[str] | None = None,
) -> Layout:
    """The rows that the model will see, of plain tokens still.

    Args:
        batch: As for :func:`fold_batch`.
        bag_size: Tokens in a bag, ``s``.
        expand: ``sequence``, ``batch`` or ``none``.
        superpose: ``both``, ``input`` or ``output``.
        weights: Weights of a bag's targets, ``(s,)``. If given, ``loss_generating_tokens`` ``(B,)`` has the sum of the
            weights of each row's targets, and ``total_tokens`` ``(B,)`` its attended tokens: a list where the batch has
            lists, else a tensor. Microbatches weighed by them add up to the loss of the batch.
        pin: Whether the rows are to be in pinned memory, which a GPU copies from while the host goes on.
        takes: What the model's forward takes, if all else is left out before it; None if it takes the whole batch.

    Raises:
        ValueError: As :func:`fold_batch`.
    """
    check_bag_size(bag_size)
    check_fold_settings(expand, superpose)
    _check_batch(batch, bag_size, expand, superpose, takes)
    rows, length = batch['input_ids'].shape
    joined = bag_size if expand == 'sequence' else 1
    rows, length = rows // joined, length * joined
    kept = length if superpose == 'output' else length // bag_size * bag_size

    result: dict[str, Any] = {key: value for key, value in batch.items() if is_plain(value)}
    result |= extra_values(batch, joined, takes)
    for key in _PER_TOKEN:
        if key in batch:
            value = batch[key]
            if key == 'sequence_id':
                value = _separate_joined_rows(value, joined)
            result[key] = value.reshape(rows, length).narrow(1, 0, kept)
    for key in _TAKEN_FOR_GRANTED if takes is None else ():  # a model that is given the whole batch may read them
        if key in batch:
            row = torch.arange(kept) if key == 'position_ids' else torch.zeros(kept, dtype=torch.int64)
            result[key] = _copy(row.expand(rows, kept), pin=pin)
    mask = None if is_full(result.get('attention_mask')) else result['attention_mask']
    labels = result.get('labels', result['input_ids'])
    result['labels'] = _only_targets(labels, mask, bag_size, superpose, pin)
    if pin:
        result |= {key: _copy(result[key], pin=True) for key in _PER_TOKEN if key in result and key != 'labels'}
    if 'total_tokens' in batch:
        totals = batch['total_tokens']
        result['total_tokens'] = [sum(totals[row * joined : (row + 1) * joined]) for row in range(rows)]
    if weights is not None:
        of_columns, of_row = _weights_of_columns(kept, bag_size, superpose, tuple(weights.tolist()))
        if mask is None and not _any_ignored(labels):
            tokens = torch.full((rows,), of_row or _NEXT_TO_NOTHING, dtype=torch.float64, device=labels.device)
        else:
            tokens = (result['labels'] != IGNORE_INDEX).double() @ of_columns.to(labels.device)
            tokens = tokens if tokens.any() else tokens + _NEXT_TO_NOTHING
        result['loss_generating_tokens'] = tokens.tolist() if 'total_tokens' in batch else tokens
        if 'total_tokens' not in batch:
            attended = torch.full((rows,), kept, device=labels.device) if mask is None else mask.bool().sum(1)
            result['total_tokens'] = attended
    positions = rows * kept // (1 if superpose == 'output' else bag_size)
    dropped = rows * (length - kept)
    if dropped and 'attention_mask' in batch:
        dropped = int(batch['attention_mask'].bool()[:, kept:].sum())
    return Layout(result, positions, dropped)


def _only_targets(
    labels: torch.Tensor, mask: torch.Tensor | None, bag_size: int, superpose: str, pin: bool
) -> torch.Tensor:
    """A copy of the labels ``(B, P * s)``, -100 where a token is no bag's target."""
    targets = _copy(labels, torch.int64, pin)
    targets.narrow(1, 0, 1 if superpose == 'output' else bag_size).fill_(IGNORE_INDEX)
    if superpose == 'input':
        targets.unflatten(1, (-1, bag_size))[..., 1:] = IGNORE_INDEX
    if mask is not None:
        targets.masked_fill_(mask == 0, IGNORE_INDEX)
    return targets


def _copy(value: torch.Tensor, dtype: torch.dtype | None = None, pin: bool = False) -> torch.Tensor:
    """A contiguous copy, made at once where it is to be."""
    return torch.empty(value.shape, dtype=dtype or value.dtype, device=value.device, pin_memory=pin).copy_(value)


@functools.lru_cache(maxsize=8)
def _weights_of_columns(
    columns: int, bag_size: int, superpose: str, weights: tuple[float, ...]
) -> tuple[torch.Tensor, float]:
    """What a target in each column of a row weighs in all the bags that predict it, ``(columns,)``, and their sum."""
    of_bag = torch.tensor(weights, dtype=torch.float64)
    if superpose == 'output':  # the target in column c is one of the min(c, s) positions before it
        before = torch.arange(columns).clamp(max=bag_size)
        of_columns = torch.cat([torch.zeros(1), of_bag.cumsum(0)])[before]
    else:
        if superpose == 'input':
            of_bag[1:] = 0
        of_columns = torch.cat([torch.zeros(bag_size), of_bag.repeat(columns // bag_size - 1)])
    return of_columns, float(of_columns.sum())


def bag_rows(batch: Mapping[str, Any], bag_size: int, superpose: str, padded: bool = True) -> dict[str, Any]:
    """Bags of the tokens of each row, ``(B, P * s)`` to ``(B, P, s)``.

    It reads no value of a tensor: on a GPU, that would wait for it.

    Args:
        batch: Rows as :func:`lay_out` makes them.
        bag_size: Tokens in a bag, ``s``.
        superpose: ``both``, ``input`` or ``output``.
        padded: Whether some token is not attended; if not, there is no ``bag_mask``.

    Returns:
        dict: As :func:`fold_batch`, without labels and what llm-foundry's count of tokens reads.
    """
    folded = {key: value for key, value in batch.items() if key not in ('labels', *_PER_ROW, *_TAKEN_FOR_GRANTED)}
    mask = batch.get('attention_mask') if padded else None
    positions = batch['input_ids'].shape[1] // (1 if superpose == 'output' else bag_size)
    for key in _TAKEN_FOR_GRANTED:
        if key in batch:
            folded[key] = torch.as_tensor(batch[key])[..., :positions]
    if superpose == 'output':
        return folded
    ids = batch['input_ids']
    folded['input_ids'] = ids.view(len(ids), positions, bag_size)
    bag_mask = None
    if mask is not None:
        bag_mask = folded['bag_mask'] = mask.bool().view(folded['input_ids'].shape)
        folded['attention_mask'] = bag_mask.any(-1).to(mask.dtype)
    elif 'attention_mask' in batch:
        folded['attention_mask'] = batch['attention_mask'].new_ones(folded['input_ids'].shape[:2])
    if 'sequence_id' in batch:
        folded['sequence_id'] = _last_attended(batch['sequence_id'].unflatten(1, (-1, bag_size)), bag_mask)
    return folded


def bag_targets(labels: torch.Tensor, mask: torch.Tensor | None, bag_size: int, superpose: str) -> torch.Tensor:
    """What each position predicts, ``(B, P, s)``, of labels and mask ``(B, P * s)``: -100 where there is none."""
    ahead = 1 if superpose == 'output' else bag_size
    rows, known = len(labels), labels.shape[1] - ahead
    following = torch.empty(rows, known + bag_size, dtype=torch.int64, device=labels.device)
    following.narrow(1, known, bag_size).fill_(IGNORE_INDEX)
    targets = following.narrow(1, 0, known).copy_(labels.narrow(1, ahead, known))
    if mask is not None:
        targets.masked_fill_(mask.narrow(1, ahead, known) == 0, IGNORE_INDEX)
    if superpose == 'output':
        return following.unfold(1, bag_size, 1).contiguous()
    bags = following.view(rows, labels.shape[1] // bag_size, bag_size)
    if superpose == 'input':
        bags[..., 1:] = IGNORE_INDEX
    return bags


def _check_batch(
    batch: Mapping[str, Any], bag_size: int, expand: str, superpose: str, takes: Collection[str] | None
) -> None:
    if not isinstance(batch, Mapping):
        raise ValueError(f'The batch is a {type(batch).__name__}: give a mapping with input_ids and labels.')
    if 'inputs_embeds' in batch:
        raise ValueError('The batch has inputs_embeds: superposition bags token ids, give input_ids instead.')
    if 'input_ids' not in batch:
        raise ValueError(f'The batch has no input_ids (it has {", ".join(batch)}): have the collator add it.')
    check_kinds(batch, takes)
    shape = tuple(batch['input_ids'].shape)
    if len(shape) != 2:
        raise ValueError(f'input_ids has shape {shape}: superposition folds batches of shape (rows, tokens).')
    for key in _PER_TOKEN:
        if key in batch and tuple(batch[key].shape) != shape:
            raise ValueError(f'{key} has shape {tuple(batch[key].shape)} but input_ids {shape}: give both the same.')
    rows, length = shape
    if not length:
        raise ValueError(f'input_ids has shape {shape}: give rows with tokens.')
    if expand == 'sequence' and rows % bag_size:
        raise ValueError(
            f'expand: sequence joins {bag_size} rows into one, but the batch has {rows} rows: '
            f'give a multiple of {bag_size}.'
        )
    if expand != 'sequence' and length < bag_size * (1 if superpose == 'output' else 2):
        raise ValueError(
            f'bag_size is {bag_size} but a row has {length} tokens, so that no bag has a whole next one to predict: '
            'use a smaller bag_size, longer rows, or expand: sequence.'
        )


def extra_values(batch: Mapping[str, Any], joined: int = 1, takes: Collection[str] | None = None) -> dict[str, Any]:
    """The values of a batch that are of whole rows, and carried as they are.

    Args:
        batch: As for :func:`fold_batch`.
        joined: Rows that are joined into one.
        takes: What the model's forward takes, if all else is left out before it; None if it takes the whole batch.

    Raises:
        ValueError: If the model takes a value that is neither of whole rows nor the same for all, or rows are joined.
    """
    check_kinds(batch, takes)
    rows, length = batch['input_ids'].shape
    carried = {}
    for key, value in batch.items():
        if key in _PER_TOKEN or key in _PER_ROW or is_plain(value):
            continue
        if not isinstance(value, _OF_ROWS) or _says_nothing(key, value):
            continue
        of_rows = len(value) == rows and not (isinstance(value, torch.Tensor) and value.shape[1:2] == (length,))
        if of_rows and joined == 1:
            carried[key] = value
        elif takes is None or key in takes:
            if of_rows:
                why = f'it is of whole rows, and expand: sequence joins {joined} of them: set expand: batch, or '
            else:
                why = 'it is not of whole rows, and a bag has several tokens: '
                if key == 'position_ids' and (takes is None or 'sequence_id' in takes):
                    why += 'give sequence_id to keep documents apart, or '
            raise ValueError(f'Superposition cannot fold {key}: {why}have the collator leave {key} out.')
    return carried


def check_kinds(batch: Mapping[str, Any], takes: Collection[str] | None = None) -> None:
    """Refuse, with a ValueError, needed values other than tensors, lists and plain ones: what rows are they of?"""
    for key, value in batch.items():
        kinds = torch.Tensor if key in _PER_TOKEN else _OF_ROWS
        known = isinstance(value, kinds) or (key not in _PER_TOKEN and is_plain(value))
        if not known and is_needed(key, takes):
            raise ValueError(
                f'Superposition cannot fold {key}: it is a {type(value).__name__}: have the collator leave it out, or '
                'make it a tensor.'
            )


def _says_nothing(key: str, value: Any) -> bool:
    """Whether it is what a model takes for granted: one text for all tokens, and positions from 0 in each row."""
    if key not in _TAKEN_FOR_GRANTED:
        return False
    given = torch.as_tensor(value)
    return (
        not given.any()
        if key == 'token_type_ids'
        else bool((given == torch.arange(given.shape[-1], device=given.device)).all())
    )


def _separate_joined_rows(sequence_id: torch.Tensor, joined: int) -> torch.Tensor:
    """Shift the ids of ``joined`` consecutive rows so that no two of them share one; -1 (padding) stays."""
    if joined == 1:
        return sequence_id
    groups = sequence_id.reshape(-1, joined, sequence_id.shape[1])
    used = groups.amax(2, keepdim=True) + 1
    shift = used.cumsum(1) - used
    return torch.where(groups < 0, groups, groups + shift).reshape(sequence_id.shape)


def _last_attended(sequence_id: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Sequence id of each bag's last attended token, ``(B, P)``; of its last token where none is attended."""
    if mask is None:
        return sequence_id[..., -1].contiguous()
    order = torch.arange(1, mask.shape[2] + 1, device=mask.device)
    last = torch.where(mask.any(-1), (mask * order).argmax(-1), mask.shape[2] - 1)
    return sequence_id.gather(2, last.unsqueeze(-1)).squeeze(-1)
