"""The first lines of a run, against sums written out by hand."""

from dataclasses import replace

import pytest

from composer_tst.messages import (
    data_repeat,
    first_lines,
    last_line,
    recovery_is_short,
    unknown_course,
)
from composer_tst.schedule import Data, Plan, Stretch

# The quickstart: 3,000 steps of 16 rows of 64, phases of 8, 4 and 2 until 300, 600 and 900.
PHASES = [Stretch(8, 300, 2400), Stretch(4, 300, 1200), Stretch(2, 300, 600)]
QUICKSTART = Plan([Stretch(1, 0, 0), *PHASES, Stretch(1, 2100, 2100)], Data(22000, tokens=16 * 64), epochs=6300 / 22000)


def one_phase(superposed: int, plain: int, epoch: int) -> Plan:
    """A run of bags of 4 over epochs of some loader batches."""
    read = superposed * 4 + plain
    return Plan([Stretch(4, superposed, superposed * 4), Stretch(1, plain, plain)], Data(epoch), epochs=read / epoch)


def warnings_of(plan: Plan) -> list[str]:
    """What may be amiss with it."""
    return [*data_repeat(plan), *recovery_is_short(plan)]


def test_the_first_lines_say_what_the_run_is_going_to_do():
    does, reads, jump = first_lines(QUICKSTART)
    assert does == (
        'Superposition until step 900 of 3,000: bags of 8 for 300 steps, 2.46M data tokens; bags of 4 for 300 steps, '
        '1.23M data tokens; bags of 2 for 300 steps, 614,400 data tokens; plain tokens for 2,100 steps, 2.15M data '
        'tokens.'
    )
    # (300 * (8 + 4 + 2) + 2100) / 3000 and / 22000
    assert reads == 'It reads 2.10 times the data of a plain run of as many steps, 0.29 epochs of this loader.'
    assert jump.startswith('When recovery begins, the training loss becomes another quantity, the next-token loss; in')
    assert warnings_of(QUICKSTART) == []


def test_what_is_not_known_is_left_out():
    does, reads, _ = first_lines(replace(QUICKSTART, data=Data(), epochs=None))
    assert 'bags of 2 for 300 steps; plain tokens' in does
    assert 'data tokens' not in does
    assert reads == 'It reads 2.10 times the data of a plain run of as many steps.'
    says, _ = unknown_course('0.3dur', [6])
    assert says.startswith('Superposition until 0.3dur with bags of 6: at which step that is')


def test_where_the_last_batch_of_an_epoch_may_be_smaller_the_amounts_are_bounds():
    data = Data(100, tokens=10, uses_tail=True)
    plan = Plan([Stretch(4, 30, 120), Stretch(1, 50, 50)], data, epochs=1.7)
    assert (
        'bags of 4 for 30 steps, up to 1,200 data tokens; plain tokens for 50 steps, up to 500' in first_lines(plan)[0]
    )
    assert 'up to' not in first_lines(replace(plan, epochs=0.9))[0]


def test_a_superposition_that_begins_within_a_run_has_plain_steps_before_it():
    stretches = [Stretch(1, 20, 20), Stretch(4, 30, 120), Stretch(1, 50, 50)]
    does, reads, _ = first_lines(Plan(stretches, Data(100), epochs=1.9))
    assert does == (
        'Superposition from step 20 to step 50 of 100: before it 20 steps; bags of 4 for 30 steps; plain tokens for 50 '
        'steps.'
    )
    assert reads.startswith('It reads 1.90 times the data')  # (20 + 30 * 4 + 50) / 100
    assert reads.endswith('1.9 epochs of this loader.')


def test_without_more_data_a_run_reads_what_a_plain_one_does():
    plan = Plan([Stretch(4, 30, 30), Stretch(1, 70, 70)], Data())
    assert first_lines(plan)[1] == 'It reads 1.00 times the data of a plain run of as many steps.'


@pytest.mark.parametrize(
    ('changed', 'warning'),
    [
        # 12 batches, bags of 4 for half of 40 steps: (20 * 4 + 20) / 12 = 8.33
        (one_phase(20, 20, 12), 'The run reads its data 8.3 times (a plain run of these'),
        # 160 / 159 is more than once and must not be rounded to it
        (one_phase(20, 80, 159), 'The run reads its data 1.007 times'),
        (replace(QUICKSTART, stretches=[*PHASES, Stretch(1, 899, 899)]), 'Recovery has 899 of 1,799 steps, less'),
    ],
)  # fmt: skip
def test_what_may_be_amiss_is_a_warning_with_its_number(changed: Plan, warning: str):
    (found,) = warnings_of(changed)
    assert found.startswith(warning)


@pytest.mark.parametrize(
    'fine',
    [
        one_phase(20, 80, 160),
        replace(QUICKSTART, stretches=[*PHASES, Stretch(1, 900, 900)]),
    ],
)
def test_what_is_just_right_is_none(fine: Plan):
    assert warnings_of(fine) == []


def test_the_last_line_says_what_was_read():
    assert last_line(3000, 6_451_200, 3_072_000).startswith(
        'Superposition: 3,000 steps read 6.45M data tokens in 3.07M positions of the model.'
    )
    assert last_line(1, 10, 10).startswith('Superposition: 1 step read 10 data tokens')
