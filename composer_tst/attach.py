"""Superposition on a model, for one forward and backward pass at a time.

:meth:`Attachment.begin` is given a folded microbatch and gives what the model is to read: ids ``(B, P)`` and no labels,
so that any architecture runs as it does on plain tokens and computes no loss of its own. Until :meth:`Attachment.end`,
after the backward pass, one thing is changed on the model, which is no parameter, buffer or state-dict key: the lookup
of the input embedding gives the mean embedding of the bag that each of these ids stands for. Whatever else the
embedding does (Gemma's scale, MPT's tied output head) stays: only ``nn.Embedding``'s own lookup is replaced.

The bags are for the ids that were handed over, told by their storage, and for nothing else: any other ids are looked up
as ever, in evaluation, by a callback, or in a backward pass that runs a part of the model again.
"""

import copyreg
import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from composer.models import ComposerModel, HuggingFaceModel
from torch import nn
from torch.distributed.tensor import DTensor

from composer_tst.embedding import bag_embedding
from composer_tst.folding import is_plain
from composer_tst.loss import multi_hot_cross_entropy
from composer_tst.models import find_embedding, with_lookup

log = logging.getLogger(__name__)


class BagLookup(nn.Embedding):
    """The lookup of an ``nn.Embedding`` that has bags to look up.

    Attributes:
        bags: The token ids ``(B * P, s)`` and the attended tokens ``(B * P, s)`` or None.
        handed_over: The ids ``(B, P)`` that stand for the bags.
        found: Whether a bag was looked up since the bags were handed over.
        missed: Whether other ids were.
        compiled: Whether a compiler had to take it for granted that the ids are those handed over.
        plain_class: The class without this one.
    """

    bags: tuple[torch.Tensor, torch.Tensor | None]
    handed_over: torch.Tensor
    found: bool
    missed: bool
    compiled: bool
    plain_class: type[nn.Embedding]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Mean embeddings, shape ``input.shape + (d,)``, of the bags that ``input`` stands for."""
        at = _places(input, self.handed_over)
        if at is None:
            self.missed = True
            return super().forward(input)
        self.found = True
        if torch.compiler.is_compiling():
            self.compiled = True
        if isinstance(self.weight, DTensor):
            # FSDP has made the weight whole by now.
            raise ValueError(
                'The input embedding is divided by tensor parallelism, and superposition needs it whole: leave it out '
                'of the layer plan.'
            )
        ids, mask = self.bags
        return bag_embedding(self, ids[at], mask if mask is None else mask[at]).view(*input.shape, -1)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy, and what is saved of it, is the embedding itself."""
        del protocol
        state = {key: value for key, value in vars(self).items() if key not in BagLookup.__annotations__}
        reconstruct: Any = getattr(copyreg, '_reconstructor')  # noqa: B009
        return reconstruct, (self.plain_class, object, None), state


def _places(input: torch.Tensor, handed_over: torch.Tensor) -> torch.Tensor | slice | None:
    """Which of the flat positions of ``handed_over`` the ids ``input`` are, None if they are others.

    A model may reshape, transpose or slice the ids that it is given: these are views of one storage.
    """
    if torch.compiler.is_compiling():  # which knows no storages: Attachment.try_out tells
        return slice(None) if input.numel() == handed_over.numel() else None
    if input.untyped_storage().data_ptr() != handed_over.untyped_storage().data_ptr():
        return None
    if input.is_contiguous() and input.numel() == handed_over.numel():
        return slice(None)
    every = torch.arange(handed_over.numel(), device=input.device)
    return every.as_strided(input.size(), input.stride(), input.storage_offset()).flatten()


def take_off(model: nn.Module) -> None:
    """Leave a model as it was, also where a run that ended in the middle of a pass left it changed."""
    for module in model.modules():
        if isinstance(module, BagLookup):
            _give_lookup_back(module)
    loss = vars(model).get('loss')
    if isinstance(loss, _Loss):
        loss.take_off()


