"""Phases: what is accepted, when they end, and that they end for good."""

import itertools
from typing import Any

import pytest
from composer.core import Time, Timestamp, TimeUnit

from composer_tst.schedule import Data, Plan, Progress, Schedule, Stretch, plan_steps, same, share_of
from composer_tst.settings import Phase, Settings

ROWS, LENGTH = 8, 16


def as_many(bag_size: int) -> int:
    """The loader batches that a step reads where bags are of more data."""
    return bag_size


def steps_of(plan: Plan | None) -> tuple[list[int], int]:
    """The step that each phase ends at, and the steps in all."""
    assert plan is not None
    return plan.ends, plan.total


def walk(
    untils: list[Time], draws: list[int], max_duration: str, epoch: int, drop_last: bool, joins: bool
) -> tuple[list[int], int, list[int]]:
    """Take one step after another, as the trainer would.

    Returns:
        tuple: The step that each phase ends at, the steps in all, and the batches that each phase and recovery read.
    """
    longest = Time.from_timestring(max_duration)
    ends: list[int] = []
    reads = [0] * (len(untils) + 1)
    step = epochs = drawn = read = 0

    def reached(moment: Time) -> bool:
        now = {'ba': step, 'sp': read * ROWS, 'tok': read * ROWS * LENGTH, 'ep': epochs}
        return now[moment.unit.value] >= moment.value

    while not reached(longest):
        while len(ends) < len(untils) and reached(untils[len(ends)]):
            ends.append(step)
        needed = draws[len(ends)] if len(ends) < len(untils) else 1
        found = min(needed, epoch - drawn)
        rows = found * ROWS
        if found and (found == needed or (not drop_last and (not joins or rows >= needed))):
            step, drawn, read = step + 1, drawn + found, read + found
            reads[len(ends)] += found
            if drawn < epoch:
                continue
        epochs, drawn = epochs + 1, 0
    while len(ends) < len(untils):
        ends.append(step)
    return ends, step, reads


@pytest.mark.parametrize('drop_last', [False, True])
@pytest.mark.parametrize('joins', [False, True])
@pytest.mark.parametrize('epoch', [100, 49, 9])
@pytest.mark.parametrize('max_duration', ['100ba', '4000sp', '64000tok', '5ep'])
@pytest.mark.parametrize(
    'untils',
    [['30ba'], ['300sp'], ['9600tok'], ['1ep'], ['10ba', '1200sp'], ['3200tok', '2ep'], ['8ba', '800sp', '48000tok']],
)
def test_the_plan_is_what_happens_step_by_step(
    max_duration: str, untils: list[str], epoch: int, drop_last: bool, joins: bool
):
    draws = [8, 4, 2][: len(untils)]
    moments = [Time.from_timestring(until) for until in untils]
    phases = [Phase(s, moment) for s, moment in zip(draws, moments, strict=True)]
    data = Data(epoch, ROWS, ROWS * LENGTH, uses_tail=not drop_last, joined_rows=ROWS if joins else None)
    plan = plan_steps(phases, as_many, Time.from_timestring(max_duration), data)
    assert plan is not None
    read = [stretch.batches for stretch in plan.stretches]
    assert (*steps_of(plan), read) == walk(moments, draws, max_duration, epoch, drop_last, joins)


@pytest.mark.parametrize(('epoch', 'drop_last'), [(100, True), (100, False), (10, True), (13, True), (13, False)])
@pytest.mark.parametrize(('share', 'epochs'), [('0.3dur', 30), ('0.1dur', 4), ('0.77dur', 9)])
def test_a_share_of_epochs_is_one_of_the_steps_they_come_to(share: str, epochs: int, epoch: int, drop_last: bool):
    phases = [Phase(6, Time.from_timestring(share))]
    data = Data(epoch, uses_tail=not drop_last)
    plan = plan_steps(phases, as_many, Time.from_timestring(f'{epochs}ep'), data)
    assert plan is not None
    end = Time(plan.ends[0], TimeUnit.BATCH)
    assert walk([end], [6], f'{epochs}ep', epoch, drop_last, False)[:2] == steps_of(plan)
    # Each superposed step takes up to 6 plain ones, so the share can be met to as many.
    assert abs(plan.ends[0] / plan.total - float(share[:-3])) < 6 / plan.total


