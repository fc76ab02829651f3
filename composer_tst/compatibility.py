"""Refuse models, algorithms, callbacks, loaders and data that cannot be superposed.

The first functions read a Composer model: its forward's arguments, its logits, its loss.
"""

import copy
import logging
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from composer import algorithms
from composer.callbacks import EarlyStopper, ThresholdStopper
from composer.core import Algorithm, Callback, State, get_precision_context
from composer.devices import DeviceCPU
from composer.models import ComposerModel, HuggingFaceModel
from composer.utils import dist
from torch import nn
from torch.nn import functional

from composer_tst.ops.fold import IGNORE_INDEX, OF_ROWS, is_plain
from composer_tst.ops.superposed import find_embedding, tables_of
from composer_tst.ops.watch import leaving_no_trace

log = logging.getLogger(__name__)
_NONE = torch.empty(0, dtype=torch.int64)  # no tokens


def unwrapped(model: nn.Module) -> Any:
    """The ComposerModel in the model of a Trainer."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def takes(model: Any) -> Collection[str] | None:
    """The keys of a batch that a model's forward takes, None if it takes the whole batch."""
    return model.model_forward_args if isinstance(model, HuggingFaceModel) else None


def logits_of(model: Any, outputs: Any) -> torch.Tensor:
    """The logits ``(B, P, V)`` in what a model's forward returns; a ValueError if it returns none."""
    if isinstance(outputs, Mapping):
        logits, names = outputs.get('logits'), ', '.join(outputs)
    else:
        logits, names = (outputs[0] if isinstance(outputs, (tuple, list)) else outputs), type(outputs).__name__
    if not isinstance(logits, torch.Tensor):
        raise ValueError(
            f'{type(model).__name__} returns {names} from its forward: have it return logits (B, P, V), under the name '
            'logits, first in a tuple, or alone.'
        )
    return logits


def is_known(loss: Any) -> bool:
    """Whether a loss belongs to Composer, llm-foundry or transformers: the cross-entropy of the next token."""
    return getattr(loss, '__module__', '').partition('.')[0] in ('composer', 'llmfoundry', 'transformers')


_IMAGES = 'it changes images, and superposition trains on tokens'
_REFUSED = {
    algorithms.AugMix: _IMAGES,
    algorithms.ColOut: _IMAGES,
    algorithms.CutMix: _IMAGES,
    algorithms.CutOut: _IMAGES,
    algorithms.GyroDropout: 'its masks are for activations (batch, features), and a language model has positions',
    algorithms.LabelSmoothing: 'it smooths one label at each position, and a bag has several',
    algorithms.MixUp: _IMAGES,
    algorithms.NoOpModel: 'it leaves no model to train',
    algorithms.ProgressiveResizing: _IMAGES,
    algorithms.RandAugment: _IMAGES,
    algorithms.SelectiveBackprop: 'it calls the model with the input alone, and a causal model takes the whole batch',
}


def check_algorithms(stack: Iterable[Algorithm], ours: type[Algorithm]) -> None:
    """Refuse, with a ValueError, algorithms that cannot be superposed, and a second of ``ours``."""
    stack = list(stack)
    if sum(isinstance(algorithm, ours) for algorithm in stack) > 1:
        raise ValueError(
            f'algorithms has {ours.__name__} more than once: give one, with several phases: '
            'phases=[{bag_size, until}, ...].'
        )
    for algorithm in stack:
        for refused, reason in _REFUSED.items():
            if isinstance(algorithm, refused):
                raise ValueError(
                    f'{refused.__name__} cannot be combined with TokenSuperposition, because {reason}: remove one of '
                    'them from algorithms.'
                )


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuse, with a ValueError, callbacks that need what a superposed step does not have."""
    for callback in callbacks:
        if _is_a(callback, 'llmfoundry.callbacks.loss_perp_v_len_callback', 'LossPerpVsContextLengthLogger'):
            raise ValueError(
                'loss_perp_v_len cannot be combined with token_superposition, because it reads one label at each '
                'position, and a bag has several: remove one of them.'
            )
        if isinstance(callback, (EarlyStopper, ThresholdStopper)) and callback.dataloader_label == 'train':
            name = 'early_stopper' if isinstance(callback, EarlyStopper) else 'threshold_stopper'
            raise ValueError(
                f'{name} watches {callback.monitor} of train, and there are no train metrics while superposed: '
                'set its dataloader_label to eval.'
            )


def check_loader(loader: Any) -> None:
    """Refuse, with a ValueError, llm-foundry's finetuning loader, which trains on the responses to prompts alone."""
    collator = getattr(loader, 'collate_fn', None)
    while collator is not None:
        if _is_a(collator, 'llmfoundry.data.finetuning.collator', 'Seq2SeqFinetuningCollator'):
            raise ValueError(
                'The train loader is a finetuning loader: superposition is for pre-training, give train_loader '
                'name: text, or remove token_superposition from algorithms.'
            )
        collator = getattr(collator, 'base_collator', None)


