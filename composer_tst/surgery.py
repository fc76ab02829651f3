"""The Composer model for a superposed microbatch: its batch, its lookup, its loss and its microbatch size.

:meth:`Attachment.begin` is given a folded microbatch and gives what the model is to read: ids ``(B, P)`` and no labels,
so that any architecture runs as it does on plain tokens and computes no loss of its own. Until :meth:`Attachment.end`,
after the backward pass, one thing is changed on the model, which is no parameter, buffer or state-dict key: the lookup
of the input embedding gives the mean embedding of the bag that each of these ids stands for. Whatever else the
embedding does (Gemma's scale, MPT's tied output head) stays: only ``nn.Embedding``'s own lookup is replaced.

The bags are for the ids that were handed over, told by their storage, and for nothing else: any other ids are looked up
as ever, in evaluation, by a callback, or in a backward pass that runs a part of the model again.
"""

import copyreg
import functools
import logging
import types
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from composer.core import State, get_precision_context
from composer.models import ComposerModel, HuggingFaceModel
from torch import nn
from torch.distributed.tensor import DTensor

from composer_tst.ops.cross_entropy import multi_hot_cross_entropy
from composer_tst.ops.embedding import bag_embedding
from composer_tst.ops.fold import bag_rows, check_keys, is_plain
from composer_tst.settings import Settings

log = logging.getLogger(__name__)


def find_embedding(model: ComposerModel) -> nn.Embedding:
    """The module that turns a model's token ids into vectors.

    Raises:
        ValueError: If the model has no ``get_input_embeddings`` and not exactly one ``nn.Embedding``, or what
            it returns is no ``nn.Embedding``.
    """
    name = type(model).__name__
    owners: tuple[Any, ...] = (model, getattr(model, 'model', None))
    for owner in owners:
        if hasattr(owner, 'get_input_embeddings'):
            found = owner.get_input_embeddings()
            break
    else:
        found = model
    # FSDP and activation checkpointing wrap modules, so look inside what was found.
    embeddings = [module for module in found.modules() if isinstance(module, nn.Embedding)]
    if len(embeddings) != 1:
        raise ValueError(
            f'{name} has {len(embeddings)} nn.Embedding modules where its input embedding is looked for: define '
            'get_input_embeddings() on it to return the nn.Embedding that token ids go through.'
        )
    return embeddings[0]


def with_lookup(cls: type[nn.Embedding], lookup: type[nn.Embedding]) -> type[nn.Embedding]:
    """The class ``cls`` with ``lookup`` between it and ``nn.Embedding``, where its ``super().forward`` looks."""
    return lookup if cls is nn.Embedding else types.new_class(cls.__name__, (cls, lookup))


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
        if isinstance(self.weight, DTensor):
            # FSDP has made the weight whole by now.
            raise ValueError(
                'The input embedding is divided by tensor parallelism, and superposition needs it whole: leave it out '
                'of the layer plan.'
            )
        at = _places(input, self.handed_over)
        if at is None:
            self.missed = True
            return super().forward(input)
        self.found = True
        if torch.compiler.is_compiling():
            self.compiled = True
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
    if torch.compiler.is_compiling():  # which knows no storages: `Attachment.try_out` is without one
        return slice(None) if input.numel() == handed_over.numel() else None
    if input.untyped_storage().data_ptr() != handed_over.untyped_storage().data_ptr():
        # A backward pass that runs a part of the model again may have kept a copy of the ids, as offloading does.
        again = torch._C._current_graph_task_id() != -1 and input.numel() == handed_over.numel()
        return slice(None) if again and torch.equal(input.flatten(), handed_over.flatten()) else None
    if input.is_contiguous() and input.numel() == handed_over.numel():
        return slice(None)
    every = torch.arange(handed_over.numel(), device=input.device)
    return every.as_strided(input.size(), input.stride(), input.storage_offset()).flatten()


def change_lookup(
    embedding: nn.Embedding, bags: tuple[torch.Tensor, torch.Tensor | None], handed_over: torch.Tensor
) -> None:
    """Have an embedding look bags up for the ids handed over, until :func:`give_lookup_back`.

    Args:
        embedding: Any ``nn.Embedding``.
        bags: The token ids ``(B * P, s)``, and the attended tokens of the same shape or None.
        handed_over: The ids ``(B, P)`` that stand for them, contiguous and of a storage of their own.
    """
    if not isinstance(embedding, BagLookup):
        plain_class = type(embedding)
        _change_class(embedding, _LOOKUP_CLASSES.setdefault(plain_class, with_lookup(plain_class, BagLookup)))
        cast(BagLookup, embedding).plain_class = plain_class
    lookup = cast(BagLookup, embedding)
    lookup.bags, lookup.handed_over = bags, handed_over
    lookup.found = lookup.missed = lookup.compiled = False


