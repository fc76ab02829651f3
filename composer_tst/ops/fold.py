"""Folding: a plain batch becomes rows of bags and the bags they must predict, in two steps.

1. :func:`lay_out` puts the tokens in the rows that the model will see. The batch is still one of plain tokens.
2. :func:`bag_rows` turns such rows into bags, and :func:`bag_targets` their labels into targets. A run does so for each
   microbatch: :func:`bag_rows` just before the model gets it, and :func:`bag_targets` when its loss is computed.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch

EXPAND = ('sequence', 'batch', 'none')
SUPERPOSE = ('both', 'input', 'output')

IGNORE_INDEX = -100

# The tensors of a batch with a value for each token. Others cannot be folded.
_PER_TOKEN = ('input_ids', 'labels', 'attention_mask', 'sequence_id')
# A value for each row, by which llm-foundry's count of tokens weighs microbatches.
_PER_ROW = ('total_tokens', 'loss_generating_tokens')
# Rebuilt for bags if it has only the values that a model takes for granted. Otherwise refused.
_TAKEN_FOR_GRANTED = ('token_type_ids', 'position_ids')
# Types that may hold a value for each row.
OF_ROWS = (torch.Tensor, list, tuple)
# If no token of the batch is a target, each row gets this weight: Composer divides by the sum of weights.
_NEXT_TO_NOTHING = 1e-12


class Layout(NamedTuple):
    """The rows of one step.

    Attributes:
        batch: A plain batch of ``B`` rows of ``P * s`` tokens. Labels are -100 at tokens that no bag predicts.
        positions: Model positions, ``B * P``.
        dropped: Attended tokens that are left out, because they do not fill a bag at the end of their row.
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
    """Whether a value is the same for all rows: a number, a string, a flag, or a tensor without dimensions."""
    return isinstance(value, (int, float, str)) or (isinstance(value, torch.Tensor) and value.ndim == 0)


def is_needed(key: str, takes: Collection[str] | None) -> bool:
    """Whether superposition or the model reads a batch's value. ``takes`` is as for :func:`lay_out`."""
    return takes is None or key in takes or key in _PER_TOKEN or key in _PER_ROW


