"""Placing the phases in a run, as it starts: when each ends, whether that can be, and what to say of it."""

from composer.core import State

from composer_tst.loader import Drawing
from composer_tst.messages import report_change, report_course, report_moved_ends, report_shares
from composer_tst.schedule import Schedule, plan_steps, same
from composer_tst.settings import Settings


def place_phases(schedule: Schedule, settings: Settings, drawing: Drawing, state: State, whole: bool) -> None:
    """Fix when the phases to come end, and begin with the one whose time it is.

    The moments that a checkpoint has stand, as long as the length of training does: a resumed run is the run that did
    not stop, also where it reads other amounts than were planned.

    Args:
        schedule: The phases.
        settings: What the user set.
        drawing: Where the data come from.
        state: The Trainer's.
        whole: Whether training ends where this fit does, as far as is known.

    Raises:
        ValueError: If a phase has no steps, or there is no recovery, for certain.
    """
    progress, max_duration = schedule.progress, state.max_duration
    assert max_duration is not None
    phases = schedule.phases[len(progress.ended) :]
    draws = [settings.draws(phase.bag_size) for phase in phases]
    drawing.check(max(draws))
    data, now = drawing.data()
    plan = plan_steps(phases, draws, max_duration, data, now)
    if not same(progress.max_duration, max_duration):
        before = list(progress.ends)
        schedule.resolve(max_duration, plan)
        report_moved_ends(schedule, before)
    schedule.check(state.timestamp, plan, whole)
    report_shares(schedule, plan, draws_more=settings.expand != 'none')
    report_course(schedule, settings, plan, data, state)
    bag_size = schedule.bag_size
    if schedule.advance(state.timestamp):
        report_change(bag_size, schedule.bag_size, state.timestamp)
