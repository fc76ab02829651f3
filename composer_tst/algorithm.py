"""Token superposition as a Composer algorithm: the settings, what happens at which event, and one fit of a Trainer."""

from __future__ import annotations

import copy
import logging
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from composer.core import Algorithm, Callback, Event, State, Time
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from composer_tst.compatibility import (
    check_algorithms,
    check_batch,
    check_callbacks,
    check_eval_batch,
    check_first_batch,
    check_ignored,
    check_loader,
    check_model,
    forget_losses,
    takes,
    unwrapped,
)
from composer_tst.loader import TrainLoader
from composer_tst.messages import (
    last_line,
    report_change,
    report_dropped,
    report_moved_ends,
    report_no_recovery,
    report_plan,
    report_shares,
    say,
)
from composer_tst.ops.draw import ids_of
from composer_tst.ops.fold import is_full, lay_out
from composer_tst.schedule import Data, Plan, Progress, Schedule, check_epochs_end, later, same
from composer_tst.settings import SETTINGS, Settings, Weighting, check_resumed_settings, parse_settings, refuse_unknown
from composer_tst.surgery import Microbatches, MicrobatchSize, put_train_metrics_aside, restore_model

log = logging.getLogger(__name__)


class TokenSuperposition(Algorithm):
    """Pre-train on bags of tokens first, then on tokens (Peng, Gigant, Quesnelle, arXiv 2605.06546).

    In the superposition phase the model reads bags of ``bag_size`` contiguous tokens, each as the mean of their
    embeddings, and predicts the next bag with a multi-hot cross-entropy. A step has the shapes and the cost of a
    plain one and reads ``bag_size`` times the data, which is drawn from the train loader as it is configured. When
    the phase ends, ordinary next-token training goes on with the same weights, optimizer and schedule, and nothing
    of the algorithm is left in the model, the loss or the loader.

    Timestamps count data samples and tokens. Evaluation is plain next-token evaluation throughout. Train metrics
    are absent while superposed: the multi-hot cross-entropy is logged as ``loss/train/total``.

    Logs at every step, over all ranks:

    - ``superposition/bag_size``: 1 in recovery.
    - ``superposition/data_tokens``: tokens read so far. The ends of rows that ``expand`` ``batch`` and ``none`` drop
      are not among them, nor what another algorithm cuts off. Padding counts if Composer's ``time/token`` counts it.
      If not, the ends that rank 0 has dropped stand for those of every rank.
    - ``superposition/s_tokens``: model positions so far, padding included.
    - ``superposition/router_loss``: of a mixture of experts while superposed, the mean over this rank's microbatches.

    Logs at the end of each epoch ``superposition/samples_left_out``: samples so far that did not fill a step.

    A resumed run goes on as if it had not stopped. Phases that have not begun may have other settings than in the
    checkpoint. ``0.3dur`` is a share of ``max_duration`` as it now is. A phase that has ended does not begin again,
    except with ``reset_time``.

    Progress belongs to one Trainer. A second Trainer, and a copy of the algorithm, begin with none.

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
        self._run = _TrainingRun()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the settings, and no Trainer."""
        return {**vars(self), '_run': _TrainingRun()}

    def __repr__(self) -> str:
        """The settings."""
        settings = ', '.join(f'{name}={value!r}' for name, value in self.settings.as_dict().items())
        return f'{type(self).__name__}({settings})'

    @property
    def schedule(self) -> Schedule:
        """The phases, and which of them have ended."""
        return Schedule(self.settings, self._run.progress)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, in plain Python types."""
        return {**super().state_dict(), 'settings': self.settings.as_dict(), **self._run.progress.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where a checkpoint left off; the settings are compared once all of it is loaded."""
        self._run.progress = Progress.from_state_dict(state)
        self._run.saved_settings = state['settings']

    def match(self, event: Event, state: State | None = None) -> bool:
        """Whether there is something to do at this event."""
        if not isinstance(self, TokenSuperposition):  # Composer calls the class where it was given for an instance
            raise ValueError(
                'algorithms has the class TokenSuperposition: give an instance, TokenSuperposition(bag_size=6, '
                "duration='0.3dur')."
            )
        return self._at(event) is not None

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Call the handler of this event."""
        do = self._at(event)
        assert do is not None
        do(state, logger)

    def _at(self, event: Event) -> Callable[[State, Logger], None] | None:
        """The handler of an event: the method of its name, of the fit, its microbatches or the algorithm."""
        fit = self._run.fit
        for part in (fit, fit and fit.microbatches, self):
            if method := getattr(part, event.value, None):
                return method
        return None

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Refuse, with a ValueError, to be a callback: Composer calls this method on callbacks alone."""
        raise ValueError('token_superposition is in callbacks: it is an algorithm, give it in algorithms.')

    def init(self, state: State, logger: Logger) -> None:
        """Become part of a Trainer. A second Trainer gets a copy."""
        # Composer sets its own logger's level by the trainer's python_log_level: follow it.
        if level := logging.getLogger('composer').level:
            logging.getLogger('composer_tst').setLevel(level)
        check_algorithms(state.algorithms, TokenSuperposition)
        check_callbacks(state.callbacks)
        restore_model(state.model)
        check_model(unwrapped(state.model))
        ours = self if self._run.state is None else copy.copy(self)
        # Composer runs events named AFTER_ from last to first: we lay rows out after SeqLengthWarmup and Alibi.
        state.algorithms.remove(self)
        state.algorithms.insert(0, ours)
        ours._run.state = weakref.ref(state)
        state.callbacks.append(_Last(ours))

    def after_load(self, state: State, logger: Logger) -> None:
        """Refuse a checkpoint that was trained with other settings."""
        run, batch = self._run, int(state.timestamp.batch)
        run.max_duration = state.max_duration
        saved, run.saved_settings = run.saved_settings, None
        if saved is None or batch == 0:
            return
        begun = self.schedule.phases_begun(batch)
        changes = check_resumed_settings(saved, self.settings, begun, under_way=begun > len(run.progress.ended))
        if changes:
            log.info('Superposition resumes with other settings, where they change nothing of the past: %s.', changes)
            # FIT_START places the phases again.
            run.progress.max_duration, run.progress.ends = None, run.progress.ends[: len(self.settings.phases)]

    def fit_start(self, state: State, logger: Logger) -> None:
        """Begin a fit; what one that failed has left changed is put right first."""
        if self._run.state is None or self._run.state() is not state:  # added to a Trainer that was made before
            self.init(state, logger)
            ours: Any = state.algorithms[0]  # a copy, if this one is another Trainer's
            if ours is not self:
                ours.fit_start(state, logger)
                return
        self._run.close()
        state.callbacks.sort(key=lambda callback: isinstance(callback, _Last))
        if int(state.timestamp.batch) == 0:  # the clock begins, or begins again
            self._run.progress = Progress()
            if self._run.has_drawn:  # each fit then has its own length
                self._run.max_duration = None
        self._run.fit = Fit(self.settings, self._run, state)
        self._run.fit.start()

    def batch_start(self, state: State, logger: Logger) -> None:
        """Refuse, with a ValueError, a fit that has begun without the algorithm."""
        if self._run.fit is None:
            raise ValueError('token_superposition was added after FIT_START: add it before the Trainer fits.')

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        """Refuse an eval batch that Composer would fail on without saying why."""
        check_eval_batch(state.batch, unwrapped(state.model))


