"""One fit of one Trainer: what is changed for it, what is counted, and what undoes the changes."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from composer_tst.compatibility import check_batch, forget_losses
from composer_tst.loader import Drawing
from composer_tst.messages import report_change, report_dropped
from composer_tst.ops.fold import lay_out
from composer_tst.placement import place_phases
from composer_tst.schedule import Progress, Schedule
from composer_tst.settings import Settings
from composer_tst.surgery import Microbatches, MicrobatchSize, put_train_metrics_aside


class Run:
    """One fit. Every change to the model, the loader or the state is undone by :meth:`close`.

    Args:
        settings: What the user set.
        progress: How far training has come; kept up to date at the end of each step and epoch.
        state: The Trainer's.

    Attributes:
        schedule: The phases.
        microbatches: What superposed microbatches go through.
    """

    microbatches: Microbatches

    def __init__(self, settings: Settings, progress: Progress, state: State):
        self.schedule = Schedule(settings, progress)
        self._settings = settings
        self._progress = progress
        self._state = state
        self._undo = ExitStack()
        self._undo_later = ExitStack()
        self._positions = 0
        self._dropped = 0
        self._warned_of_tail = False
        self._losses_are_of_other_bags = False

    @property
    def superposed(self) -> bool:
        """Whether the coming step is superposed."""
        return not self.schedule.finished

    @property
    def _draws(self) -> int:
        """The loader batches that the coming step draws."""
        return self._settings.draws(self.schedule.bag_size) if self.superposed else 1

    def start(self, whole: bool, fresh: bool) -> None:
        """Begin, at FIT_START.

        Args:
            whole: Whether training ends where this fit does, as far as is known.
            fresh: Whether this Trainer has not drawn yet: a dataset's state from a checkpoint is still to be taken up.

        Raises:
            ValueError: If the run cannot be superposed as set.
        """
        state, progress = self._state, self._progress
        if progress.began is None:
            progress.began, progress.s_tokens = int(state.timestamp.batch), int(state.timestamp.token)
        self._drawing = Drawing(state, progress, self._settings.expand == 'sequence', fresh, self._undo)
        if self.superposed:
            place_phases(self.schedule, self._settings, self._drawing, state, whole)
        if self.superposed:
            self._superpose()
        self._drawing.begin(self._draws)

    def _superpose(self) -> None:
        """Change the model, the train metrics and the microbatch size, until recovery."""
        state = self._state
        model: Any = state.model
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        self.microbatches = Microbatches(model, self._settings)
        self._undo.callback(self.microbatches.remove)
        # Composer computes them at the end of an epoch, also one that superposition ends with.
        self._undo_later.callback(put_train_metrics_aside(state))
        self._microbatch_size = MicrobatchSize(state)
        self._undo.callback(self._microbatch_size.scale, 1)
        self._enter_phase()

    def _enter_phase(self) -> None:
        bag_size = self.schedule.bag_size
        self.microbatches.enter_phase(bag_size)
        self._microbatch_size.scale(self._settings.microbatch_scale(bag_size))
        self._drawing.set_draws(self._draws)

    def begin_epoch(self) -> None:
        """Draw from the loader there is now."""
        self._drawing.begin_epoch(self._draws)

    def lay_out(self) -> None:
        """Make the batch of a superposed step the rows that the model will see; one in recovery is left alone."""
        state = self._state
        self._drawing.check_step(self.superposed)
        if self._losses_are_of_other_bags:  # and only now are all of them there: callbacks come after algorithms
            self._losses_are_of_other_bags = False
            forget_losses(state.callbacks)
        if not self.superposed:
            self.close()
            ids = state.batch.get('input_ids') if isinstance(state.batch, Mapping) else None
            self._positions, self._dropped = (ids.numel() if isinstance(ids, torch.Tensor) else 0), 0
            return
        settings, bag_size = self._settings, self.schedule.bag_size
        layout = lay_out(state.batch, bag_size, settings.expand, settings.superpose, settings.weights(bag_size))
        check_batch(layout.batch, state.batch, bag_size, settings.superpose, state.model)
        if layout.dropped and not self._warned_of_tail:
            self._warned_of_tail = True
            report_dropped(layout.dropped, state.batch['input_ids'].shape[1], bag_size, settings.expand)
        mask = layout.batch.get('attention_mask')
        self.microbatches.begin_batch(full=mask is not None and bool(mask.all()))
        state.batch, self._positions, self._dropped = layout
        if state.device.name == 'gpu' and getattr(state.dataloader, 'pin_memory', False):
            # As the loader's own batches were: from other memory, each microbatch's copy to the GPU would wait for it.
            state.batch = {key: v.pin_memory() if torch.is_tensor(v) else v for key, v in state.batch.items()}

    def end_step(self, logger: Logger) -> None:
        """Count and log a step, and end a phase whose time has come."""
        state, progress, bag_size = self._state, self._progress, self.schedule.bag_size
        metrics: dict[str, Any] = {}
        if self.superposed:
            metrics = self.microbatches.end_batch()
            if self._settings.superpose != 'output':
                # SpeedMonitor counts the FLOPs of a batch by its rows and positions.
                state.batch = {**state.batch, 'input_ids': state.batch['input_ids'].unflatten(1, (-1, bag_size))}
        # Ranks draw equally many rows, in the last step of an epoch too.
        progress.s_tokens += self._positions * dist.get_world_size()
        progress.dropped += self._dropped * dist.get_world_size()
        self._drawing.count(steps=1)
        metrics |= {
            'superposition/bag_size': bag_size,
            'superposition/data_tokens': int(state.timestamp.token) - progress.dropped,
            'superposition/s_tokens': progress.s_tokens,
        }
        logger.log_metrics(metrics)
        self._advance()

    def end_epoch(self, logger: Logger) -> None:
        """Check that an epoch was whole, and end a phase whose time has come."""
        self._drawing.end_epoch(self.superposed, self._draws)
        logger.log_metrics({'superposition/samples_left_out': self._progress.left_out})
        self._advance()

    def end_iteration(self) -> None:
        """Begin another epoch, where an iteration ends in the middle of one."""
        self._drawing.end_iteration()

    def _advance(self) -> None:
        if not self.superposed:
            return
        before = self.schedule.bag_size
        if not self.schedule.advance(self._state.timestamp):
            return
        if self.superposed:
            self._enter_phase()
        else:
            self._undo.close()
            self._drawing.set_draws(1)
        self._losses_are_of_other_bags = True
        report_change(before, self.schedule.bag_size, self._state.timestamp)

    def close(self) -> None:
        """Undo what is changed, wherever the fit has ended; once."""
        self._undo.close()
        self._undo_later.close()
