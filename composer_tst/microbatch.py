"""What a superposed microbatch goes through, from before its forward pass to after its backward pass."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from composer.core import State, get_precision_context
from composer.models import ComposerModel

from composer_tst.attach import Attachment
from composer_tst.ops.fold import bag_rows, check_keys
from composer_tst.settings import Settings


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