@pytest.mark.parametrize(('max_duration', 'unit'), [('64000tok', 'tok'), ('4000sp', 'sp')])
def test_a_share_of_data_is_one_of_data(max_duration: str, unit: str):
    phases = [Phase(6, Time.from_timestring('0.3dur'))]
    plan = plan_steps(phases, as_many, Time.from_timestring(max_duration), Data(None, ROWS, ROWS * LENGTH))
    moment = Time(int(0.3 * int(max_duration[: -len(unit)])), unit)
    assert steps_of(plan) == walk([moment], [6], max_duration, 10**9, True, False)[:2]


@pytest.mark.parametrize(('share', 'whole', 'part'), [('0.29dur', 100, 29), ('0.57dur', 100, 57), ('0.3dur', 9, 2)])
def test_a_share_is_exact(share: str, whole: int, part: int):
    assert share_of(Time.from_timestring(share), whole) == part


def test_there_is_no_plan_where_the_loader_does_not_tell_its_amounts():
    for until in ('1000tok', '1000sp', '3ep'):
        phases = [Phase(4, Time.from_timestring(until))]
        assert plan_steps(phases, as_many, Time.from_timestring('10ba'), Data()) is None


def test_an_epoch_too_short_for_a_step_is_refused():
    phases = [Phase(4, Time.from_timestring('5ba'))]
    for data in (Data(3), Data(3, uses_tail=True, joined_rows=1)):
        with pytest.raises(ValueError, match='The train loader has 3 batches but one superposed step reads 4'):
            plan_steps(phases, as_many, Time.from_timestring('10ba'), data)
    plan = plan_steps(phases, as_many, Time.from_timestring('10ba'), Data(3, uses_tail=True))
    assert steps_of(plan) == ([5], 10)


def schedule_of(*pairs: tuple[int, str], **progress: Any) -> Schedule:
    phases = tuple(Phase(s, Time.from_timestring(until)) for s, until in pairs)
    return Schedule(Settings(phases, 'both', 'sequence', 'uniform'), Progress(**progress))


def place(
    schedule: Schedule, max_duration: str, data: Data | None = None, now: Timestamp | None = None, whole: bool = True
) -> Plan | None:
    """Fix and check the ends of the phases to come, as a run does when it starts."""
    longest, now = Time.from_timestring(max_duration), now or Timestamp()
    schedule.progress.drawn = int(now.batch_in_epoch)
    plan = schedule.plan(longest, data or Data(), now)
    schedule.resolve(longest, plan)
    schedule.check(now, plan, whole)
    return plan


WITHOUT_RECOVERY_OR_STEPS = [
    (['100ba'], '100ba', 'there would be no recovery phase'),
    (['200ba'], '100ba', 'there would be no recovery phase'),
    (['1000sp'], '1000sp', 'there would be no recovery phase'),
    (['1600sp'], '100ba', 'there would be no recovery phase'),
    (['0.995dur'], '1000sp', 'there would be no recovery phase'),  # the 63rd step of 16 samples ends both
    (['0.001dur'], '100ba', 'has no steps'),
    (['10ba', '0.1dur'], '100ba', 'has no steps'),
]


@pytest.mark.parametrize(('untils', 'max_duration', 'message'), WITHOUT_RECOVERY_OR_STEPS)
def test_a_run_without_recovery_or_without_steps_is_refused(untils: list[str], max_duration: str, message: str):
    schedule = schedule_of(*((2, until) for until in untils))
    with pytest.raises(ValueError, match=message):
        place(schedule, max_duration, Data(samples=8))


@pytest.mark.parametrize(('untils', 'max_duration', 'message'), WITHOUT_RECOVERY_OR_STEPS[:5])
def test_a_fit_that_may_be_followed_by_another_is_warned(
    untils: list[str], max_duration: str, message: str, caplog: pytest.LogCaptureFixture
):
    place(schedule_of(*((2, until) for until in untils)), max_duration, Data(samples=8), whole=False)
    assert message in caplog.text


def test_an_end_in_an_unknown_amount_is_still_refused_at_the_end_of_training():
    with pytest.raises(ValueError, match='there would be no recovery phase'):
        place(schedule_of((2, '1000tok')), '1000tok')


