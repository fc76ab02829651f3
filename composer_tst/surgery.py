"""The Composer model for a superposed microbatch: its call, its loss and its microbatch size.

The microbatch stays plain for all others. It is folded for the model's call alone. The loss is the multi-hot
cross-entropy. After the backward pass, the model is as it was.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger
from composer.models import HuggingFaceModel
from torch import nn

from composer_tst.compatibility import is_known, logits_of, takes, unwrapped
from composer_tst.ops.cross_entropy import multi_hot_cross_entropy
from composer_tst.ops.fold import bag_rows, bag_targets, extra_values
from composer_tst.ops.superposed import restore, superposed
from composer_tst.ops.watch import CallStandIn
from composer_tst.settings import Settings

log = logging.getLogger(__name__)

# `superposed` asks of a folded batch that it has targets. Those of a microbatch are made when its loss is computed.
_NO_TARGETS = torch.empty(0, 0, 0)


def restore_model(model: nn.Module) -> None:
    """Leave a model as it was, also where a run that ended in the middle of a pass left it changed."""
    restore(model)
    model = unwrapped(model)
    loss = vars(model).get('loss')
    if isinstance(loss, _Loss):
        loss.take_off()


class _FoldAtCall(CallStandIn):
    """Folds the microbatch when the model is called with it. Calls with other batches go through as they are."""

    def __init__(self, state: State, fold: Callable[[State], dict[str, Any]]):
        super().__init__(state.model)
        self._state, self._fold = state, fold

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = [*args, *kwargs.values()][0] if args or kwargs else None
        if batch is None or batch is not self._state.batch:
            return self.call_on(*args, **kwargs)
        self.take_off()
        try:
            return self.model(self._fold(self._state))
        finally:
            self.put_on()


class Microbatches:
    """Fold each microbatch when the model is called with it, and undo that after the backward pass.

    A method named as an event handles it.

    Args:
        state: The Trainer's.
        settings: How bags are made and weighed.
    """

    def __init__(self, state: State, settings: Settings):
        restore_model(state.model)
        self._state = state
        self._settings = settings
        self._model = unwrapped(state.model)
        self._name = type(self._model).__name__
        self._bag_size = 0
        self._weights: torch.Tensor | None = None
        self._full = self._some_padding = False
        self._still_full: list[torch.Tensor] = []
        self._router_losses: list[torch.Tensor] = []
        self._batch: Any = None
        self._call: _FoldAtCall | None = None
        self._pass: superposed | None = None
        self._own_loss: Any = None

    def enter_phase(self, bag_size: int) -> None:
        """Take up another bag size."""
        self._bag_size = bag_size
        self._weights = None if self._settings.weighting == 'uniform' else self._settings.weights(bag_size)

    def begin_batch(self, full: bool) -> None:
        """Note, before a batch is moved to the device, whether all of its tokens are attended."""
        self._full, self._batch = full, None

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """If an earlier try at this batch has failed, undo what it left: Composer tries smaller microbatches.

        What is the batch at this event, Composer takes for the whole one.
        """
        if self._batch is not None:
            self.restore()
            state.batch = self._batch
        self._batch = state.batch
        self._router_losses.clear()
        self._still_full.clear()

    def before_forward(self, state: State, logger: Logger) -> None:
        """Have the model fold the microbatch when it is called with it."""
        self._call = _FoldAtCall(state, self._fold)

    def _fold(self, state: State) -> dict[str, Any]:
        if self._pass is not None:  # a callback has called the model, and may have changed the batch since
            self._pass.restore()
        extra_values(state.batch, takes=takes(self._model))  # refuses what was added since AFTER_DATALOADER
        self._some_padding = self._padded(state.batch)
        return self.begin(state, bag_rows(state.batch, self._bag_size, self._settings.superpose, self._some_padding))

    def begin(self, state: State, folded: Mapping[str, Any]) -> dict[str, Any]:
        """Give the model's embedding the bags of a folded microbatch; return what the model is to read."""
        self._pass = superposed(state.model, {**folded, 'labels': _NO_TARGETS})
        inputs = self._pass.__enter__()
        labels = state.batch.get('labels')
        # A HuggingFaceModel that is given labels computes a loss of its own.
        if labels is not None and not isinstance(self._model, HuggingFaceModel):
            self._pass.follow_labels(labels)
            inputs['labels'] = labels
        return inputs

    def _padded(self, batch: Mapping[str, Any]) -> bool:
        mask = batch.get('attention_mask')
        if mask is None:
            return False
        if mask.device.type == 'cpu':
            return not bool(mask.all())
        if self._full:
            # To read it now would wait for the device. `end_batch` reads it.
            self._still_full.append(mask.all())
        return not self._full

    def after_forward(self, state: State, logger: Logger) -> None:
        """Give the model's call back.

        Raises:
            ValueError: If the model was called with another batch.
        """
        if self._call is not None:
            self._call.take_off()
        if self._pass is None:
            raise ValueError(
                f'{self._name} was not called with the microbatch of BEFORE_FORWARD: set state.model before FIT_START.'
            )

    def before_loss(self, state: State, logger: Logger) -> None:
        """Have the model's loss of ``state.outputs`` be the multi-hot cross-entropy, until :meth:`after_loss`."""
        own = vars(self._model).get('loss', type(self._model).loss)
        if own is not self._own_loss and not is_known(own):
            self._own_loss = own
            log.warning(
                f'The {self._name} has a loss of its own: superposed steps train on the multi-hot cross-entropy '
                'instead of it, and recovery trains on it.'
            )
        vars(self._model)['loss'] = _Loss(self.loss, self._model, state)

    def after_loss(self, state: State, logger: Logger) -> None:
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

    def after_backward(self, state: State, logger: Logger) -> None:
        """Leave the model as it was."""
        assert self._pass is not None
        self._pass.__exit__(None, None, None)
        self._pass = None

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
        losses = self._router_losses
        return {'superposition/router_loss': torch.stack(losses).mean()} if losses else {}

    def restore(self) -> None:
        """Leave the model as it was, wherever a pass has ended."""
        self._pass = None
        restore_model(self._state.model)

    def loss(self, outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """Multi-hot cross-entropy of logits ``(B, P, V)`` and the targets ``(B, P, s)``, and any router loss: a scalar.

        It is one tensor, for llm-foundry's KillLossSpike.

        Args:
            outputs: What the model's forward has returned.
            batch: The plain microbatch, with labels ``(B, P * s)`` as they are now.

        Raises:
            ValueError: If the logits are not one for each position, or the batch has no labels of tokens, or values
                that cannot be folded.
        """
        logits = logits_of(self._model, outputs)
        targets = self._targets(batch).to(logits.device)
        if logits.shape[:-1] != targets.shape[:2]:
            raise ValueError(
                f'{self._name} returns logits of shape {tuple(logits.shape)} for bags of shape '
                f'{tuple(targets.shape)}: have its forward return logits (B, P, V), one for each position.'
            )
        if self._weights is not None:
            # Copied to a GPU once: at every loss, the copy would wait for it.
            self._weights = self._weights.to(logits.device)
        mce = multi_hot_cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), self._weights)
        aux_loss = outputs.get('aux_loss') if isinstance(outputs, Mapping) else None
        weight = getattr(getattr(self._model, 'config', None), 'router_aux_loss_coef', None)
        if aux_loss is None or weight is None:
            return mce
        router = weight * aux_loss
        self._router_losses.append(router.detach())
        return mce + router

    def _targets(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The targets ``(B, P, s)`` of a microbatch, of its labels as they are now."""
        if 'labels' not in batch:
            raise ValueError(f'The batch has no labels for the loss (it has {", ".join(batch)}): leave them in it.')
        extra_values(batch, takes=takes(self._model))  # refuses what was added since the forward pass
        labels, shape = batch['labels'], batch['input_ids'].shape
        if labels.shape != shape or labels.is_floating_point():
            raise ValueError(
                f'labels are {labels.dtype} of shape {tuple(labels.shape)} for the loss: leave them one integer for '
                f'each token, {tuple(shape)}.'
            )
        mask = batch.get('attention_mask') if self._some_padding else None
        return bag_targets(labels, mask, self._bag_size, self._settings.superpose)


class _Loss:
    """The loss on a model's instance while a Trainer computes one."""

    def __init__(self, loss: Callable[[Any, Any], torch.Tensor], model: Any, state: State):
        self._loss = loss
        self._model = model
        self._state = state
        self._had = vars(model).get('loss')
        self.called = False

    def __call__(self, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if outputs is self._state.outputs:
            self.called = True
            return self._loss(outputs, self._state.batch)
        # A callback calls it, or another Trainer after a fit that failed here.
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


def put_train_metrics_aside(state: State) -> Callable[[], None]:
    """Have no train metrics: a next-token metric has nothing to measure in a superposed step.

    Returns:
        Callable: What gives them back, unless others were set meanwhile.
    """
    metrics, state.train_metrics = state.train_metrics, {}

    def restore() -> None:
        if not state.train_metrics:
            state.train_metrics = metrics

    return restore


class MicrobatchSize:
    """Scale the microbatch size, where rows are shorter, so that it has as many positions as in plain training."""

    def __init__(self, state: State):
        self._state = state
        self._plain = self._scaled = state.device_train_microbatch_size
        self._scale = 1

    @property
    def plain(self) -> Any:
        """The size in plain training, None if Composer does not split batches."""
        size = self._state.device_train_microbatch_size
        if size is None or self._plain is None:
            return None
        if size == self._scaled:
            return self._plain
        # Composer has found the rows that fit a superposed step, or the user has set those of a plain one.
        return max(1, int(size // self._scale)) if self._state.auto_microbatching else size

    def scale(self, scale: int, most: int | None = None) -> None:
        """Have ``scale`` times the rows of a plain microbatch, at most ``most`` if that is given."""
        plain = self.plain
        if plain is None:
            return
        rows = plain * scale
        self._plain, self._scale = plain, scale
        self._scaled = rows if most is None else max(plain, min(rows, most))
        self._state.device_train_microbatch_size = self._scaled
