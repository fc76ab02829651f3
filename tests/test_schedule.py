"""Phases: what is accepted, when they end, and that they end for good."""

from fractions import Fraction
from typing import Any

import pytest
from composer.core import Time, Timestamp, TimeUnit

from composer_tst.schedule import Phase, Plan, Schedule, parse_phases, plan_steps


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({}, 'needs bag_size and duration, or phases'),
        ({'bag_size': 4}, 'needs bag_size and duration, or phases'),
        ({'bag_size': 1, 'duration': '0.3dur'}, 'bag_size is 1: give an integer of at least 2'),
        ({'bag_size': 2.0, 'duration': '0.3dur'}, 'bag_size is 2.0'),
        ({'bag_size': True, 'duration': '0.3dur'}, 'bag_size is True'),
        ({'bag_size': '4', 'duration': '0.3dur'}, "bag_size is '4'"),
        ({'bag_size': 4, 'duration': 0.3}, 'duration is 0.3, which is no Composer Time'),
        ({'bag_size': 4, 'duration': 'soon'}, 'no Composer Time'),
        ({'bag_size': 4, 'duration': '10sec'}, 'give it in dur, ba, tok, sp or ep'),
        ({'bag_size': 4, 'duration': '0ba'}, 'no step would be superposed'),
        ({'bag_size': 4, 'duration': '-1ba'}, 'no step would be superposed'),
        ({'bag_size': 4, 'duration': '1dur'}, 'leave no recovery phase'),
        ({'bag_size': 4, 'duration': '1.5dur'}, 'leave no recovery phase'),
        ({'bag_size': 4, 'duration': '1ba', 'phases': [{'bag_size': 4, 'until': '2ba'}]}, 'give phases, or'),
        ({'phases': []}, 'phases is empty'),
        ({'phases': [{'bag_size': 4}]}, 'give it bag_size and until'),
        ({'phases': [{'bag_size': 4, 'until': '2ba', 'r': 1}]}, 'give it bag_size and until'),
        ({'phases': [{'bag_size': 2, 'until': '2ba'}, {'bag_size': 4, 'until': '3ba'}]}, 'from coarse to fine'),
        ({'phases': [{'bag_size': 4, 'until': '3ba'}, {'bag_size': 2, 'until': '2ba'}]}, 'increasing times'),
        ({'phases': [{'bag_size': 4, 'until': '3ba'}, {'bag_size': 2, 'until': '3ba'}]}, 'increasing times'),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings: dict[str, Any], message: str):
    arguments = {'bag_size': None, 'duration': None, 'phases': None} | settings
    with pytest.raises(ValueError, match=message):
        parse_phases(**arguments)


def walk(phases: list[Phase], draws: list[int], max_duration: str, unit_of_batch: dict[TimeUnit, int], epoch: int):
    """Take one step after another, as the trainer would, with ends in data units; return the steps of the ends."""
    longest = Time.from_timestring(max_duration)
    ends, step, read = [], 0, 0
    while True:
        progress = {
            TimeUnit.BATCH: step,
            TimeUnit.SAMPLE: read * unit_of_batch[TimeUnit.SAMPLE],
            TimeUnit.TOKEN: read * unit_of_batch[TimeUnit.TOKEN],
            TimeUnit.EPOCH: read / epoch,
        }
        while len(ends) < len(phases):
            until = phases[len(ends)].until
            if until.unit == TimeUnit.DURATION:
                until = Time(int(until.value * longest.value), longest.unit)
            if progress[until.unit] < until.value:
                break
            ends.append(step)
        if progress[longest.unit] >= longest.value:
            return ends, step
        step += 1
        read += draws[len(ends)] if len(ends) < len(phases) else 1


# A float of 1/49 is not 49 to one.
@pytest.mark.parametrize('epoch', [100, 49])
@pytest.mark.parametrize('max_duration', ['100ba', '4000sp', '64000tok', '5ep'])
@pytest.mark.parametrize(
    'untils',
    [['30ba'], ['300sp'], ['9600tok'], ['1ep'], ['10ba', '1200sp'], ['3200tok', '2ep'], ['8ba', '800sp', '48000tok']],
)
def test_the_plan_is_what_happens_step_by_step(max_duration: str, untils: list[str], epoch: int):
    sizes = [8, 4, 2][: len(untils)]
    phases = [Phase(s, Time.from_timestring(u)) for s, u in zip(sizes, untils, strict=True)]
    amounts = {TimeUnit.SAMPLE: 8, TimeUnit.TOKEN: 128}
    ends, total = walk(phases, sizes, max_duration, amounts, epoch)
    rates = {**amounts, TimeUnit.EPOCH: Fraction(1, epoch)}
    plan = plan_steps(phases, sizes, Time.from_timestring(max_duration), rates)
    if len(ends) == len(phases) and ends[-1] < total:
        assert plan == Plan(ends, total)
    else:
        assert plan is not None
        assert plan.ends[-1] >= plan.total


@pytest.mark.parametrize(('max_duration', 'share_of'), [('200ba', 'steps'), ('4ep', 'steps'), ('64000tok', 'data')])
def test_a_share_is_one_of_steps_or_of_data(max_duration: str, share_of: str):
    phases = [Phase(6, Time.from_timestring('0.3dur'))]
    rates = {TimeUnit.SAMPLE: 8, TimeUnit.TOKEN: 128, TimeUnit.EPOCH: Fraction(1, 100)}
    plan = plan_steps(phases, [6], Time.from_timestring(max_duration), rates)
    assert plan is not None
    superposed, recovery = plan.ends[0], plan.total - plan.ends[0]
    share = superposed / plan.total if share_of == 'steps' else superposed * 6 / (superposed * 6 + recovery)
    assert share == pytest.approx(0.3, abs=0.01)
    read = {'200ba': None, '4ep': 400, '64000tok': 500}[max_duration]
    if read is not None:
        assert superposed * 6 + recovery == read


