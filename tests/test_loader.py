"""Joining the loader batches of one step."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from composer_tst.loader import BagLoader, merge_batches


def collate(samples: list[int]) -> dict[str, Any]:
    ids = torch.tensor(samples)[:, None].expand(-1, 3).contiguous()
    return {'input_ids': ids, 'labels': ids.clone(), 'total_tokens': [3] * len(samples), 'flag': True}


def numbers(count: int, **settings: Any) -> DataLoader:
    dataset: Any = range(count)
    return DataLoader(dataset, batch_size=2, collate_fn=collate, **settings)


def bag_loader(
    loader: Iterable,
    draws: int | dict[int, int],
    joins: bool = True,
    limit: int | None = None,
    leave_out: Callable[[int], None] = lambda samples: None,
) -> BagLoader:
    draws_at = (lambda step: draws) if isinstance(draws, int) else (lambda step: draws.get(step, 1))
    return BagLoader(loader, draws_at, lambda: (0, 0), joins, limit, leave_out)


def drawn(loader: Iterable) -> list[list[int]]:
    return [batch['input_ids'][:, 0].tolist() for batch in loader]


def test_a_step_reads_as_many_batches_as_asked_in_order():
    loader = numbers(12)
    assert drawn(bag_loader(loader, 3)) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert drawn(bag_loader(loader, {0: 3, 1: 2})) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11]]
    assert drawn(bag_loader(loader, 2, limit=4)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ('samples', 'drop_last', 'joins', 'expected', 'left_out'),
    [
        (14, True, True, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]], 2),
        (16, True, True, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]], 4),
        (16, False, True, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14]], 1),
        (16, False, False, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14, 15]], 0),
        (14, False, True, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]], 2),
        (17, False, True, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14]], 2),
    ],
)
def test_the_tail_of_an_epoch_is_used_or_counted(
    samples: int, drop_last: bool, joins: bool, expected: list, left_out: int, caplog: pytest.LogCaptureFixture
):
    loader = numbers(samples, drop_last=drop_last)
    counted: list[int] = []
    with caplog.at_level(logging.WARNING):
        assert drawn(bag_loader(loader, 3, joins, leave_out=counted.append)) == expected
    assert sum(counted) == left_out
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (left_out > 0)
    if left_out:
        assert f'The last {left_out} samples of the epoch' in messages[0]


def test_the_tail_is_counted_after_the_step_before_it():
    """A checkpoint of that step has not counted it: a run that resumes there draws it again, and counts it."""
    counted: list[int] = []
    steps = iter(bag_loader(numbers(17), 3, leave_out=counted.append))
    assert [len(next(steps)['input_ids']) for _ in range(3)] == [6, 6, 3]
    assert counted == []
    assert next(steps, None) is None
    assert counted == [2]


def test_an_epoch_that_is_past_its_limit_has_no_more_steps():
    loader = BagLoader([1, 2, 3], lambda step: 1, lambda: (16, 16), False, 15, lambda samples: None)
    assert list(loader) == []


def test_it_is_the_loader_in_all_but_iteration():
    loader = numbers(12)
    bags = bag_loader(loader, 3)
    assert isinstance(bags, DataLoader)
    assert len(bags) == len(loader)
    assert bags.dataset is loader.dataset
    assert bags.batch_size == 2


def test_a_loader_of_any_type_will_do():
    batches = [collate([i]) for i in range(4)]
    assert drawn(bag_loader(batches, 2)) == [[0, 1], [2, 3]]
    assert drawn(bag_loader(iter(batches), 2)) == [[0, 1], [2, 3]]


def test_tensors_lists_and_plain_values_are_merged():
    merged = merge_batches([collate([0, 1]), collate([2])])
    assert merged['input_ids'].shape == (3, 3)
    assert merged['total_tokens'] == [3, 3, 3]
    assert merged['flag'] is True


zero = torch.zeros(1)


@pytest.mark.parametrize(
    ('batches', 'message'),
    [
        ([(1, 2), (1, 2)], 'yields tuple'),
        ([{'ids': 1}, {'ids': 1}], 'needs a mapping with input_ids'),
        ([{'input_ids': torch.zeros(2, 3)}, {'input_ids': torch.zeros(2, 4)}], 'input_ids comes in shapes'),
        ([{'input_ids': torch.zeros(2, 3)}, {'input_ids': None}], 'input_ids comes in shapes'),
        (
            [{'input_ids': torch.zeros(1)}, {'input_ids': torch.zeros(1), 'mask': torch.zeros(1)}],
            'another input_ids, mask',
        ),
        (
            [{'input_ids': torch.zeros(1), 'n': [1]}, {'input_ids': torch.zeros(1)}],
            'one has input_ids, n, another input_ids:',
        ),
        ([{'input_ids': zero, 'n': 1}, {'input_ids': zero, 'n': 2}], 'n differs'),
    ],
)
def test_batches_that_do_not_fit_together_are_refused(batches: list, message: str):
    with pytest.raises(ValueError, match=message):
        merge_batches(batches)
