"""Joining the loader batches of one step."""

import copy
import gc
import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from composer_tst.loader import BagLoader, Resumption


def collate(samples: list[int]) -> dict[str, Any]:
    ids = torch.tensor(samples)[:, None].expand(-1, 3).contiguous()
    return {'input_ids': ids, 'labels': ids.clone(), 'total_tokens': [3] * len(samples), 'flag': True}


def numbers(count: int, **settings: Any) -> DataLoader:
    dataset: Any = range(count)
    return DataLoader(dataset, batch_size=2, collate_fn=collate, **settings)


def bag_loader(
    loader: Iterable, draws: int, joins: bool = True, limit: int | None = None, resumption: Resumption | None = None
) -> BagLoader:
    return BagLoader(loader, joins, limit, resumption or Resumption(), lambda: draws)


def drawn(loader: Iterable) -> list[list[int]]:
    return [batch['input_ids'][:, 0].tolist() for batch in loader]


def test_a_step_reads_as_many_batches_as_asked_in_order():
    loader = numbers(12)
    assert drawn(bag_loader(loader, 3)) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert drawn(bag_loader(loader, 2, limit=4)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    bags = BagLoader(loader, True, None, Resumption(), lambda: 2 if bags.drawn else 3)
    assert drawn(bags) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11]]
    assert bags.drawn == 6


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
    samples: int, drop_last: bool, joins: bool, expected: list, left_out: int
):
    bags = bag_loader(numbers(samples, drop_last=drop_last), 3, joins)
    for _ in range(2):  # the first was a look: no step was trained on
        assert drawn(bags) == expected
        assert bags.left_out == left_out
        assert bags.drawn == -(-samples // 2)


def test_what_is_counted_by_a_step_is_what_it_and_those_before_it_drew():
    """A checkpoint of the step before a tail that is dropped has not counted it: a resumed run draws it again."""
    bags = bag_loader(numbers(16, drop_last=True), 3)
    counted = [(bags.drawn, bags.left_out) for _ in bags]
    assert counted == [(3, 0), (6, 0)]
    assert (bags.drawn, bags.left_out) == (8, 4)
    bags = bag_loader(numbers(16), 3)
    assert [(bags.drawn, bags.left_out) for _ in bags] == [(3, 0), (6, 0), (8, 1)]


def test_a_collator_may_make_as_many_rows_as_it_likes():
    def pack(samples: list[int]) -> dict[str, Any]:
        return collate(samples[: 1 + samples[0] % 3])  # 1, 2, 2, 1, 2 and 2 rows of 2 samples

    loader = DataLoader(range(12), batch_size=2, collate_fn=pack)  # pyright: ignore[reportArgumentType]
    bags = bag_loader(loader, 2)
    assert drawn(bags) == [[0, 2], [4, 5], [8, 9, 10, 11]]
    assert (bags.drawn, bags.left_out) == (6, 2)
    assert drawn(bag_loader(loader, 2, joins=False)) == [[0, 2, 3], [4, 5, 6], [8, 9, 10, 11]]


def test_lists_are_cut_with_their_rows():
    bags = bag_loader(numbers(16), 3)
    *_, last = bags
    assert len(last['input_ids']) == len(last['total_tokens']) == len(last['labels']) == 3
    assert last['flag'] is True


class Begun(torch.utils.data.IterableDataset):
    """Counts how often it began, as a StreamingDataset counts its epochs: when the first sample is asked for."""

    def __init__(self, count: int):
        self.count, self.begun = count, 0

    def __iter__(self) -> Iterator[int]:
        self.begun += 1
        yield from range(self.count)


@pytest.mark.parametrize('left', [0, 2, 4])
def test_an_epoch_all_drawn_before_begins_all_the_same(left: int):
    dataset = Begun(left)
    loader = DataLoader(dataset, batch_size=2, collate_fn=collate)
    bags = bag_loader(loader, 3, limit=8, resumption=Resumption(8))
    assert drawn(bags) == []
    assert dataset.begun == 1
    assert bags.drawn == 8


def test_a_dataset_that_resumes_itself_gives_the_rest_of_the_epoch_and_no_more():
    bags = bag_loader(numbers(12), 2, limit=8, resumption=Resumption(5))
    assert drawn(bags) == [[0, 1, 2, 3], [4, 5]]
    assert bags.drawn == 8


@pytest.mark.parametrize(('batches', 'steps'), [(3, 1), (6, 2), (7, 3), (4, 4), (12, 4)])
@pytest.mark.parametrize('spins', [0, 2])
def test_steps_that_the_trainer_passes_over_draw_what_they_did(batches: int, steps: int, spins: int):
    bags = bag_loader(numbers(24), 2, resumption=Resumption(batches, steps))
    for _ in range(spins):  # the trainer begins an epoch for each that is past
        next(iter(bags))
    rows = drawn(bags)
    assert len(rows[:steps]) == steps
    assert list(itertools.chain(*rows[steps:])) == list(range(2 * batches, 24))
    assert bags.drawn == 12
    assert drawn(bags) == rows  # whoever looked at all of it has changed nothing


def test_steps_that_the_trainer_passes_over_are_not_kept_in_memory():
    alive: list[int] = []

    def batches() -> Iterator[Any]:
        for sample in range(70):
            alive.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))
            yield collate([sample])

    steps = iter(bag_loader(batches(), 6, resumption=Resumption(60, 10)))
    for _ in range(10):
        next(steps)
    assert next(steps)['input_ids'][:, 0].tolist() == [60, 61, 62, 63, 64, 65]
    assert max(alive) - min(alive) <= 3 * 8


