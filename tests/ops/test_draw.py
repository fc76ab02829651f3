"""Drawing several batches of a loader as one: each row once, nothing ahead, tails counted."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from composer_tst import functional as F_tst
from composer_tst.ops.draw import join_batches

LENGTH = 4


class Rows(torch.utils.data.Dataset):
    """Row i is LENGTH times the number i."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {'input_ids': torch.full((LENGTH,), index)}


def loader(rows: int, batch_size: int = 2, **settings: Any) -> DataLoader:
    return DataLoader(Rows(rows), batch_size=batch_size, **settings)


def rows_of(batch: Any) -> list[int]:
    return batch['input_ids'][:, 0].tolist()


class Counting:
    """Counts what it gave, and how often it was begun."""

    def __init__(self, batches: Any):
        self.batches, self.given, self.begun = batches, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.begun += 1
        for batch in self.batches:
            self.given += 1
            yield batch


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('drop_last', [False, True])
def test_over_a_switch_inside_an_epoch_each_row_is_read_once(drop_last: bool, workers: int):
    batches = F_tst.draw(loader(21, drop_last=drop_last, num_workers=workers), lambda step: 3 if step < 2 else 1)
    seen, sizes = [], []
    for batch in batches:
        folded = F_tst.fold_batch(batch, batches.bag_size)
        assert folded['input_ids'].shape == (2, LENGTH, batches.bag_size) or len(batch['input_ids']) == 1
        seen += rows_of(batch)
        sizes.append(batches.bag_size)
    assert seen == list(range(20 if drop_last else 21))
    assert sizes == [3, 3] + [1] * (4 if drop_last else 5)
    assert batches.left_out == 0


def test_bag_sizes_from_coarse_to_fine():
    batches = F_tst.draw(loader(40), lambda step: [4, 4, 2, 2][step] if step < 4 else 1)
    seen = [rows_of(batch) for batch in batches]
    assert [len(rows) for rows in seen] == [8, 8, 4, 4] + [2] * 8
    assert [row for rows in seen for row in rows] == list(range(40))


def test_nothing_is_read_ahead():
    given = Counting(list(loader(20)))
    batches = F_tst.draw(given, lambda step: 3 if step < 2 else 1)
    assert given.given == given.begun == 0
    for step, _ in enumerate(batches):
        assert given.given == [3, 6, 7, 8, 9, 10][step]
    assert given.begun == 1


def test_the_bag_size_is_asked_for_when_the_step_is_drawn():
    size = 3
    batches = F_tst.draw(loader(20), lambda step: size)
    drawn = iter(batches)
    assert rows_of(next(drawn)) == [0, 1, 2, 3, 4, 5]
    size = 1
    assert batches.bag_size == 3
    assert rows_of(next(drawn)) == [6, 7]
    assert batches.bag_size == 1


def test_an_iterator_goes_on_where_it_stands():
    given = iter(loader(20))
    assert rows_of(next(given)) == [0, 1]
    batches = F_tst.draw(given, 2)
    for batch in batches:
        assert rows_of(batch) == [2, 3, 4, 5]
        break
    assert rows_of(next(given)) == [6, 7]
    assert [rows_of(batch) for batch in batches] == [[8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19]]
    assert list(batches) == []
    assert batches.left_out == 0


class OwnIterator:
    """A loader that is its own iterator: each ``iter()`` begins an epoch anew."""

    def __init__(self, batches: list[Any]):
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        self.at = 0
        return self

    def __next__(self) -> Any:
        if self.at == len(self.batches):
            raise StopIteration
        self.at += 1
        return self.batches[self.at - 1]


def test_a_loader_that_is_its_own_iterator_is_begun_once_an_epoch():
    batches = F_tst.draw(OwnIterator(list(loader(16))), lambda step: 3 if step % 3 < 2 else 1)
    epoch = [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13]]
    for times in (1, 2):
        assert [rows_of(batch) for batch in itertools.islice(batches, 9)] == epoch  # begun anew, it would never end
        assert batches.left_out == 2 * times


def one_dict(batches: list[Any]) -> Iterator[Any]:
    filled: dict[str, Any] = {}
    for batch in batches:
        filled.update(batch)
        yield filled


def buffers(count: int) -> Any:
    """Batches that are each filled into one of some buffers, in turn."""

    def refill(batches: list[Any]) -> Iterator[Any]:
        kept = [{key: torch.zeros_like(value) for key, value in batches[0].items()} for _ in range(count)]
        for number, batch in enumerate(batches):
            for key, buffer in (filled := kept[number % count]).items():
                buffer.copy_(batch[key])
            yield filled

    return refill