def check_batch(batch: Mapping[str, Any], given: Mapping[str, Any], bag_size: int, superpose: str, model: Any) -> None:
    """Refuse a batch on which a superposed step would train wrongly.

    Args:
        batch: The rows that :func:`~composer_tst.ops.fold.lay_out` has made.
        given: The batch from which it has made them.
        bag_size: Tokens in a bag.
        superpose: ``both``, ``input`` or ``output``.
        model: The ComposerModel.

    Raises:
        ValueError: If the model needs labels and there are none; if a label is negative but not -100; or if MPT's
            flash attention would leave positions out.
    """
    if 'labels' not in given and isinstance(model, HuggingFaceModel):
        raise ValueError(f'The batch has no labels (it has {", ".join(given)}): have the collator add them.')
    labels = batch['labels']
    if bool(((labels < 0) & (labels != -100)).any()):
        other = int(labels[(labels < 0) & (labels != -100)][0])
        raise ValueError(f'labels has {other}: mark tokens that are not to be predicted with -100.')
    if not _attends_by_length(model) or superpose == 'output':
        return
    advice = 'set expand: batch, attn_uses_sequence_id: false, or attn_impl: torch.'
    mask = batch.get('attention_mask')
    if mask is not None:
        attended = mask.bool().unflatten(1, (-1, bag_size)).any(-1)
        if bool((attended[:, 1:] & ~attended[:, :-1]).any()):
            raise ValueError(
                "MPT's flash attention with attn_uses_sequence_id reads the attention mask as a length, and this row "
                f'of bags has padding before its end: {advice}'
            )
    if 'sequence_id' in batch and int(batch['sequence_id'].max()) >= batch['labels'].shape[1] // bag_size:
        raise ValueError(
            "MPT's flash attention with attn_uses_sequence_id leaves out sequences numbered past the length of a row, "
            f'and a row of bags has more: {advice}'
        )


def check_ignored(labels: torch.Tensor, ignored: torch.Tensor, model: Any) -> None:
    """Refuse, with a ValueError, labels that have a token that the model's own loss ignores."""
    found = labels[torch.isin(labels, ignored.to(labels.device))] if len(ignored) else ignored
    if len(found):
        raise ValueError(
            f'The loss of {type(model).__name__} ignores token {int(found[0])}, which labels have '
            f'{int((found == found[0]).sum())} times in this batch: mark it with -100 in labels, or give an '
            'attention_mask.'
        )


def check_first_batch(state: State, size: int | float | None) -> torch.Tensor:
    """Compare, on the first rows of rank 0's batch, the model's own loss with the loss of superposition.

    A model with a loss of its own and a Hugging Face model are called with these rows, as in a plain run. A Hugging
    Face model computes its loss in its forward. Of another loss, the gradient tells which token it predicts at each
    position.

    Args:
        state: The state of the Trainer. Its batch is not laid out yet.
        size: Rows of a microbatch in plain training.

    Returns:
        torch.Tensor: The tokens that the model's own loss ignores, such as padding.

    Raises:
        ValueError: If ids are beyond the embedding, labels are shifted already, or the model's own loss predicts
            another token than the next or obeys a mask in the batch.
    """
    batch, model = state.batch, unwrapped(state.model)
    _refuse_large(batch['input_ids'], model)
    if 'labels' in batch:
        _refuse_shifted(batch['input_ids'], batch['labels'])
    hugging_face = isinstance(model, HuggingFaceModel)
    known = is_known(vars(model).get('loss', type(model).loss))
    if known and not hugging_face:
        return _NONE
    row, largest = _first_rows(state, size)
    precision = get_precision_context(state.precision, state.precision_config)
    with torch.compiler.set_stance('force_eager'), leaving_no_trace(state.model), precision:
        with torch.no_grad():
            outputs = state.model(seen := _copy(row))
        row = {**seen, **row}  # a loss may read what forward has put there
        of_forward = _loss_function(model)
        if not known or not (of_forward is None or is_known(of_forward)) or not _is_stock(model):
            return _check_own_loss(model, outputs, row, largest)
        if isinstance(outputs, Mapping) and outputs.get('loss') is not None and outputs.get('logits') is not None:
            _compare_losses(model, outputs, row, _total(model.loss(outputs, row)))
    return _NONE