def is_full(mask: torch.Tensor | None) -> bool:
    """Whether all tokens are attended. On a GPU this would wait for the mask."""
    return mask is None or not mask.numel() or bool(mask.min() > 0)  # `all` takes a CPU three times as long


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
            ``attention_mask`` and ``sequence_id``, ``(R, L)``; llm-foundry's ``total_tokens`` and
            ``loss_generating_tokens``, lists or tensors, ``R`` long; plain numbers, strings and flags, which are kept;
            other values of whole rows, which are kept unless rows are joined; ``token_type_ids`` of nothing but 0, and
            ``position_ids`` that count from 0 in each row. These two become ``(B, P)``, of 0 and counting from 0.
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
        targets = (folded['labels'] != IGNORE_INDEX).sum((1, 2))
        is_list = isinstance(batch['loss_generating_tokens'], list)
        folded['loss_generating_tokens'] = targets.tolist() if is_list else targets
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
    """Put the tokens in the rows that the model will see. They are plain tokens still.

    Args:
        batch: As for :func:`fold_batch`.
        bag_size: Tokens in a bag, ``s``.
        expand: ``sequence``, ``batch`` or ``none``.
        superpose: ``both``, ``input`` or ``output``.
        weights: Weights of a bag's targets, ``(s,)``. If given, ``loss_generating_tokens`` ``(B,)`` is the weight of
            each row's targets, and ``total_tokens`` ``(B,)`` the number of its attended tokens, or what the batch says
            it is. They are lists if the batch has a list, else tensors. Microbatches weighed by them add up to the loss
            of the batch.
        pin: Whether to put the rows in pinned memory, which a GPU copies from while the host goes on.
        takes: The keys that the model's forward takes. None if it takes the whole batch.

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
    for key in _TAKEN_FOR_GRANTED if takes is None else ():  # a model that gets the whole batch may read them
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
        if isinstance(totals, torch.Tensor):
            result['total_tokens'] = totals.reshape(rows, joined).sum(1)
        else:
            result['total_tokens'] = [sum(totals[row * joined : (row + 1) * joined]) for row in range(rows)]
    if weights is not None:
        of_columns, of_row = _weights_of_columns(kept, bag_size, superpose, tuple(weights.tolist()))
        # No label is ignored. `any` would take a CPU five times as long as `min`.
        if mask is None and not (labels.numel() and labels.min() < 0):
            tokens = torch.full((rows,), of_row or _NEXT_TO_NOTHING, dtype=torch.float64, device=labels.device)
        else:
            tokens = (result['labels'] != IGNORE_INDEX).double() @ of_columns.to(labels.device)
            tokens = tokens if tokens.any() else tokens + _NEXT_TO_NOTHING
        listed = isinstance(batch.get('total_tokens'), list)
        result['loss_generating_tokens'] = tokens.tolist() if listed else tokens
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
    """Copy labels ``(B, P * s)``, with -100 at tokens that are not the target of a bag."""
    targets = _copy(labels, torch.int64, pin)
    targets.narrow(1, 0, 1 if superpose == 'output' else bag_size).fill_(IGNORE_INDEX)
    if superpose == 'input':
        targets.unflatten(1, (-1, bag_size))[..., 1:] = IGNORE_INDEX
    if mask is not None:
        targets.masked_fill_(mask == 0, IGNORE_INDEX)
    return targets


def _copy(value: torch.Tensor, dtype: torch.dtype | None = None, pin: bool = False) -> torch.Tensor:
    """Make a contiguous copy, at once in the memory where it stays."""
    return torch.empty(value.shape, dtype=dtype or value.dtype, device=value.device, pin_memory=pin).copy_(value)


@functools.lru_cache(maxsize=8)
def _weights_of_columns(
    columns: int, bag_size: int, superpose: str, weights: tuple[float, ...]
) -> tuple[torch.Tensor, float]:
    """The weight of a target in each column of a row, over all bags that predict it, ``(columns,)``; and the sum."""
    of_bag = torch.tensor(weights, dtype=torch.float64)
    if superpose == 'output':  # the target in column c is one of the min(c, s) positions before it
        before = torch.arange(columns).clamp(max=bag_size)
        of_columns = torch.cat([torch.zeros(1), of_bag.cumsum(0)])[before]
    else:
        if superpose == 'input':
            of_bag[1:] = 0
        of_columns = torch.cat([torch.zeros(bag_size), of_bag.repeat(columns // bag_size - 1)])
    return of_columns, float(of_columns.sum())


def bag_rows(batch: Mapping[str, Any], bag_size: int, superpose: str, padded: bool) -> dict[str, Any]:
    """Make bags of the tokens of each row, ``(B, P * s)`` to ``(B, P, s)``.

    It reads no values of a tensor. On a GPU that would wait for them.

    Args:
        batch: Rows as :func:`lay_out` makes them.
        bag_size: As for :func:`lay_out`.
        superpose: As for :func:`lay_out`.
        padded: Whether some token is not attended. If not, there is no ``bag_mask``.

    Returns:
        dict: As of :func:`fold_batch`, without labels and without the values that llm-foundry counts tokens by.
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
    """The targets of each position, ``(B, P, s)``, from labels and mask ``(B, P * s)``; -100 where there is none."""
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
    """The values of a batch that belong to whole rows. They are carried on as they are.

    Args:
        batch: As for :func:`fold_batch`.
        joined: How many rows are joined into one.
        takes: As for :func:`lay_out`.

    Raises:
        ValueError: If the model takes a value that can neither be carried on nor folded.
    """
    check_kinds(batch, takes)
    rows, length = batch['input_ids'].shape
    carried = {}
    for key, value in batch.items():
        if key in _PER_TOKEN or key in _PER_ROW or is_plain(value):
            continue
        if not isinstance(value, OF_ROWS) or _says_nothing(key, value):
            continue
        of_rows = len(value) == rows and not (isinstance(value, torch.Tensor) and value.shape[1:2] == (length,))
        if of_rows and joined == 1:
            carried[key] = value
        elif takes is None or key in takes:
            if of_rows:
                why = f'it is of whole rows, and expand: sequence joins {joined} of them: set expand: batch, or '
            else:
                why = 'it is not of whole rows, and a bag has several tokens: '
                if key == 'position_ids':
                    if takes is None or 'sequence_id' in takes:
                        why += 'give sequence_id to keep documents apart, or '
                elif takes is None:
                    why += 'if it says what to predict, say that in labels (of token t at t, -100 for none), and '
            raise ValueError(f'Superposition cannot fold {key}: {why}have the collator leave {key} out.')
    return carried


def check_kinds(batch: Mapping[str, Any], takes: Collection[str] | None = None) -> None:
    """Refuse, with a ValueError, a needed value whose type says nothing of rows."""
    for key, value in batch.items():
        kinds = torch.Tensor if key in _PER_TOKEN else OF_ROWS
        known = isinstance(value, kinds) or (key not in _PER_TOKEN and is_plain(value))
        if not known and is_needed(key, takes):
            raise ValueError(
                f'Superposition cannot fold {key}: it is a {type(value).__name__}: have the collator leave it out, or '
                'make it a tensor.'
            )


def _says_nothing(key: str, value: Any) -> bool:
    """Whether a value is what a model takes for granted: token types of 0, or positions from 0 in each row."""
    if key not in _TAKEN_FOR_GRANTED:
        return False
    given = torch.as_tensor(value)
    usual = 0 if key == 'token_type_ids' else torch.arange(given.shape[-1], device=given.device)
    return bool((given == usual).all())


def _separate_joined_rows(sequence_id: torch.Tensor, joined: int) -> torch.Tensor:
    """Shift sequence ids so that no two of ``joined`` consecutive rows share one. -1 (padding) stays."""
    if joined == 1:
        return sequence_id
    groups = sequence_id.reshape(-1, joined, sequence_id.shape[1])
    used = groups.amax(2, keepdim=True) + 1
    shift = used.cumsum(1) - used
    return torch.where(groups < 0, groups, groups + shift).reshape(sequence_id.shape)


def _last_attended(sequence_id: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The sequence id of each bag's last attended token, ``(B, P)``. If none is attended, of its last token."""
    if mask is None:
        return sequence_id[..., -1].contiguous()
    order = torch.arange(1, mask.shape[2] + 1, device=mask.device)
    last = torch.where(mask.any(-1), (mask * order).argmax(-1), mask.shape[2] - 1)
    return sequence_id.gather(2, last.unsqueeze(-1)).squeeze(-1)