def numpy_buffer(batches: list[Any]) -> Iterator[Any]:
    filled = np.zeros(batches[0]['input_ids'].shape, dtype=np.int64)
    for batch in batches:
        filled[:] = batch['input_ids'].numpy()
        yield {**batch, 'input_ids': torch.from_numpy(filled)}


def labels_in_one_buffer(batches: list[Any]) -> Iterator[Any]:
    filled = torch.zeros_like(batches[0]['labels'])
    for batch in batches:
        filled.copy_(batch['labels'])
        yield {**batch, 'labels': filled}


def totals_in_one_list(batches: list[Any]) -> Iterator[Any]:
    filled: list[int] = []
    for batch in batches:
        filled[:] = rows_of(batch)
        yield {**batch, 'total_tokens': filled}


@pytest.mark.parametrize(
    'refill', [one_dict, buffers(1), buffers(2), numpy_buffer, labels_in_one_buffer, totals_in_one_list]
)
def test_a_loader_may_fill_one_batch_again_and_again(refill: Any):
    given = [{**batch, 'labels': batch['input_ids'].clone()} for batch in loader(16)]
    batches = F_tst.draw(refill(given), lambda step: 3 if step < 2 else 1)
    for batch, rows in zip(batches, ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]), strict=False):
        assert rows_of(batch) == batch['labels'][:, 0].tolist() == batch.get('total_tokens', rows) == rows


def test_one_batch_may_come_many_times():
    batch = next(iter(loader(2)))
    assert [rows_of(step) for step in F_tst.draw([batch] * 4, 2)] == [[0, 1, 0, 1]] * 2


def test_steps_and_what_is_left_out_are_counted_over_epochs():
    asked = []

    def size(step: int) -> int:
        asked.append(step)
        return 3 if step < 5 else 1

    batches = F_tst.draw(loader(15, shuffle=False), size)
    epochs = [[rows_of(batch) for batch in batches] for _ in range(3)]
    # 8 batches, the last of one row: two steps of 3, and one of 2 batches that is left out.
    assert epochs[0] == epochs[1] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert epochs[2] == [[0, 1, 2, 3, 4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14]]
    assert batches.left_out == 2 * 3
    assert sorted(set(asked)) == list(range(11))
    assert batches.bag_size == 1


def test_rows_of_a_smaller_last_batch_that_cannot_be_joined_are_left_out():
    batches = F_tst.draw(loader(11), 3)
    seen = []
    for batch in batches:
        seen.append(rows_of(batch))
        F_tst.fold_batch(batch, 3)
    assert seen == [[0, 1, 2, 3, 4, 5], [6, 7, 8]]
    assert batches.left_out == 2
    batches = F_tst.draw(loader(11, drop_last=True), 3)
    assert [rows_of(batch) for batch in batches] == [[0, 1, 2, 3, 4, 5]]
    assert batches.left_out == 4
    assert list(F_tst.draw([{'input_ids': torch.zeros(1, 4)}, {'input_ids': torch.zeros(0, 4)}], 2)) == []


def test_the_bag_size_is_that_of_the_batch_drawn_last_also_after_a_tail():
    batches = F_tst.draw(loader(6), lambda step: 2 if step < 1 else 3)
    assert batches.bag_size == 2
    assert [rows_of(batch) for batch in batches] == [[0, 1, 2, 3]]
    assert batches.bag_size == 2
    assert batches.left_out == 2


def test_a_stream_without_a_length():
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            yield from ({'input_ids': torch.full((LENGTH,), i)} for i in range(10))

    batches = F_tst.draw(DataLoader(Stream(), batch_size=2), 2)
    assert [len(rows_of(batch)) for batch in batches] == [4, 4]
    assert batches.left_out == 2


def test_bags_of_one_token_are_the_loaders_own_batches():
    """Of any kind, as plain training takes them."""
    given = [{'input_ids': torch.zeros(2, 3)}, (1, 2), {'x': None}, torch.zeros(3)]
    assert all(mine is theirs for mine, theirs in zip(F_tst.draw(given, 1), given, strict=True))


