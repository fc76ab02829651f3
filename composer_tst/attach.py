"""Superposition on a model, for one forward and backward pass at a time.

:meth:`Attachment.begin` is given a folded microbatch and gives what the model is to read: ids ``(B, P)`` and no labels,
so that any architecture runs as it does on plain tokens and computes no loss of its own. Until :meth:`Attachment.end`,
after the backward pass, one thing is changed on the model, which is no parameter, buffer or state-dict key: the lookup
of the input embedding gives the mean embedding of the bag that each of these ids stands for. Whatever else the
embedding does (Gemma's scale, MPT's tied output head) stays: only ``nn.Embedding``'s own lookup is replaced.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from composer.models import ComposerModel, HuggingFaceModel
from torch import nn

from composer_tst.lookup import BagLookup, change_lookup, give_lookup_back
from composer_tst.models import find_embedding
from composer_tst.ops.cross_entropy import multi_hot_cross_entropy
from composer_tst.ops.fold import is_plain

log = logging.getLogger(__name__)


def take_off(model: nn.Module) -> None:
    """Leave a model as it was, also where a run that ended in the middle of a pass left it changed."""
    for module in model.modules():
        if isinstance(module, BagLookup):
            give_lookup_back(module)
    loss = vars(model).get('loss')
    if isinstance(loss, _Loss):
        loss.take_off()


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
        self._hook: Any = None

    def begin(self, folded: Mapping[str, Any]) -> dict[str, Any]:
        """Hand the bags of a folded microbatch over, and give what the model is to read."""
        self._embedding = find_embedding(self._model)
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
            change_lookup(self._embedding, bags, inputs['input_ids'])
            # What a callback has looked up before is not of the pass.
            self._hook = self._model.register_forward_pre_hook(_forget_lookups, with_kwargs=True)
        return inputs

    def check_forward(self) -> None:
        """Refuse a model that has not looked up the bags, or more than them.

        Raises:
            ValueError: If the forward pass since :meth:`begin` has done so.
        """
        embedding = self._embedding
        self._unhook()
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
        row = {key: value if is_plain(value) else value[:1] for key, value in folded.items()}
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        with torch.no_grad(), torch.random.fork_rng(), torch.compiler.set_stance('force_eager'):
            try:
                model(self.begin(row))
            finally:
                for buffer, before in buffers:
                    buffer.copy_(before)
        self.check_forward()
        self._tried_out = True

    def begin_loss(self, state: Any) -> None:
        """Have the model's loss of ``state.outputs`` be the multi-hot cross-entropy, until :meth:`end_loss`."""
        own = vars(self._model).get('loss', type(self._model).loss)
        if own is not self._own_loss and not _is_known(own):
            self._own_loss = own
            log.warning(
                'The %s has a loss of its own: superposed steps train on the multi-hot cross-entropy instead of it, '
                'and recovery trains on it.',
                self._name,
            )
        vars(self._model)['loss'] = _Loss(self, self._model, state)

    def end_loss(self) -> None:
        """Give the model the loss back that it had.

        Raises:
            ValueError: If somebody else has set another one meanwhile, which this step has then trained on.
        """
        loss = vars(self._model).get('loss')
        if not isinstance(loss, _Loss) or not loss.called:
            raise ValueError(
                f'The loss of {self._name} is set between BEFORE_LOSS and AFTER_LOSS, or is no method, so that it was '
                'not the multi-hot cross-entropy: make it a method, and set another one before.'
            )
        loss.take_off()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def end(self) -> None:
        """Leave the model as it was: the forward and backward pass are done."""
        self._targets = None
        give_lookup_back(self._embedding)

    def remove(self) -> None:
        """Leave the model as it was, wherever a pass has ended."""
        self._unhook()
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


def _forget_lookups(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Count lookups from here on, if it is the pass that the bags are for."""
    embedding, batch = find_embedding(model), [*args, *kwargs.values()][0]  # pyright: ignore[reportArgumentType]
    if torch.compiler.is_compiling() or not isinstance(embedding, BagLookup) or not isinstance(batch, Mapping):
        return
    if batch.get('input_ids') is embedding.handed_over:
        embedding.found = embedding.missed = False


def _is_known(loss: Any) -> bool:
    """Whether a loss is the next-token cross-entropy of Composer's or llm-foundry's own models."""
    return getattr(loss, '__module__', '').partition('.')[0] in ('composer', 'llmfoundry')


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
    """The loss on a model's instance while a Trainer computes one."""

    def __init__(self, attachment: 'Attachment', model: Any, state: Any):
        self._attachment = attachment
        self._model = model
        self._state = state
        self._had = vars(model).get('loss')
        self.called = False

    def __call__(self, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if outputs is self._state.outputs:
            self.called = True
            return self._attachment.loss(outputs)
        # A callback's; or another Trainer's, after a fit that failed here.
        return functools.partial(*self._own)(outputs, *args, **kwargs)

    @property
    def _own(self) -> tuple[Any, ...]:
        """The model's loss without this one, as a function and its first arguments."""
        return (type(self._model).loss, self._model) if self._had is None else (self._had,)

    def __reduce__(self) -> Any:
        """A copy of the model has its own loss."""
        return functools.partial, self._own

    def take_off(self) -> None:
        del vars(self._model)['loss']
        if self._had is not None:
            vars(self._model)['loss'] = self._had