def give_lookup_back(embedding: nn.Embedding) -> None:
    """Leave an embedding as it was; nothing, where it is."""
    if isinstance(embedding, BagLookup):
        plain_class = embedding.plain_class
        for name in BagLookup.__annotations__:
            vars(embedding).pop(name, None)
        _change_class(embedding, plain_class)


def _change_class(embedding: Any, cls: type) -> None:
    embedding.__class__ = cls


# One class for each, so that a compiler compiles for it once.
_LOOKUP_CLASSES: dict[type[nn.Embedding], type[nn.Embedding]] = {}


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
        model: A model that :func:`~composer_tst.surgery.check_model` accepts, not wrapped.

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


class Microbatches:
    """Folds each microbatch just before the model gets it, and has the model train on bags.

    All before that (transforms, splitting, counting, callbacks) handles plain batches.

    Args:
        model: The model, not wrapped.
        settings: How bags are made and weighed.
    """

    def __init__(self, model: ComposerModel, settings: Settings):
        self._settings = settings
        self._attachment = Attachment(model)
        self._bag_size = 0
        self._full = False
        self._still_full: list[torch.Tensor] = []
        self._batch: Any = None
        self._plain: Any = None
        self._folded: dict[str, Any] = {}

    def enter_phase(self, bag_size: int) -> None:
        """Take up another bag size."""
        self._bag_size = bag_size
        uniform = self._settings.weighting == 'uniform'
        self._attachment.weights = None if uniform else self._settings.weights(bag_size)

    def begin_batch(self, full: bool) -> None:
        """Note, before a batch is moved to the device, whether all of its tokens are attended."""
        self._full, self._batch = full, None

    def begin_try(self, state: State) -> None:
        """Undo what a try at this batch that failed, anywhere, has left: Composer tries smaller microbatches."""
        if self._batch is not None:
            self._attachment.remove()
            state.batch = self._batch
        self._batch = state.batch
        self._attachment.router_losses.clear()
        self._still_full.clear()

    def before_forward(self, state: State) -> None:
        """Give the model bags."""
        self._plain = state.batch
        check_keys(state.batch)
        self._folded = bag_rows(state.batch, self._bag_size, self._settings.superpose, self._padded(state.batch))
        state.batch = self._attachment.begin(self._folded)

    def _padded(self, batch: Mapping[str, Any]) -> bool:
        mask = batch.get('attention_mask')
        if mask is None:
            return False
        if mask.device.type == 'cpu':
            return not bool(mask.all())
        if self._full:
            # To read it now would wait for the device: it is read at the end of the step.
            self._still_full.append(mask.all())
        return not self._full

    def after_forward(self, state: State) -> None:
        """Give the plain batch back."""
        self._attachment.check_forward()
        state.batch = self._plain

    def before_loss(self, state: State) -> None:
        """Have the loss be that of bags."""
        self._attachment.begin_loss(state)

    def after_loss(self) -> None:
        """Give the model's loss back."""
        self._attachment.end_loss()

    def after_backward(self, state: State) -> None:
        """Leave the model as it was."""
        with get_precision_context(state.precision, state.precision_config):
            self._attachment.try_out(state.model, self._folded)
        self._attachment.end()
        self._plain, self._folded = None, {}

    def end_batch(self) -> dict[str, Any]:
        """What the microbatches of a step have to log, once the device is done with them.

        Raises:
            ValueError: If a transform has changed which tokens are attended, unseen.
        """
        if not all(self._still_full):
            raise ValueError(
                'A microbatch_transforms has changed attention_mask on the device, after superposition took all tokens '
                'for attended: change it in batch_transforms.'
            )
        self._batch = None
        losses = self._attachment.router_losses
        return {'superposition/router_loss': torch.stack(losses).mean()} if losses else {}

    def remove(self) -> None:
        """Leave the model as it was, wherever a pass has ended."""
        self._attachment.remove()


def put_train_metrics_aside(state: State) -> Callable[[], None]:
    """Have no train metrics: a next-token metric has nothing to measure in a superposed step.

    Returns:
        Callable: What gives them back, unless others were set meanwhile.
    """
    metrics, state.train_metrics = state.train_metrics, {}

    def give_back() -> None:
        if not state.train_metrics:
            state.train_metrics = metrics

    return give_back


class MicrobatchSize:
    """Lets a microbatch have as many positions as in plain training, where rows have become shorter."""

    def __init__(self, state: State):
        self._state = state
        self._plain = self._scaled = state.device_train_microbatch_size
        self._scale = 1

    def scale(self, scale: int) -> None:
        """Have ``scale`` times the rows of a plain microbatch."""
        size = self._state.device_train_microbatch_size
        if size is None or self._plain is None:
            return
        if size != self._scaled:  # Composer has found meanwhile what fits, or the user has set another for a plain step
            self._plain = max(1, int(size // self._scale)) if self._state.auto_microbatching else size
        self._scale, self._scaled = scale, self._plain * scale
        self._state.device_train_microbatch_size = self._scaled