def _give_lookup_back(embedding: nn.Embedding) -> None:
    if isinstance(embedding, BagLookup):
        plain_class = embedding.plain_class
        for name in BagLookup.__annotations__:
            vars(embedding).pop(name, None)
        object.__setattr__(embedding, '__class__', plain_class)  # nn.Module's needs an interpreter that is not ending


class Attachment:
    """Superposition on one model.

    Args:
        model: A model that :func:`~composer_tst.models.check_model` accepts, not wrapped.

    Attributes:
        weights: Weights of a bag's targets, ``(s,)``, or None for uniform ones.
        router_losses: The router loss of each microbatch; empty without a mixture of experts.
    """

    weights: torch.Tensor | None = None

    def __init__(self, model: ComposerModel):
        take_off(model)
        self.router_losses: list[torch.Tensor] = []
        self._model: Any = model
        self._embedding = find_embedding(model)
        self._targets: torch.Tensor | None = None
        self._name = type(model).__name__
        self._own_loss: Any = None
        self._tried_out = False

    def begin(self, folded: Mapping[str, Any]) -> dict[str, Any]:
        """Hand the bags of a folded microbatch over, and give what the model is to read."""
        inputs = {key: value for key, value in folded.items() if key not in ('labels', 'bag_mask')}
        if not isinstance(self._model, HuggingFaceModel):  # which would compute its loss of any labels
            inputs['labels'] = _NoLabels(self._name)
        self._targets = folded['labels']
        if folded['input_ids'].ndim == 3:
            # One id stands for its bag: models read its shape, and reshape it, but look it up in vain. Of its own
            # storage, and of the type that a model would make it, which copies them.
            ids, mask = folded['input_ids'].long(), folded.get('bag_mask')
            inputs['input_ids'] = ids[..., -1].clone(memory_format=torch.contiguous_format)
            bags = ids.flatten(0, 1), mask if mask is None else mask.flatten(0, 1)
            self._change_lookup(bags, inputs['input_ids'])
        return inputs

    def _change_lookup(self, bags: tuple[torch.Tensor, torch.Tensor | None], ids: torch.Tensor) -> None:
        embedding = self._embedding
        if not isinstance(embedding, BagLookup):
            plain_class = type(embedding)
            object.__setattr__(embedding, '__class__', _lookup_class(plain_class))
            embedding.plain_class = plain_class
        embedding = cast(BagLookup, embedding)
        embedding.bags, embedding.handed_over = bags, ids
        embedding.found = embedding.missed = embedding.compiled = False

    def check_forward(self) -> None:
        """Refuse a model that has not looked up the bags, or more than them.

        Raises:
            ValueError: If the forward pass since :meth:`begin` has done so.
        """
        embedding = self._embedding
        if isinstance(embedding, BagLookup) and (embedding.missed or not embedding.found):
            what = 'looks up other ids than those of the batch' if embedding.missed else 'looks no ids of the batch up'
            raise ValueError(
                f'{self._name} {what} in its input embedding, so that it would not read bags: have its forward call '
                "that module on batch['input_ids'], or a view of them, and on nothing else."
            )

    def try_out(self, model: Callable[[Any], Any], folded: Mapping[str, Any]) -> None:
        """Check the forward pass of a compiled model once, uncompiled, on the first row of a microbatch.

        Args:
            model: The model as it is trained, wrapped or not.
            folded: The microbatch of the pass since :meth:`begin`, which must be over.

        Raises:
            ValueError: As :meth:`check_forward`.
        """
        embedding = self._embedding
        if self._tried_out or not (isinstance(embedding, BagLookup) and embedding.compiled):
            return
        self._tried_out = True
        row = {key: value if is_plain(value) else value[:1] for key, value in folded.items()}
        with torch.no_grad(), torch.random.fork_rng(), torch.compiler.set_stance('force_eager'):
            model(self.begin(row))
        self.check_forward()

    def begin_loss(self) -> None:
        """Have the model's loss be the multi-hot cross-entropy, until :meth:`end_loss`."""
        own = vars(self._model).get('loss')
        if own is not None and own is not self._own_loss:
            self._own_loss = own
            log.warning(
                'A loss is set on the %s: superposed steps train on the multi-hot cross-entropy instead of it, and '
                'recovery trains on it.',
                self._name,
            )
        vars(self._model)['loss'] = _Loss(self, vars(self._model))

    def end_loss(self) -> None:
        """Give the model the loss back that it had.

        Raises:
            ValueError: If somebody else has set another one meanwhile, which this step has then trained on.
        """
        loss = vars(self._model).get('loss')
        if not isinstance(loss, _Loss):
            raise ValueError(
                f'The loss of {self._name} was set between BEFORE_LOSS and AFTER_LOSS, where it is the multi-hot '
                'cross-entropy: set it before.'
            )
        loss.take_off()

    def end(self) -> None:
        """Leave the model as it was: the forward and backward pass are done."""
        self._targets = None
        _give_lookup_back(self._embedding)

    def remove(self) -> None:
        """Leave the model as it was, wherever a pass has ended."""
        self._targets = None
        take_off(self._model)

    def loss(self, outputs: Any) -> torch.Tensor:
        """Multi-hot cross-entropy of logits ``(B, P, V)`` and the targets ``(B, P, s)``, and any router loss: a scalar.

        It stays one tensor, as llm-foundry's KillLossSpike needs it.

        Raises:
            ValueError: If the logits are not one for each position.
        """
        logits, targets = self._logits(outputs), self._targets
        assert targets is not None
        targets = targets.to(logits.device)
        if logits.shape[:-1] != targets.shape[:2]:
            raise ValueError(
                f'{self._name} returns logits of shape {tuple(logits.shape)} for bags of shape '
                f'{tuple(targets.shape)}: have its forward return logits (B, P, V), one for each position.'
            )
        if self.weights is not None:
            # Copied to a GPU once: at every loss, the copy would wait for it.
            self.weights = self.weights.to(logits.device)
        mce = multi_hot_cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), self.weights)
        aux_loss = outputs.get('aux_loss') if isinstance(outputs, Mapping) else None
        if aux_loss is None:
            return mce
        router = self._model.config.router_aux_loss_coef * aux_loss
        self.router_losses.append(router.detach())
        return mce + router

    def _logits(self, outputs: Any) -> torch.Tensor:
        if isinstance(outputs, Mapping):
            logits, names = outputs.get('logits'), ', '.join(outputs)
        else:
            logits, names = (outputs[0] if isinstance(outputs, (tuple, list)) else outputs), type(outputs).__name__
        if not isinstance(logits, torch.Tensor):
            raise ValueError(
                f'{self._name} returns {names} from its forward: have it return logits (B, P, V), under the name '
                'logits, first in a tuple, or alone.'
            )
        return logits


class _NoLabels:
    """What a model finds in place of labels: whatever it does with them is refused."""

    def __init__(self, name: str):
        self._name = name

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            f"{self._name} reads batch['labels'] in its forward, and a bag has several: have its forward return logits "
            'and its loss read the labels.'
        )

    __getitem__ = __eq__ = __ne__ = __len__ = __torch_function__ = _refuse
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name.startswith('_'):
            raise AttributeError(name)
        return self._refuse()


class _Loss:
    """The loss on a model's instance while one is computed."""

    def __init__(self, attachment: 'Attachment', instance: dict[str, Any]):
        self._attachment = attachment
        self._instance = instance
        self._had = instance.get('loss')

    def __call__(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        del batch, args, kwargs
        return self._attachment.loss(outputs)

    def take_off(self) -> None:
        del self._instance['loss']
        if self._had is not None:
            self._instance['loss'] = self._had


_LOOKUP_CLASSES: dict[type[nn.Embedding], type[nn.Embedding]] = {}


def _lookup_class(cls: type[nn.Embedding]) -> type[nn.Embedding]:
    """The class of an embedding with bags, one for each class: a compiler compiles for each anew."""
    return _LOOKUP_CLASSES.setdefault(cls, with_lookup(cls, BagLookup))