def _first_rows(state: State, size: int | float | None) -> tuple[dict[str, Any], int]:
    """The first rows of rank 0's batch, as many as a microbatch has in plain training, and the batch's largest label.

    Every rank gets the same, so that a loss that reduces over ranks is called equally often on each.
    """
    batch = state.batch
    # With `auto`, how many rows fit is not known yet.
    some = max(1, size) if isinstance(size, int) and not state.auto_microbatching else 1
    rows = len(batch['input_ids'])
    of_rows = [key for key, value in batch.items() if isinstance(value, OF_ROWS) and not is_plain(value)]
    row = {**batch, **{key: batch[key][:some] for key in of_rows if len(batch[key]) == rows}}
    largest = int(batch.get('labels', batch['input_ids']).max())
    if dist.get_world_size() > 1:
        of_rank_0: list[Any] = [DeviceCPU().batch_to_device(row), largest]
        dist.broadcast_object_list(of_rank_0)
        row, largest = of_rank_0
    return state.device.batch_to_device(row), largest


def _copy(row: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a batch whose tensors a loss may write to."""
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in row.items()}


def _loss_function(model: Any) -> Any:
    """The function with which the forward of a Hugging Face model computes its loss, None if it has none."""
    return getattr(model.model, 'loss_function', None) if isinstance(model, HuggingFaceModel) else None


def _is_stock(model: Any) -> bool:
    """Whether the ``loss_fn`` of a model, if it has one, is the cross-entropy that llm-foundry gives its MPT."""
    function = getattr(model, 'loss_fn', None)
    settings = {
        'ignore_index': IGNORE_INDEX,
        'reduction': 'none',
        'label_smoothing': 0,
        'weight': None,
        'logit_scale': 1,  # of flash-attn, as is the next
        'lse_square_scale': 0,
    }
    return function is None or (
        type(function).__name__ == 'CrossEntropyLoss'
        and type(function).__module__.partition('.')[0] in ('torch', 'flash_attn')
        and all(getattr(function, name, value) == value for name, value in settings.items())
    )


def _refuse_large(ids: torch.Tensor, model: Any) -> None:
    largest, entries = int(ids.max()), find_embedding(model).num_embeddings
    if largest < entries:
        return
    inner = model.model if isinstance(model, HuggingFaceModel) else model
    inner = getattr(inner, 'module', inner)  # in FSDP1's wrapper
    tokenizer = getattr(getattr(model, 'tokenizer', None), 'name_or_path', '')
    raise ValueError(
        f'input_ids has token {largest} but the embedding of {type(inner).__name__} has {entries} rows: train on data '
        f"of the model's own tokenizer{f' {tokenizer}' * bool(tokenizer)}, or give the model the vocab_size of the "
        "data's."
    )


def _refuse_shifted(ids: torch.Tensor, labels: torch.Tensor) -> None:
    valid = labels != IGNORE_INDEX
    asked = valid[:, :-1] & valid[:, 1:]  # without the last label before padding: ids may not have its token
    if not bool(asked.any()):  # no two labels are neighbours
        asked = valid[:, :-1]
    ahead = (labels == ids.roll(-1, 1))[:, :-1][asked]
    if len(ahead) and bool((labels != ids)[valid].any()) and bool(ahead.all()):
        raise ValueError(
            'labels are shifted already: at t they have token t + 1. Give the label of token t at t, and have the loss '
            'of the model shift them.'
        )


def _compare_losses(model: Any, outputs: Mapping[str, Any], row: Mapping[str, Any], loss: torch.Tensor) -> None:
    """Compare the loss of a Hugging Face model with the cross-entropy of its logits plus its router's loss."""
    if not _one_a_position(outputs['logits'], row):
        return  # the first superposed step refuses it
    # Such a model does not mask its labels.
    expected = functional.cross_entropy(outputs['logits'].float().flatten(0, 1), _next(row['labels']).flatten())
    _say_what_is_left_out(model, outputs, loss, expected)


def _total(losses: Any) -> torch.Tensor:
    """The loss that Composer trains on, from what a model's loss returns."""
    if isinstance(losses, Mapping):
        losses = [losses['total']] if 'total' in losses else list(losses.values())
    total: Any = sum(each.mean() for each in (losses if isinstance(losses, (tuple, list)) else [losses]))
    return total


def _one_a_position(logits: torch.Tensor, row: Mapping[str, Any]) -> bool:
    """Whether logits are ``(B, L, V)``."""
    return logits.ndim == 3 and logits.shape[:2] == row['input_ids'].shape


def _next(labels: torch.Tensor) -> torch.Tensor:
    """What each token is to predict, ``(B, L)``: the label that follows it, or -100 at the end of a row."""
    return functional.pad(labels[:, 1:].long(), (0, 1), value=IGNORE_INDEX)


def _check_own_loss(model: Any, outputs: Any, row: Mapping[str, Any], largest: int) -> torch.Tensor:
    """Compare a loss of one's own with the labels, and return the tokens up to the largest that it ignores."""
    if isinstance(model, HuggingFaceModel) and isinstance(outputs, Mapping) and outputs.get('logits') is None:
        return _NONE  # it may return logits only if it is given no labels
    name, logits = type(model).__name__, logits_of(model, outputs)
    if not _one_a_position(logits, row):
        return _NONE  # the first superposed step refuses it
    given = row.get('labels', row['input_ids'])
    following = _next(given)
    expected = (
        _next(given.masked_fill(row['attention_mask'] == 0, IGNORE_INDEX)) if 'attention_mask' in row else following
    )
    if int(expected.max()) >= logits.shape[-1]:
        raise ValueError(
            f'{name} returns {logits.shape[-1]} values at each position, and labels have token {int(expected.max())}: '
            'have its forward return logits of the whole vocabulary, and its loss use them.'
        )
    loss, gradient = _loss_and_gradient(model, outputs, row)
    if gradient is None:
        if isinstance(model, HuggingFaceModel) and isinstance(outputs, Mapping):
            _compare_losses(model, outputs, row, loss)
        return _NONE
    trained = gradient.ne(0).any(-1)
    predicted = gradient.argmin(-1)  # the gradient of a cross-entropy is negative only at the target
    right = trained & (predicted == expected)
    told = int((trained & (expected != IGNORE_INDEX)).sum())
    wrong = told - int(right.sum())
    not_shifted = bool((predicted == given)[trained].all() and (predicted != following)[trained].any())
    if not told and not_shifted:  # no two labels are neighbours
        told, wrong = int(trained.sum()), int((predicted != following)[trained].sum())
    if wrong and (not_shifted or 2 * wrong > told):
        raise ValueError(
            f'The loss of {name} predicts another token than labels[t + 1] at {wrong} of {told} positions t of the '
            'first rows: give the label of token t at t, have its forward return logits, and have its loss predict '
            'the label of the next token.'
        )
    if not told:
        return _NONE
    reads_labels = 'labels' in row and _reads(model, outputs, row, gradient, 'labels', row['labels'].roll(1, 1))
    changing = ('labels',) if reads_labels else ('input_ids', 'labels')
    ignored = _ignored_tokens(model, outputs, row, expected[right][:1].cpu(), largest, changing)
    left_out = (expected != IGNORE_INDEX) & ~trained & ~torch.isin(expected, ignored.to(expected.device))
    if left_out.any():
        _refuse_masks(model, outputs, row, gradient)
        log.warning(
            f'The loss of {name} leaves out {int(left_out.sum())} of {int((expected != IGNORE_INDEX).sum())} labels of '
            'the first rows. Superposed steps train on them too: mark such tokens with -100 in labels.'
        )
    # Other positions have no next label. A loss may add something of their logits all the same.
    counted = trained & ((expected != IGNORE_INDEX) | (predicted == following))
    cross_entropy = functional.cross_entropy(logits.float()[counted], predicted[counted])
    _say_what_is_left_out(model, outputs, loss, cross_entropy)
    return ignored


def _refuse_masks(model: Any, outputs: Any, row: Mapping[str, Any], gradient: torch.Tensor) -> None:
    """Refuse, with a ValueError, a value of a batch on which it depends which tokens a loss trains on."""
    for key, value in row.items():
        if key in ('input_ids', 'labels', 'attention_mask') or not isinstance(value, torch.Tensor):
            continue
        if _reads(model, outputs, row, gradient, key, torch.zeros_like(value)):
            raise ValueError(
                f'The loss of {type(model).__name__} reads {key}, which superposed steps leave out: mark tokens that '
                f'are not to be trained on with -100 in labels, and have the collator leave {key} out.'
            )


def _reads(
    model: Any, outputs: Any, row: Mapping[str, Any], gradient: torch.Tensor, key: str, other: torch.Tensor
) -> bool:
    """Whether a loss trains on other positions if a value of the batch is another."""
    changed = _loss_and_gradient(model, outputs, row, **{key: other})[1]
    return changed is None or not torch.equal(changed.sign(), gradient.sign())


def _loss_and_gradient(
    model: Any, outputs: Any, row: Mapping[str, Any], **changed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss of a batch, some of whose values are changed, and its gradient by the logits ``(B, L, V)``.

    The gradient is None if the loss does not depend on the logits, or if it is not finite.
    """
    asked, leaf = _copy({**row, **changed}), logits_of(model, outputs).detach().float().requires_grad_()
    with torch.enable_grad():
        logits = leaf.clone()  # a loss may write to it
        of_forward = None
        if isinstance(outputs, Mapping) and outputs.get('loss') is not None:
            of_forward = _loss_function(model)
        outputs = _exchanged(outputs, [(logits_of(model, outputs), logits), *((row[key], asked[key]) for key in row)])
        if of_forward is not None:  # forward's loss has no gradient: compute it again for one
            again = of_forward(logits=logits, labels=asked['labels'], vocab_size=logits.shape[-1])
            outputs['loss'] = outputs['loss'] + again - again.detach()
        loss = _total(model.loss(outputs, asked))
        gradient = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
    return loss.detach(), gradient if gradient is not None and bool(gradient.isfinite().all()) else None


def _exchanged(outputs: Any, pairs: list[tuple[Any, Any]]) -> Any:
    """What a forward has returned, with the second of a pair in place of each tensor that equals the first."""

    def exchange(value: Any) -> Any:
        return next((new for old, new in pairs if value is old or _equal(value, old)), value)

    if isinstance(outputs, Mapping):
        exchanged: Any = copy.copy(outputs)
        for key, value in outputs.items():
            exchanged[key] = exchange(value)
        return exchanged
    if isinstance(outputs, (tuple, list)):
        make: Any = getattr(outputs, '_make', type(outputs))  # of a named tuple
        return make([exchange(value) for value in outputs])
    return exchange(outputs)


def _equal(value: Any, other: Any) -> bool:
    both = isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor)
    return both and value.dtype == other.dtype and value.device == other.device and torch.equal(value, other)


def _ignored_tokens(
    model: Any,
    outputs: Any,
    row: Mapping[str, Any],
    trained: torch.Tensor,
    largest: int,
    changing: Collection[str],
) -> torch.Tensor:
    """The tokens that a loss ignores. Put each at some places, beside one that it trains on, and read the gradient."""
    ids, generator = row['input_ids'], torch.Generator().manual_seed(0)
    places = ids[:, 1:].numel()
    left = torch.randperm(largest + 1, generator=generator)
    while True:  # a loss may also leave places out: try the tokens that are left at other places
        found = []
        for some in left.split(max(1, places - 1)):
            tokens = torch.cat([some, trained])
            tokens = tokens[torch.randperm(places, generator=generator) % len(tokens)].view(len(ids), -1)
            tokens = functional.pad(tokens, (1, 0), value=int(trained)).to(ids.device)
            changed = dict.fromkeys(changing, tokens)
            if 'attention_mask' in row:
                changed['attention_mask'] = torch.ones_like(row['attention_mask'])
            gradient = _loss_and_gradient(model, outputs, row, **changed)[1]
            if gradient is None:
                return _NONE
            at_targets = gradient[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
            found.append(tokens[:, 1:][at_targets < 0].cpu())
        before, left = left, left[~torch.isin(left, torch.cat(found))]
        if len(left) in (0, len(before)):
            return left


def _say_what_is_left_out(model: Any, outputs: Any, loss: torch.Tensor, cross_entropy: torch.Tensor) -> None:
    if isinstance(model, HuggingFaceModel) and isinstance(outputs, Mapping) and outputs.get('aux_loss') is not None:
        cross_entropy = cross_entropy + getattr(model.config, 'router_aux_loss_coef', 0) * outputs['aux_loss']
    rtol = 1e-4 if loss.dtype == torch.float32 else 1e-2
    if not torch.isclose(loss.float(), cross_entropy.float(), rtol=rtol, atol=1e-5, equal_nan=True):
        log.warning(
            f'The loss of {type(model).__name__} is more than a cross-entropy: {float(loss):.4g} on the first rows, '
            f'where its cross-entropy is {float(cross_entropy):.4g}. Superposed steps leave the rest out, and recovery '
            'trains on it.'
        )


def check_eval_batch(batch: Any, model: Any) -> None:
    """Refuse, with a ValueError, an eval batch without labels if Composer would fail on it with a bare KeyError."""
    composers = getattr(type(model), 'eval_forward', None) is HuggingFaceModel.eval_forward
    if not composers or not isinstance(batch, Mapping) or 'labels' in batch:
        return
    if model.use_logits or batch.get('mode') in ('generate', 'icl_task'):
        raise ValueError(
            f'An eval batch has no labels (it has {", ".join(batch)}): have the collator of the eval loader add them.'
        )


def _attends_by_length(model: Any) -> bool:
    """Whether a model is an MPT that gives flash attention the lengths of the sequences in a row."""
    transformer: Any = getattr(getattr(model, 'model', None), 'transformer', None)
    return bool(getattr(transformer, 'attn_uses_sequence_id', False)) and transformer.attn_impl == 'flash'


def forget_losses(callbacks: Iterable[Callback]) -> None:
    """Have llm-foundry's KillLossSpike begin a new window: losses of different bag sizes do not compare."""
    for callback in callbacks:
        if _is_a(callback, 'llmfoundry.callbacks.kill_loss_spike_callback', 'KillLossSpike'):
            spike: Any = callback
            spike.loss_window.clear()
            spike.outlier_counter = 0


def _is_a(thing: Any, module: str, name: str) -> bool:
    """Whether a thing is of a class of llm-foundry. If nobody has imported the class, it is not."""
    return module in sys.modules and isinstance(thing, getattr(sys.modules[module], name))


def check_model(model: Any) -> None:
    """Refuse a model that cannot be trained superposed.

    Raises:
        ValueError: If it is not a causal language model with one input embedding, is wrapped by PEFT, has an
            embedding that changes what it looks up, or keeps a loss outside its outputs.
    """
    name = type(model).__name__
    if not isinstance(model, ComposerModel):
        raise ValueError(f'{name} is not a ComposerModel: wrap it, for example in composer.models.HuggingFaceModel.')
    if isinstance(model, HuggingFaceModel):
        if model.using_peft:
            raise ValueError('The model is wrapped by PEFT: superposition is for pre-training, train it without.')
        if model.config.is_encoder_decoder:
            raise ValueError(f'{name} is an encoder-decoder: use a causal (decoder-only) model.')
        if not model.shift_labels:
            raise ValueError(f'{name} is not a causal language model: use a decoder-only model (shift_labels=True).')
        if getattr(getattr(model.model, 'transformer', None), 'mb_args', None) is not None:
            raise ValueError(
                'MPT keeps the load-balancing loss of megablocks experts outside its outputs, where superposition '
                'would lose it: use a Hugging Face mixture of experts.'
            )
    tables_of(model, find_embedding(model))