def test_tensors_lists_strings_and_plain_values():
    given = [
        {
            'input_ids': torch.full((2, 3), i),
            'attention_mask': torch.ones(2, 3),
            'total_tokens': [i, i],
            'urls': ('a', 'b'),
            'source': 'web',
            'scale': 0.5,
            'flag': True,
            'temperature': torch.tensor(2.0),
        }
        for i in range(3)
    ]
    per_row = ('input_ids', 'attention_mask', 'total_tokens', 'urls')
    given[2] |= {key: given[2][key][:1] for key in per_row}
    batches = F_tst.draw(given, 3)
    (batch,) = batches
    assert rows_of(batch) == [0, 0, 1]
    assert batch['attention_mask'].shape == (3, 3)
    assert batch['total_tokens'] == [0, 0, 1]
    assert batch['urls'] == ['a', 'b', 'a']
    assert (batch['source'], batch['scale'], batch['flag'], float(batch['temperature'])) == ('web', 0.5, True, 2.0)
    assert batches.left_out == 2


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ([(1, 2)] * 2, 'The train loader yields tuple: superposition needs a mapping with input_ids'),
        ([{'ids': 1}] * 2, 'The train loader yields ids: superposition needs a mapping with input_ids'),
        ([(1, 2)], 'The train loader yields tuple'),  # also in a tail
        (
            [{'input_ids': torch.zeros(2, 3)}, {'input_ids': torch.zeros(2, 4)}],
            'input_ids comes in shapes .* pad every',
        ),
        (
            [{'input_ids': torch.zeros(2, 3)}, {'input_ids': None}],
            'yields input_ids as NoneType: superposition needs a',
        ),
        ([{'input_ids': torch.zeros(2, 3), 'n': n} for n in (1, 2)], r'n differs between the batches of one step'),
        ([{'input_ids': torch.zeros(2, 3), 'n': torch.tensor(n)} for n in (1.0, 2.0)], 'n differs'),
        ([{'input_ids': torch.zeros(2, 3)}, {'input_ids': torch.zeros(2, 3), 'mask': 1}], 'another input_ids, mask'),
        ([{'input_ids': torch.zeros(2, 3), 'n': 1}, {'input_ids': torch.zeros(2, 3)}], 'one has input_ids, n, another'),
        *(
            (
                [{'input_ids': torch.zeros(2, 3), 'n': n}] * 2,
                f'cannot fold n: it is a {kind}: have the collator leave it',
            )
            for n, kind in ((None, 'NoneType'), ({'a': 1}, 'dict'), (np.zeros(1), 'ndarray'))
        ),
        ([{'input_ids': torch.zeros(2, 3), 'attention_mask': None}] * 2, 'cannot fold attention_mask'),
    ],
)
def test_batches_that_do_not_fit_together_are_refused(given: list[Any], message: str):
    with pytest.raises(ValueError, match=message):
        list(F_tst.draw(given, 2))


def odd_values(number: int) -> dict[str, Any]:
    """Values that the batches of one step differ in, or that are not of rows."""
    return {
        'number': number,
        'source': f'shard {number}',
        'meta': {'url': 'a'},
        'array': np.zeros(2),
        'nothing': None,
        'widths': torch.zeros(2, 3 + number),
        **({'flag': torch.ones(2)} if number % 2 == 0 else {}),
    }


@pytest.mark.parametrize('takes', [('input_ids',), ('input_ids', *odd_values(0))])
def test_values_that_cannot_be_joined_are_left_out_if_the_model_does_not_take_them(takes: tuple[str, ...]):
    for key in odd_values(0):
        given = [
            {**batch, **{name: value for name, value in odd_values(number).items() if name == key}}
            for number, batch in enumerate(loader(6))
        ]
        if key in takes:
            with pytest.raises(ValueError, match=key):
                join_batches(given, 3, takes=takes)
        else:
            batch, _ = join_batches(given, 3, takes=takes)
            assert batch is not None
            assert list(batch) == ['input_ids']


@pytest.mark.parametrize('bag_size', [0, -1, '6', 2.0, None, True, torch.tensor(2)])
def test_bag_sizes_that_are_none_are_refused_at_once_and_when_drawn(bag_size: Any):
    message = r'bag_size is .*: give an integer of at least 1'
    with pytest.raises(ValueError, match=message):
        F_tst.draw([], bag_size)
    with pytest.raises(ValueError, match=message):
        F_tst.draw([], lambda step: bag_size)
    batches = F_tst.draw(loader(8), lambda step: bag_size if step else 2)
    with pytest.raises(ValueError, match=message):
        list(batches)
