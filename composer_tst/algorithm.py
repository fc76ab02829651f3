"""Token superposition as a Composer algorithm: the settings, what happens at which event, and one fit of a Trainer."""

from __future__ import annotations

import copy
import logging
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from composer.core import Algorithm, Callback, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist

from composer_tst.compatibility import (
    check_algorithms,
    check_batch,
    check_callbacks,
    check_eval_batch,
    check_first_batch,
    check_model,
    forget_losses,
    put_first,
)
from composer_tst.loader import Drawing, row_length_of
from composer_tst.messages import (
    report_change,
    report_course,
    report_dropped,
    report_end,
    report_moved_ends,
    report_no_recovery,
    report_shares,
)
from composer_tst.ops.fold import lay_out
from composer_tst.schedule import Plan, Progress, Schedule, plan_steps, same
from composer_tst.settings import SETTINGS, Settings, Weighting, check_resumed_settings, parse_settings, refuse_unknown
from composer_tst.surgery import Microbatches, MicrobatchSize, put_train_metrics_aside, take_off, takes, unwrapped

log = logging.getLogger(__name__)

_OF_A_RUN = (
    Event.INIT,
    Event.AFTER_LOAD,
    Event.FIT_START,
    Event.EPOCH_START,
    Event.AFTER_DATALOADER,
    Event.BATCH_END,
    Event.EPOCH_END,
    Event.ITERATION_END,
    Event.FIT_END,
    Event.EVAL_BATCH_START,
)
_OF_A_SUPERPOSED_STEP = (
    Event.BEFORE_TRAIN_BATCH,
    Event.BEFORE_FORWARD,
    Event.AFTER_FORWARD,
    Event.BEFORE_LOSS,
    Event.AFTER_LOSS,
    Event.AFTER_BACKWARD,
)