@dataclass
class _TrainingRun:
    """What an algorithm has of the Trainer that it is part of.

    Attributes:
        state: The Trainer's, None as long as there is none.
        max_duration: The Trainer's at AFTER_LOAD. None if each fit has its own: after ``reset_time``, or if
            superposition was added to a Trainer that was made before.
        progress: How far training has come.
        saved_settings: Those of a checkpoint that is being loaded.
        has_drawn: Whether this Trainer has drawn data.
        fit: The one under way.
    """

    state: weakref.ref[State] | None = None
    max_duration: Time | None = None
    progress: Progress = field(default_factory=Progress)
    saved_settings: Mapping[str, Any] | None = None
    has_drawn: bool = False
    fit: Fit | None = None

    def close(self) -> None:
        """Undo what a fit has changed, if it has not done so itself."""
        if self.fit is not None:
            self.fit.close()
            self.fit = None


class _Last(Callback):
    """What the algorithm does as a callback: Composer runs this one after all others, and closes it if a fit fails."""

    def __init__(self, algorithm: TokenSuperposition):
        self._algorithm = algorithm

    def fit_start(self, state: State, logger: Logger) -> None:
        """Prepare the loader for the rest of an epoch. Composer sends no EPOCH_START in the middle of one."""
        if int(state.timestamp.batch_in_epoch) > 0:
            self.epoch_start(state, logger)

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Prepare the loader, once all callbacks have set, wrapped or read it."""
        fit = self._algorithm._run.fit
        if fit is not None and self._algorithm in state.algorithms:
            fit.begin_epoch()

    def close(self, state: State, logger: Logger, at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        """Undo what a fit has left changed. At exit modules may be gone, ``sys`` among them."""
        if not at_exit():
            self._algorithm._run.close()


class Fit:
    """One fit of a Trainer. A method named as an event handles it. All that a fit changes, :meth:`close` puts back.

    Args:
        settings: What the user set.
        run: The algorithm's part in the Trainer; its progress is kept up to date at the end of each step and epoch.
        state: The Trainer's.

    Attributes:
        schedule: The phases.
        microbatches: What superposed microbatches go through; None in recovery.
    """

    def __init__(self, settings: Settings, run: _TrainingRun, state: State):
        assert state.max_duration is not None
        self.schedule = Schedule(settings, run.progress)
        self.microbatches: Microbatches | None = None
        self._run = run
        self._progress = run.progress
        self._state = state
        # Of several fits, the length of training is that of the Trainer.
        self._max_duration = later(run.max_duration, state.max_duration)
        self._trains_to_end = same(run.max_duration, state.max_duration)
        self._more_comes = run.max_duration is not None and not self._trains_to_end
        self._undo = ExitStack()
        self._at_next_batch = ExitStack()
        self._loader = TrainLoader(state, self.schedule, not run.has_drawn, self._undo)
        self._microbatch_size = MicrobatchSize(state)
        self._plan: Plan | None = None
        self._warned_of_tail = False
        self._ignored: Tensor | None = None  # tokens that the model's own loss leaves out, once it has been seen
        self._positions = self._dropped = 0
        # Tokens of the step on this rank, padding included: in the batch as it came, and as it was laid out.
        self._came = self._read = 0

    def start(self) -> None:
        """Begin, at FIT_START.

        Raises:
            ValueError: If the run cannot be superposed as set.
        """
        progress, now = self._progress, self._state.timestamp
        if progress.began is None:
            progress.began, progress.s_tokens = int(now.batch), int(now.token)
        if not self.schedule.finished:
            self._place_phases()
        if not self.schedule.finished:
            self._superpose()

    def _place_phases(self) -> None:
        """Fix when the phases to come end, and begin with the one whose time it is.

        The ends in a checkpoint are kept if the length of training is the same. So a resumed run changes phase at the
        same step as one that did not stop.
        """
        schedule, now = self.schedule, self._state.timestamp
        data = self._data()
        if not same(self._progress.max_duration, self._max_duration):
            before = schedule.ends_to_come
            schedule.resolve(self._max_duration, schedule.plan(self._max_duration, data, now))
            report_moved_ends(schedule, before)
        # The first batch shows how many samples one has: what depends on that is checked then.
        self._plan = schedule.plan(self._max_duration, replace(data, samples=None), now)
        schedule.check(now, self._plan, self._trains_to_end, self._more_comes)
        bag_size = schedule.bag_size
        if schedule.advance(now):
            report_change(bag_size, schedule.bag_size, now, self._progress.dropped)

    def _data(self, first: Any = None) -> Data:
        """What the train loader gives, as far as is known, perhaps by its first batch."""
        check_loader(self._state.dataloader)
        data = self._loader.data(first)
        check_epochs_end(self.schedule.phases_to_come, self._max_duration, data)
        return data

    def _superpose(self) -> None:
        """Change the model, the train metrics and the microbatch size, until recovery."""
        self._undo.callback(self._leave_model)
        self.microbatches = Microbatches(self._state, self.schedule.settings)
        # They come back at the first batch of recovery. If they came back at once and the epoch ended with this step,
        # Composer would compute them of nothing.
        give_back = put_train_metrics_aside(self._state)
        self._undo.callback(self._at_next_batch.callback, give_back)
        self._undo.callback(self._microbatch_size.scale, 1)
        self._enter_phase(self.microbatches)

    def _leave_model(self) -> None:
        if self.microbatches is not None:
            self.microbatches.restore()
            self.microbatches = None

    def _enter_phase(self, microbatches: Microbatches) -> None:
        bag_size, settings = self.schedule.bag_size, self.schedule.settings
        microbatches.enter_phase(bag_size)
        # Without more data a batch has no more rows than the loader gives.
        most = getattr(self._state.dataloader, 'batch_size', None) if settings.expand == 'none' else None
        self._microbatch_size.scale(settings.microbatch_scale(bag_size), most)

    def begin_epoch(self) -> None:
        """Prepare the loader for an epoch, or for the rest of one."""
        if self.schedule.draws > 1:
            check_loader(self._state.dataloader)
        self._loader.begin_epoch()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Lay out the batch of a superposed step. One in recovery is left as it is."""
        self._run.has_drawn = True
        self._loader.confirm_step()
        self._at_next_batch.close()
        if self.microbatches is not None:
            self._lay_out(state, self.microbatches)
        else:
            self.close()  # a run that resumes in recovery has a stand-in for its loader until here
            ids = ids_of(state.batch)
            self._positions, self._dropped = 0 if ids is None else ids.numel(), 0
            self._came = self._read = self._positions

    def _lay_out(self, state: State, microbatches: Microbatches) -> None:
        if self._ignored is None:
            self._announce(state)
        settings, bag_size, given = self.schedule.settings, self.schedule.bag_size, state.batch
        # Pinned as the loader's own batches were: from other memory, each copy to the GPU would wait for it.
        pin = state.device.name == 'gpu' and bool(getattr(state.dataloader, 'pin_memory', False))
        model, weights = unwrapped(state.model), settings.weights(bag_size)
        layout = lay_out(given, bag_size, settings.expand, settings.superpose, weights, pin, takes(model))
        check_batch(layout.batch, given, bag_size, settings.superpose, model)
        if self._ignored is None:
            self._ignored = check_first_batch(state, self._microbatch_size.plain)
        check_ignored(layout.batch['labels'], self._ignored, model)
        if layout.dropped and not self._warned_of_tail:
            self._warned_of_tail = True
            report_dropped(layout.dropped, given['input_ids'].shape[1], bag_size, settings.expand)
        mask = layout.batch.get('attention_mask')
        microbatches.begin_batch(full=mask is not None and is_full(mask))
        state.batch, self._positions, self._dropped = layout
        self._came, self._read = given['input_ids'].numel(), layout.batch['input_ids'].numel()

    def _announce(self, state: State) -> None:
        """Say what the run is going to do, now that its first batch shows what a batch holds."""
        before, now = self._plan, state.timestamp
        data, progress = self._data(state.batch), self._progress
        self._plan = self.schedule.plan(self._max_duration, data, now)
        if data.tokens and int(now.batch) == progress.began:
            # A step before superposition had at most the positions of a plain one.
            progress.s_tokens = min(progress.s_tokens, int(now.batch) * data.tokens)
        report_shares(self.schedule, self._plan)
        report_plan(self.schedule, self._plan, now)
        if before is None:  # at FIT_START there was no plan to check
            self.schedule.check(now, self._plan, self._trains_to_end, self._more_comes)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Count and log a step, and end a phase whose time has come."""
        progress, bag_size = self._progress, self.schedule.bag_size
        metrics: dict[str, Any] = {}
        if self.microbatches is not None:
            metrics = self.microbatches.end_batch()
            if self.schedule.settings.superpose != 'output':
                # SpeedMonitor counts the FLOPs of a batch by its rows and positions.
                state.batch = {**state.batch, 'input_ids': state.batch['input_ids'].unflatten(1, (-1, bag_size))}
        # Ranks draw equally many rows, in the last step of an epoch too.
        progress.s_tokens += self._positions * dist.get_world_size()
        progress.dropped += self._not_read()
        self._loader.count(steps=1)
        metrics |= {
            'superposition/bag_size': bag_size,
            'superposition/data_tokens': int(state.timestamp.token) - progress.dropped,
            'superposition/s_tokens': progress.s_tokens,
        }
        logger.log_metrics(metrics)
        self._advance()

    def _not_read(self) -> int:
        """The tokens of the step, all ranks together, that Composer's clock has counted and the model has not read."""
        before, ranks = self._state.previous_timestamp, dist.get_world_size()
        assert before is not None
        counted = int(self._state.timestamp.token) - int(before.token)
        if not self._came or counted < self._came * ranks:  # padding is not counted: the dropped ends are all we know
            return self._dropped * ranks
        return counted - self._read * ranks

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Check that an epoch was whole, and end a phase whose time has come."""
        self._run.has_drawn = True  # an epoch without a step takes up a dataset's state, too
        self._loader.end_epoch()
        logger.log_metrics({'superposition/samples_left_out': self._progress.left_out})
        self._advance()

    def iteration_end(self, state: State, logger: Logger) -> None:
        """Begin another epoch, where an iteration ends in the middle of one."""
        self._loader.end_iteration()

    def _advance(self) -> None:
        before = self.schedule.bag_size
        if self.microbatches is None or not self.schedule.advance(self._state.timestamp):
            return
        if self.schedule.finished:
            self._undo.close()
        else:
            self._enter_phase(self.microbatches)
        # KillLossSpike keeps the loss of this step, after our BATCH_END. It must not compare it with a next-token loss.
        self._at_next_batch.callback(forget_losses, self._state.callbacks)
        report_change(before, self.schedule.bag_size, self._state.timestamp, self._progress.dropped)

    def fit_end(self, state: State, logger: Logger) -> None:
        """Say what was read, and put back what is changed."""
        progress, now = self._progress, state.timestamp
        if not self.schedule.finished and not self._more_comes:
            report_no_recovery(self.schedule, now)
        say([last_line(int(now.batch), int(now.token) - progress.dropped, progress.s_tokens)])
        self.close()

    def close(self) -> None:
        """Undo what is still changed, wherever the fit has ended."""
        self._undo.close()
        self._at_next_batch.close()