def test_padded_rows_are_not_refused_for_what_full_ones_would_come_to(caplog: pytest.LogCaptureFixture):
    data, longest = Data(tokens=128), f'{4000 * 128}tok'
    # Half full, 100 steps of 16 batches reach the end of the first phase, where the plan thought that of the second.
    schedule = schedule_of((16, '0.2dur'), (4, '0.3dur'), began=0, ended=[100])
    now = Timestamp(batch=150, token=100 * 16 * 64 + 50 * 4 * 64)
    place(schedule, longest, data, now)
    assert not schedule.advance(now)
    assert schedule.bag_size == 4
    assert not caplog.records
    # 2,000 steps of 4 full batches are more than all; of half full ones they are all but the last.
    place(schedule_of((4, '2000ba')), longest, data)
    assert 'there would be no recovery phase' in caplog.text
    assert 'if no row is padded' in caplog.text
    # The same where both are counted in tokens: the tenth full step ends both.
    caplog.clear()
    place(schedule_of((4, '0.95dur')), f'{4 * 128 * 10}tok', data)
    assert 'there would be no recovery phase' in caplog.text
    assert 'if no row is padded' in caplog.text
    # A number of tokens may come later than planned, but never sooner.
    with pytest.raises(ValueError, match='there would be no recovery phase'):
        place(schedule_of((4, f'{4 * 128 * 10}tok')), '8ba', data)


def test_a_run_of_smaller_last_batches_is_not_refused_for_what_full_ones_would_come_to(
    caplog: pytest.LogCaptureFixture,
):
    """10 rows in batches of 4: 12 steps of 2 batches are 60 samples, and were they full, 72."""
    place(schedule_of((2, '12ba')), '70sp', Data(3, 4, uses_tail=True))
    assert 'no recovery phase' in caplog.text
    assert 'no batch is smaller' in caplog.text
    with pytest.raises(ValueError, match='there would be no recovery phase'):
        place(schedule_of((2, '12ba')), '70sp', Data(3, 4))


def test_a_tail_may_come_where_nobody_knows_when_an_epoch_ends(caplog: pytest.LogCaptureFixture):
    """A full step of 4 batches of 2 rows has 8 samples. A smaller one has not."""
    place(schedule_of((4, '1ba'), (2, '8sp')), '4ba', Data(None, 2, uses_tail=True))
    assert 'has no steps' in caplog.text
    with pytest.raises(ValueError, match='has no steps'):
        place(schedule_of((4, '1ba'), (2, '8sp')), '4ba', Data(None, 2))


@pytest.mark.parametrize('max_duration', ['100ba', '100sp', '100tok'])
def test_a_share_of_nothing_is_refused_before_it_is_known_what_a_batch_holds(max_duration: str):
    with pytest.raises(ValueError, match=r'until 0.001dur has no steps: it is less than 1.* of 100.*: give it a later'):
        place(schedule_of((2, '0.001dur')), max_duration)


def at_batch(batch: int) -> Timestamp:
    return Timestamp(batch=batch, batch_in_epoch=batch)