class TokenSuperposition(Algorithm):
    """Pre-train on bags of tokens first, then on tokens (Peng, Gigant, Quesnelle, arXiv 2605.06546).

    In the superposition phase the model reads bags of ``bag_size`` contiguous tokens, each as the mean of their
    embeddings, and predicts the next bag with a multi-hot cross-entropy. A step has the shapes and the cost of a
    plain one and reads ``bag_size`` times the data, which is drawn from the train loader as it is configured. When
    the phase ends, ordinary next-token training goes on with the same weights, optimizer and schedule, and nothing
    of the algorithm is left in the model, the loss or the loader.

    Timestamps count data samples and tokens. Evaluation is plain next-token evaluation throughout. Train metrics
    are absent while superposed: the multi-hot cross-entropy is logged as ``loss/train/total``.

    Logs every step ``superposition/bag_size`` (1 in recovery), and, cumulative over all ranks,
    ``superposition/data_tokens`` (read, without the tails of rows that ``expand`` ``batch`` and ``none`` drop; with
    padded rows, the tails of rank 0 stand for those of every rank) and
    ``superposition/s_tokens`` (model positions, padding included). A mixture of
    experts also logs ``superposition/router_loss`` while superposed, the mean over this rank's microbatches. At the end
    of each epoch it logs ``superposition/samples_left_out``, cumulative too: the tails that did not fill a step.

    A resumed run goes on as if it had not stopped. Settings that concern only phases to come may differ from the
    checkpoint's, and a share of the duration (``0.3dur``) is one of the duration as it now is; but a phase that has
    ended never begins again, unless the clock does (``reset_time``).

    All that belongs to a run is of the Trainer: in a second one, and when it is copied, the algorithm starts clean.

    ``device_train_microbatch_size`` keeps its meaning: where rows become shorter (``expand`` ``batch`` or ``none``), a
    microbatch has ``bag_size`` times as many of them.

    Args:
        bag_size: Tokens in a bag, ``s``, an integer of at least 2.
        duration: When superposition ends, as any Composer Time. A share (``0.3dur``) is one of steps if
            ``max_duration`` is in batches or epochs, and one of tokens or samples if it is in those.
        superpose: ``both`` sides, or the ``input`` only (predict the first token of the next bag), or the
            ``output`` only (single tokens predict the next ``s``; needs ``expand: none``).
        expand: Where the ``s``-fold data goes: ``sequence`` (joins ``s`` rows into one), ``batch`` (more, shorter
            rows), or ``none`` (no more data: cheaper steps).
        weighting: Weights of a bag's targets: ``uniform``, ``power_law``, ``exponential``, ``first``, or ``s``
            numbers.
        phases: Instead of ``bag_size`` and ``duration``, several phases from coarse to fine, each a mapping
            ``{bag_size, until}``.

    Raises:
        ValueError: On a setting that cannot be followed; before training wherever it can be known then.

    Example:
        .. code-block:: python

            trainer = Trainer(..., algorithms=[TokenSuperposition(bag_size=6, duration='0.3dur')])
    """

    def __init__(
        self,
        bag_size: int | None = None,
        duration: str | Time | None = None,
        superpose: str = 'both',
        expand: str = 'sequence',
        weighting: Weighting = 'uniform',
        phases: Sequence[Mapping[str, Any]] | None = None,
        **unknown: Any,
    ):
        refuse_unknown('token_superposition', unknown, SETTINGS)
        self.settings = parse_settings(bag_size, duration, superpose, expand, weighting, phases)
        self._of = _Trainer()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the settings, and no Trainer."""
        return {**vars(self), '_of': _Trainer()}

    def __repr__(self) -> str:
        """The settings."""
        settings = ', '.join(f'{name}={value!r}' for name, value in self.settings.as_dict().items())
        return f'{type(self).__name__}({settings})'

    @property
    def schedule(self) -> Schedule:
        """The phases, and which of them have ended."""
        return Schedule(self.settings, self._of.progress)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, in plain Python types."""
        return {**super().state_dict(), 'settings': self.settings.as_dict(), **self._of.progress.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where a checkpoint left off; the settings are compared once all of it is loaded."""
        self._of.progress = Progress.from_state_dict(state)
        self._of.saved_settings = state['settings']

    def match(self, event: Event, state: State | None = None) -> bool:
        """Whether to run at this event."""
        del state
        if not isinstance(self, TokenSuperposition):  # Composer calls the class where it was given for an instance
            raise ValueError(
                'algorithms has the class TokenSuperposition: give an instance, TokenSuperposition(bag_size=6, '
                "duration='0.3dur')."
            )
        superposed = self._of.run is not None and self._of.run.superposed
        return event in _OF_A_RUN or (superposed and event in _OF_A_SUPERPOSED_STEP)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Check, superpose, fold, count, or step back, as the event asks."""
        if event == Event.INIT:
            _join(self, state)
        elif event == Event.AFTER_LOAD:
            self._of.max_duration = state.max_duration
            self._compare_settings(state)
        elif event == Event.FIT_START:
            self._start(state)
        elif event == Event.EVAL_BATCH_START:
            check_eval_batch(state.batch, state.model)
        else:
            assert self._of.run is not None
            self._go_on(self._of.run, event, state, logger)

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Refuse, with a ValueError, to be a callback: Composer calls this of callbacks alone."""
        raise ValueError('token_superposition is in callbacks: it is an algorithm, give it in algorithms.')

    def _go_on(self, run: Run, event: Event, state: State, logger: Logger) -> None:
        if event == Event.EPOCH_START:
            run.begin_epoch()
        elif event == Event.AFTER_DATALOADER:
            self._of.has_drawn = True
            run.lay_out()
        elif event == Event.BEFORE_TRAIN_BATCH:
            run.microbatches.begin_try(state)
        elif event == Event.BEFORE_FORWARD:
            run.microbatches.before_forward(state)
        elif event == Event.AFTER_FORWARD:
            run.microbatches.after_forward()
        elif event == Event.BEFORE_LOSS:
            run.microbatches.before_loss(state)
        elif event == Event.AFTER_LOSS:
            run.microbatches.after_loss()
        elif event == Event.AFTER_BACKWARD:
            run.microbatches.after_backward()
        elif event == Event.BATCH_END:
            run.end_step(logger)
        elif event == Event.EPOCH_END:
            self._of.has_drawn = True
            run.end_epoch(logger)
        elif event == Event.ITERATION_END:
            run.end_iteration()
        elif event == Event.FIT_END:
            if run.superposed:
                report_no_recovery(run.schedule, state.timestamp)
            report_end(run.schedule.progress, state.timestamp)
            run.close()

    def _compare_settings(self, state: State) -> None:
        """Refuse a checkpoint that was trained with other settings."""
        saved, self._of.saved_settings = self._of.saved_settings, None
        batch = int(state.timestamp.batch)
        if saved is None or batch == 0:
            return
        begun = self.schedule.phases_begun(batch)
        under_way = begun > len(self._of.progress.ended)
        changes = check_resumed_settings(saved, self.settings.as_dict(), begun, under_way)
        if changes:
            log.info('Superposition resumes with other settings, where they change nothing of the past: %s.', changes)
            self._of.progress.max_duration = None

    def _start(self, state: State) -> None:
        """Begin a fit; what one that failed has left changed is put right first."""
        if self._of.state is None:  # added to a Trainer that was made before
            _join(self, state)
            self._of.max_duration = state.max_duration
        self._of.close()
        if int(state.timestamp.batch) == 0:  # the clock begins, or begins again
            self._of.progress = Progress()
        self._of.run = Run(self.settings, self._of.progress, state)
        self._of.run.start(whole=same(self._of.max_duration, state.max_duration), fresh=not self._of.has_drawn)


def _join(algorithm: TokenSuperposition, state: State) -> None:
    """Become part of a Trainer; where it is another's already, a copy does."""
    # Composer sets its own logger's level by the trainer's python_log_level: follow it.
    if level := logging.getLogger('composer').level:
        logging.getLogger('composer_tst').setLevel(level)
    check_algorithms(state.algorithms, TokenSuperposition)
    check_callbacks(state.callbacks)
    take_off(state.model)
    check_model(state.model)
    put_first(state, algorithm)
    ours = algorithm if algorithm._of.state is None else copy.copy(algorithm)
    state.algorithms[0] = ours
    ours._of.state = weakref.ref(state)
    state.callbacks.append(_UndoAtClose(ours._of))


@dataclass
class _Trainer:
    """What an algorithm has of the Trainer that it is part of.

    Attributes:
        state: The Trainer's, None as long as there is none.
        max_duration: That of the Trainer, None if each fit has its own.
        progress: How far training has come.
        saved_settings: Those of a checkpoint that is being loaded.
        run: The fit under way, or the last.
        has_drawn: Whether data were drawn in this Trainer.
    """

    state: weakref.ref[State] | None = None
    max_duration: Time | None = None
    progress: Progress = field(default_factory=Progress)
    saved_settings: Mapping[str, Any] | None = None
    run: Run | None = None
    has_drawn: bool = False

    def close(self) -> None:
        """Undo what a fit has changed, if it has not done so itself."""
        if self.run is not None:
            self.run.close()
            self.run = None


class _UndoAtClose(Callback):
    """Composer closes callbacks, also after a fit that has failed, but not algorithms."""

    def __init__(self, trainer: _Trainer):
        self._trainer = trainer

    def close(self, state: State, logger: Logger) -> None:
        """Undo what a fit has left changed."""
        del state, logger
        if not sys.is_finalizing():
            self._trainer.close()


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
        self._first_batch_checked = False
        self._announced = False
        self._whole = False
        self._plan: Plan | None = None
        self._losses_are_of_other_bags = False

    @property
    def superposed(self) -> bool:
        """Whether the coming step is superposed."""
        return not self.schedule.finished

    @property
    def _draws(self) -> int:
        """The loader batches that the coming step draws."""
        return self._settings.draws(self.schedule.bag_size) if self.superposed else 1

    def _draws_ahead(self, ahead: int) -> int:
        """The loader batches of the step that is as many after the coming one; phases end at steps, as far as known."""
        step, ended = int(self._state.timestamp.batch) + ahead, len(self._progress.ended)
        for phase, end in zip(self.schedule.phases[ended:], self._progress.ends[ended:], strict=True):
            if end.unit != TimeUnit.BATCH or step < end.value:
                return self._settings.draws(phase.bag_size)
        return 1

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
        joins_rows = self._settings.expand == 'sequence'
        self._drawing = Drawing(state, progress, joins_rows, fresh, self._undo, self._draws_ahead)
        self._whole = whole
        if self.superposed:
            self._plan = place_phases(self.schedule, self._settings, self._drawing, state, whole)
        if self.superposed:
            self._superpose()
        self._drawing.begin(self._draws)

    def _superpose(self) -> None:
        """Change the model, the train metrics and the microbatch size, until recovery."""
        state = self._state
        self.microbatches = Microbatches(state, self._settings)
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
        ends = self._progress.ends[len(self._progress.ended) :]
        self._drawing.take(state.batch, self.superposed, ends)
        if self.superposed and not self._announced:
            self._announced = True
            self._drawing.row_length = row_length_of(state.batch)
            plan = announce(self.schedule, self._settings, self._drawing, state)
            if self._plan is None:
                self.schedule.check(state.timestamp, plan, self._whole)
        if self._losses_are_of_other_bags:  # and only now are all of them there: callbacks come after algorithms
            self._losses_are_of_other_bags = False
            forget_losses(state.callbacks)
        if not self.superposed:
            self.close()
            ids = state.batch.get('input_ids') if isinstance(state.batch, Mapping) else None
            self._positions, self._dropped = (ids.numel() if isinstance(ids, torch.Tensor) else 0), 0
            return
        settings, bag_size = self._settings, self.schedule.bag_size
        # Pinned as the loader's own batches were: from other memory, each copy to the GPU would wait for it.
        pin = state.device.name == 'gpu' and bool(getattr(state.dataloader, 'pin_memory', False))
        layout = lay_out(
            state.batch,
            bag_size,
            settings.expand,
            settings.superpose,
            settings.weights(bag_size),
            pin,
            takes(unwrapped(state.model)),
        )
        check_batch(layout.batch, state.batch, bag_size, settings.superpose, state.model)
        if not self._first_batch_checked:
            self._first_batch_checked = True
            check_first_batch(state)
        if layout.dropped and not self._warned_of_tail:
            self._warned_of_tail = True
            report_dropped(layout.dropped, state.batch['input_ids'].shape[1], bag_size, settings.expand)
        mask = layout.batch.get('attention_mask')
        self.microbatches.begin_batch(full=mask is not None and bool(mask.all()))
        state.batch, self._positions, self._dropped = layout

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
        report_change(before, self.schedule.bag_size, self._state.timestamp, self._progress.dropped)

    def close(self) -> None:
        """Undo what is changed, wherever the fit has ended; once."""
        self._undo.close()
        self._undo_later.close()


def place_phases(schedule: Schedule, settings: Settings, drawing: Drawing, state: State, whole: bool) -> Plan | None:
    """Fix when the phases to come end, and begin with the one whose time it is.

    The moments that a checkpoint has stand, as long as the length of training does: a resumed run is the run that did
    not stop, also where it reads other amounts than were planned.

    Args:
        schedule: The phases.
        settings: What the user set.
        drawing: Where the data come from.
        state: The Trainer's.
        whole: Whether training ends where this fit does, as far as is known.

    Returns:
        Plan | None: The steps of the phases to come, None if they are not known before there is a batch.

    Raises:
        ValueError: If a phase has no steps, or there is no recovery, for certain.
    """
    progress, max_duration = schedule.progress, state.max_duration
    assert max_duration is not None
    plan = expect(schedule, settings, drawing, state)
    if not same(progress.max_duration, max_duration):
        before = list(progress.ends)
        schedule.resolve(max_duration, plan)
        report_moved_ends(schedule, before)
    schedule.check(state.timestamp, plan, whole)
    bag_size = schedule.bag_size
    if schedule.advance(state.timestamp):
        report_change(bag_size, schedule.bag_size, state.timestamp, progress.dropped)
    return plan


def expect(schedule: Schedule, settings: Settings, drawing: Drawing, state: State) -> Plan | None:
    """The steps of the phases to come, as far as is known what a batch holds."""
    assert state.max_duration is not None
    phases = schedule.phases[len(schedule.progress.ended) :]
    draws = [settings.draws(phase.bag_size) for phase in phases]
    drawing.check(max(draws))
    return plan_steps(phases, draws, state.max_duration, *drawing.data())


def announce(schedule: Schedule, settings: Settings, drawing: Drawing, state: State) -> Plan | None:
    """Say what the run is going to do, once its first batch shows what a batch holds."""
    plan = expect(schedule, settings, drawing, state)
    report_shares(schedule, plan, draws_more=settings.expand != 'none')
    report_course(schedule, settings, plan, drawing.data()[0], state)
    return plan