def test_random_numbers_of_the_coming_step_are_as_the_trainer_has_put_them_back():
    def noisy(samples: list[int]) -> dict[str, Any]:
        random.random()
        np.random.rand()
        return {**collate(samples), 'noise': torch.rand(len(samples))}

    def loader() -> DataLoader:
        return DataLoader(range(24), batch_size=2, collate_fn=noisy)  # pyright: ignore[reportArgumentType]

    def third_step(steps: Iterator[Any]) -> tuple[torch.Tensor, float, float]:
        for _ in range(2):
            next(steps)
        # What the trainer puts back, and two more generators.
        torch.manual_seed(1)
        random.seed(2)
        np.random.seed(3)
        return next(steps)['noise'], random.random(), np.random.rand()

    noise, *others = third_step(iter(bag_loader(loader(), 3)))
    again, *more = third_step(iter(bag_loader(loader(), 3, resumption=Resumption(6, 2))))
    assert torch.equal(again, noise)
    assert more == others


def test_an_epoch_that_has_become_shorter_than_what_was_done_of_it_ends():
    assert len(drawn(bag_loader(numbers(4), 3, resumption=Resumption(9, 3)))) < 3
    assert len(drawn(bag_loader(numbers(0), 3, resumption=Resumption(9, 3)))) == 0


@pytest.mark.parametrize(('steps', 'draws'), [(1, 2), (3, 3)])
def test_a_trainer_that_passes_over_no_step_trains_from_the_beginning_of_the_epoch(steps: int, draws: int):
    bags = bag_loader(numbers(24), 2, resumption=Resumption(draws * steps, steps))
    iterator = iter(bags)
    first = next(iterator)['input_ids'][:, 0].tolist()
    assert bags.replaying
    bags.replaying = False
    assert [first, *drawn(iterator)] == [[*range(at, at + 4)] for at in range(0, 24, 4)]


def test_it_is_the_loader_in_all_but_iteration():
    loader = numbers(12)
    bags = bag_loader(loader, 3)
    assert isinstance(bags, DataLoader)
    assert len(bags) == len(loader)
    assert bags.dataset is loader.dataset
    assert bags.batch_size == 2
    for other in (copy.copy(bags), copy.deepcopy(bags)):
        assert type(other) is DataLoader
        assert drawn(other) == drawn(loader)


def test_a_loader_of_any_type_will_do():
    batches = [collate([i]) for i in range(4)]
    assert drawn(bag_loader(batches, 2)) == [[0, 1], [2, 3]]
    assert drawn(bag_loader(iter(batches), 2)) == [[0, 1], [2, 3]]


@pytest.mark.parametrize('done', [0, 1, 2])
@pytest.mark.parametrize('resumption', [Resumption(), Resumption(4, 2), Resumption(4)])
def test_a_look_beside_the_trainers_iterator_sees_the_loaders_batches_and_changes_no_count(
    done: int, resumption: Resumption
):
    batches = [collate([i]) for i in range(12)]
    loader = bag_loader(batches, 2, limit=12, resumption=resumption)
    alone = [batch['input_ids'].tolist() for batch in bag_loader(batches, 2, limit=12, resumption=resumption)]
    steps = iter(loader)
    rows = [next(steps)['input_ids'].tolist() for _ in range(done)]
    drawn_before = loader.drawn
    assert drawn(loader) == [[i] for i in range(12)]
    assert loader.drawn == drawn_before
    assert [*rows, *(batch['input_ids'].tolist() for batch in steps)] == alone