def test_there_is_no_plan_where_the_loader_does_not_tell_its_amounts():
    phases = [Phase(4, Time.from_timestring('1000tok'))]
    assert plan_steps(phases, [4], Time.from_timestring('10ba'), {}) is None


@pytest.mark.parametrize(
    ('untils', 'max_duration', 'message'),
    [
        (['100ba'], '100ba', 'there would be no recovery phase'),
        (['200ba'], '100ba', 'there would be no recovery phase'),
        (['1000sp'], '1000sp', 'there would be no recovery phase'),
        (['1600sp'], '100ba', 'there would be no recovery phase'),
        (['0.001dur'], '100ba', 'has no steps'),
        (['10ba', '0.1dur'], '100ba', 'has no steps'),
    ],
)
def test_a_run_without_recovery_or_without_steps_is_refused(untils: list[str], max_duration: str, message: str):
    phases = [Phase(2, Time.from_timestring(until)) for until in untils]
    longest = Time.from_timestring(max_duration)
    plan = plan_steps(phases, [2] * len(phases), longest, {TimeUnit.SAMPLE: 8})
    with pytest.raises(ValueError, match=message):
        Schedule(phases).resolve(longest, plan)


def test_an_end_in_an_unknown_amount_is_still_refused_at_the_end_of_training():
    schedule = Schedule([Phase(2, Time.from_timestring('1000tok'))])
    with pytest.raises(ValueError, match='there would be no recovery phase'):
        schedule.resolve(Time.from_timestring('1000tok'), None)


def test_padded_rows_are_not_refused_for_what_full_ones_would_come_to(caplog: pytest.LogCaptureFixture):
    rates, longest = {TimeUnit.TOKEN: 128}, Time.from_timestring(f'{4000 * 128}tok')
    # Half full, 100 steps of 16 batches reach the end of the first phase, where the plan thinks that of the second.
    schedule = Schedule([Phase(16, Time.from_timestring('0.2dur')), Phase(4, Time.from_timestring('0.3dur'))])
    schedule.began, schedule.ended = 0, [100]
    plan = plan_steps(schedule.placed, [16, 4], longest, rates)
    assert plan is not None
    assert plan.ends == [100, 100]
    schedule.resolve(longest, plan, resumed=True)
    assert not schedule.advance(Timestamp(batch=150, token=100 * 16 * 64 + 50 * 4 * 64))
    assert schedule.bag_size == 4
    assert not caplog.records
    # 2,000 steps of 4 full batches are more than all; of half full ones they are all but the last.
    phases = [Phase(4, Time.from_timestring('2000ba'))]
    Schedule(phases).resolve(longest, plan_steps(phases, [4], longest, rates))
    assert 'there would be no recovery phase' in caplog.text
    assert 'if no row is padded' in caplog.text


def at_batch(batch: int) -> Timestamp:
    return Timestamp(batch=batch, batch_in_epoch=batch)


def test_ended_phases_stay_ended_and_every_step_keeps_its_bag_size():
    phases = [Phase(4, Time.from_timestring('0.1dur')), Phase(2, Time.from_timestring('0.3dur'))]
    schedule = Schedule(phases)
    schedule.began = 0
    longest = Time.from_timestring('10ba')
    schedule.resolve(longest, plan_steps(phases, [4, 2], longest, {}))
    sizes = []
    for batch in range(10):
        schedule.advance(at_batch(batch))
        sizes.append(schedule.bag_size)
    assert sizes == [4, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    assert [schedule.bag_size_at(batch) for batch in range(10)] == sizes

    schedule.resolve(Time.from_timestring('100ba'), None)
    assert not schedule.advance(at_batch(10))
    assert schedule.bag_size == 1


def test_superposition_added_to_a_run_under_way_begins_there():
    schedule = Schedule([Phase(4, Time.from_timestring('8ba'))])
    schedule.began = 5
    schedule.resolve(Time.from_timestring('20ba'), None)
    schedule.advance(at_batch(5))
    assert [schedule.bag_size_at(batch) for batch in (0, 4, 5)] == [1, 1, 4]


def test_the_plan_of_superposition_added_to_a_run_under_way():
    rates = {TimeUnit.TOKEN: 128, TimeUnit.EPOCH: Fraction(1, 100)}
    # 50 plain batches, 10 steps of 4, and of 150 batches worth of tokens 60 are left, in steps of 2.
    phases = [Phase(4, Time.from_timestring('60ba')), Phase(2, Time.from_timestring(f'{150 * 128}tok'))]
    longest = Time.from_timestring('200ba')
    plan = plan_steps(phases, [4, 2], longest, rates, began=50)
    assert plan == Plan([60, 90], 200)
    schedule = Schedule(phases)
    schedule.began = 50
    schedule.resolve(longest, plan)
    # Of 2 epochs of 100 batches 50 are read: e - 50 steps of 6 and T - e of one read 150, where e is 0.3 T.
    share = [Phase(6, Time.from_timestring('0.3dur'))]
    plan = plan_steps(share, [6], Time.from_timestring('2ep'), rates, began=50)
    assert plan == Plan([54], 180)
    assert 50 + 4 * 6 + 126 == 200
    # One that is past already is left out.
    schedule = Schedule([Phase(4, Time.from_timestring('40ba')), Phase(2, Time.from_timestring('60ba'))])
    schedule.began = 50
    schedule.resolve(longest, plan_steps(schedule.phases, [4, 2], longest, rates, began=50))
    assert schedule.advance(at_batch(50))
    assert schedule.bag_size == 2