def test_ended_phases_stay_ended():
    schedule = schedule_of((4, '0.1dur'), (2, '0.3dur'), began=0)
    place(schedule, '10ba')
    sizes = []
    for batch in range(10):
        schedule.advance(at_batch(batch))
        sizes.append(schedule.bag_size)
    assert sizes == [4, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    assert schedule.progress.ended == [1, 3]
    schedule.resolve(Time.from_timestring('100ba'), None)
    assert [end.to_timestring() for end in schedule.progress.ends] == ['1ba', '3ba']
    assert not schedule.advance(at_batch(10))
    assert schedule.bag_size == 1


def test_what_has_begun_is_what_has_taken_a_step():
    schedule = schedule_of((4, '2ba'), (2, '4ba'), began=0)
    place(schedule, '10ba')
    begun = [schedule.phases_begun(0)]
    for batch in range(1, 7):
        schedule.advance(at_batch(batch))
        begun.append(schedule.phases_begun(batch))
    assert begun == [0, 1, 1, 2, 2, 3, 3]
    assert schedule_of((4, '2ba')).phases_begun(5) == 0


def test_a_phase_whose_moment_is_past_is_left_out():
    """Superposition added to a run under way, after 50 plain steps."""
    schedule = schedule_of((4, '40ba'), (2, '60ba'), began=50)
    assert steps_of(place(schedule, '200ba', Data(100), at_batch(50))) == ([50, 60], 200)
    assert schedule.advance(at_batch(50))
    assert schedule.bag_size == 2
    assert schedule.progress.ended == [50]


def test_the_plan_of_a_run_under_way_goes_on_from_where_it_stands():
    # 50 plain batches, 10 steps of 4, and of 150 batches worth of tokens 60 are left, in steps of 2.
    schedule = schedule_of((4, '60ba'), (2, f'{150 * 128}tok'), began=50)
    now = Timestamp(batch=50, batch_in_epoch=50, token=50 * 128)
    assert steps_of(place(schedule, '200ba', Data(tokens=128), now)) == ([60, 90], 200)
    # Of 2 epochs of 100 batches 50 are read: e - 50 steps of 6 and T - e of one read 150, where e is 0.3 T.
    plan = place(schedule_of((6, '0.3dur'), began=50), '2ep', Data(100), at_batch(50))
    assert steps_of(plan) == ([54], 180)
    assert 50 + 4 * 6 + 126 == 200


def test_a_loader_that_has_become_shorter_than_what_was_drawn_begins_its_next_epoch():
    """5 steps of the epoch were done. The resumed run has larger batches: 3 in an epoch."""
    plan = plan_steps(
        [Phase(2, Time.from_timestring('8ba'))],
        as_many,
        Time.from_timestring('12ba'),
        Data(3, uses_tail=True),
        at_batch(5),
        drawn=5,
    )
    assert plan is not None
    # Steps of 2 and 1 batches, then of 2, and in recovery 4 of one.
    assert plan.stretches == [Stretch(2, 3, 5), Stretch(1, 4, 4)]


def test_a_plan_and_what_was_done_before_it_are_the_whole_run():
    """10 plain steps, 20 of bags of 4, 5 of bags of 2 that has 15 more."""
    schedule = schedule_of((4, '30ba'), (2, '50ba'), began=10, ended=[30])
    now = at_batch(35)
    plan = place(schedule, '100ba', Data(200), now)
    assert plan is not None
    assert [(each.bag_size, each.steps, each.batches) for each in plan.stretches] == [(2, 15, 30), (1, 50, 50)]
    whole = schedule.whole(plan, now)
    assert [(each.bag_size, each.steps, each.batches) for each in whole.stretches] == [
        (1, 10, 10),
        (4, 20, 80),
        (2, 20, 40),
        (1, 50, 50),
    ]
    assert steps_of(whole) == ([10, 30, 50], 100)


def test_what_was_read_before_superposition_is_what_the_clock_has_counted():
    """3 steps of bags of 3, of which nothing is known: a checkpoint was loaded without algorithms."""
    schedule, now = schedule_of((2, '6ba'), began=3), Timestamp(batch=3, batch_in_epoch=3, token=9 * 128)
    plan = place(schedule, '14ba', Data(200, 4, 128), now)
    assert plan is not None
    whole = schedule.whole(plan, now)
    assert [whole.tokens_of(stretch) for stretch in whole.stretches] == [9 * 128, 6 * 128, 8 * 128]
    assert whole.times == 23 / 14
    # Two superposed steps later it is the same.
    schedule.progress.dropped, now = 5, Timestamp(batch=5, batch_in_epoch=5, token=13 * 128 + 5)
    later = schedule.plan(Time.from_timestring('14ba'), Data(200, 4, 128), now)
    assert later is not None
    assert schedule.whole(later, now).stretches == whole.stretches


def test_the_ends_of_rows_that_fill_no_bag_are_not_read():
    data = Data(tokens=60, row_length=15)
    plan = Plan([Stretch(2, 4, 8), Stretch(1, 4, 4)], data)
    assert [plan.tokens_of(stretch) for stretch in plan.stretches] == [8 * 56, 4 * 60]
    assert plan.times == (8 * 56 + 4 * 60) / (8 * 60)
    assert Data(row_length=15).read(2) is None


def test_all_that_is_saved_comes_back():
    before = schedule_of((4, '3ba'), (2, '100tok'), began=2)
    place(before, '10ba', Data(tokens=10))
    before.advance(at_batch(3))
    progress = before.progress
    progress.s_tokens, progress.left_out, progress.dropped, progress.drawn, progress.batch_samples = 1, 2, 3, 4, 5
    state = before.progress.state_dict()
    assert all(type(value) in (int, str, list) for value in state.values())
    after = Progress.from_state_dict(state)
    assert after.state_dict() == state
    assert list(itertools.chain(after.ended, after.ends)) == list(
        itertools.chain(before.progress.ended, before.progress.ends)
    )


def test_times_are_the_same_in_value_and_unit():
    assert same(Time.from_batch(8), Time.from_timestring('8ba'))
    for other in (Time.from_batch(9), Time.from_epoch(8), None):
        assert not same(Time.from_batch(8), other)
        assert not same(other, Time.from_batch(8))
    assert not same(None, None)
