"""`fold_batch` against the fold written out with loops."""

import re
from typing import Any

import pytest
import torch
from common import reference

from composer_tst import functional as F_tst
from composer_tst.ops.fold import bag_rows, bag_targets, lay_out
from composer_tst.settings import target_weights


def make_batch(rows: int, length: int, padded: bool = False, packed: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows * 100 + length)
    ids = torch.randint(0, 50, (rows, length), generator=generator)
    batch: dict[str, Any] = {'input_ids': ids, 'labels': ids.clone()}
    batch['labels'][torch.rand(rows, length, generator=generator) < 0.1] = -100
    if padded:
        lengths = torch.randint(0, length + 1, (rows,), generator=generator)
        batch['attention_mask'] = (torch.arange(length) < lengths[:, None]).long()
    if packed:
        batch['sequence_id'] = (torch.rand(rows, length, generator=generator) < 0.2).long().cumsum(1)
        if padded:
            batch['sequence_id'][batch['attention_mask'] == 0] = -1
    return batch


SHAPES = [(s, expand, superpose) for s in (2, 3, 5, 16) for expand, superpose in [
    ('sequence', 'both'), ('batch', 'both'), ('none', 'both'),
    ('sequence', 'input'), ('batch', 'input'), ('none', 'input'), ('none', 'output'),
]]  # fmt: skip


@pytest.mark.parametrize(('bag_size', 'expand', 'superpose'), SHAPES)
@pytest.mark.parametrize('padded', [False, True])
def test_fold_equals_the_definition(bag_size: int, expand: str, superpose: str, padded: bool):
    batch = make_batch(2 * bag_size, 35, padded)
    folded = F_tst.fold_batch(batch, bag_size=bag_size, expand=expand, superpose=superpose)
    rows = reference.fold([batch], bag_size, expand, superpose)
    ids = folded['input_ids'].unsqueeze(-1) if superpose == 'output' else folded['input_ids']
    assert ids.tolist() == [[p.tokens for p in row] for row in rows]
    assert folded['labels'].tolist() == [[p.targets for p in row] for row in rows]
    if padded:
        assert folded['attention_mask'].bool().tolist() == [[any(p.attended) for p in row] for row in rows]
        if superpose != 'output':
            assert folded['bag_mask'].tolist() == [[p.attended for p in row] for row in rows]
    else:
        assert set(folded) == {'input_ids', 'labels'}


@pytest.mark.parametrize('length', [3, 4, 5])
def test_single_tokens_predict_a_bag_in_rows_shorter_than_two(length: int):
    batch = make_batch(2, length)
    folded = F_tst.fold_batch(batch, bag_size=3, expand='none', superpose='output')
    rows = reference.fold([batch], 3, 'none', 'output')
    assert folded['labels'].tolist() == [[p.targets for p in row] for row in rows]


@pytest.mark.parametrize(('bag_size', 'expand', 'superpose'), SHAPES)
@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('weighting', ['uniform', 'power_law'])
def test_rows_laid_out_stay_plain_and_bag_by_themselves(
    bag_size: int, expand: str, superpose: str, padded: bool, weighting: str
):
    """Any part of them, as a microbatch is, whose weight is that of its targets."""
    batch = make_batch(2 * bag_size, 35, padded, packed=True)
    weights = target_weights(weighting, bag_size)
    layout = lay_out(batch, bag_size, expand, superpose, weights)
    rows = reference.fold([batch], bag_size, expand, superpose)
    assert layout.positions == sum(len(row) for row in rows)
    kept = 35 if expand == 'sequence' or superpose == 'output' else 35 // bag_size * bag_size
    cut = batch.get('attention_mask', torch.ones(2 * bag_size, 35))[:, kept:]
    assert layout.dropped == int(cut.sum())
    whole = F_tst.fold_batch(batch, bag_size, expand, superpose)
    for row in range(len(rows)):
        part = {key: value[row : row + 1] for key, value in layout.batch.items()}
        assert part['input_ids'].tolist() == [[token for p in rows[row] for token in p.tokens]]
        bags = bag_rows(part, bag_size, superpose, padded=True)
        bags['labels'] = bag_targets(part['labels'], part.get('attention_mask'), bag_size, superpose)
        for key in ('input_ids', 'labels', 'attention_mask', 'sequence_id', 'bag_mask'):
            if key in bags and key in whole:
                assert torch.equal(bags[key][0], whole[key][row]), key
        weight = sum(float(weights[k]) for p in rows[row] for k in range(bag_size) if p.targets[k] != -100)
        assert float(part['loss_generating_tokens']) == pytest.approx(weight, rel=1e-6, abs=1e-11)
        attended = torch.tensor([flag for p in rows[row] for flag in p.attended])
        assert int(part['total_tokens']) == int(attended.sum())


@pytest.mark.parametrize('superpose', ['both', 'input', 'output'])
def test_no_rows(superpose: str):
    ids = torch.zeros(0, 6).long()
    batch = {'input_ids': ids, 'attention_mask': ids.bool()}
    layout = lay_out(batch, 2, 'none', superpose, torch.ones(2) / 2)
    targets = bag_targets(layout.batch['labels'], layout.batch['attention_mask'], 2, superpose)
    bags = bag_rows(layout.batch, 2, superpose, padded=False)
    assert bags['input_ids'].shape == (0, *((6,) if superpose == 'output' else (3, 2)))
    assert targets.shape == (0, 6 if superpose == 'output' else 3, 2)
    assert layout.batch['loss_generating_tokens'].shape == layout.batch['total_tokens'].shape == (0,)


@pytest.mark.parametrize('dtype', [torch.int64, torch.int32])
def test_ignored_labels_are_found_in_any_half_of_a_number(dtype: torch.dtype):
    ids = torch.arange(24, dtype=dtype).view(2, 12)
    wide = torch.zeros(2, 24, dtype=dtype)
    for labels in (ids.clone(), wide[:, ::2]):
        labels[1, 7] = -100
        batch = {'input_ids': ids, 'labels': labels}
        weights = lay_out(batch, 3, 'batch', 'both', torch.ones(3) / 3).batch['loss_generating_tokens']
        assert weights.tolist() == pytest.approx([3, 3 - 1 / 3])


def test_a_batch_without_a_target_weighs_next_to_nothing():
    ids = torch.zeros(2, 4).long()
    batch = {'input_ids': ids, 'labels': torch.full_like(ids, -100)}
    weight = lay_out(batch, 2, 'batch', 'both', torch.ones(2) / 2).batch['loss_generating_tokens']
    assert (weight > 0).all()
    assert (weight < 1e-9).all()


@pytest.mark.parametrize('expand', ['sequence', 'batch', 'none'])
@pytest.mark.parametrize('padded', [False, True])
def test_positions_share_a_sequence_exactly_when_their_last_attended_tokens_do(expand: str, padded: bool):
    batch = make_batch(6, 12, padded, packed=True)
    folded = F_tst.fold_batch(batch, bag_size=3, expand=expand)
    rows = reference.fold([batch], 3, expand)
    attended = torch.tensor([[any(p.attended) for p in row] for row in rows])
    same = folded['sequence_id'].unsqueeze(2) == folded['sequence_id'].unsqueeze(1)
    expected = torch.tensor([[[p.sequence_id == q.sequence_id for q in row] for p in row] for row in rows])
    both = attended.unsqueeze(2) & attended.unsqueeze(1)
    assert torch.equal(same[both], expected[both])
    assert (folded['sequence_id'][attended] >= 0).all()


def test_a_fully_attended_mask_needs_no_mask_for_the_bags():
    batch = make_batch(4, 8) | {'attention_mask': torch.ones(4, 8)}
    folded = F_tst.fold_batch(batch, bag_size=2)
    assert 'bag_mask' not in folded
    assert folded['attention_mask'].dtype == torch.float32
    assert folded['attention_mask'].all()


def test_llm_foundrys_lists_follow_their_rows():
    def targets(rows: list[list[reference.Position]]) -> list[int]:
        return [sum(target != -100 for position in row for target in position.targets) for row in rows]

    batch = make_batch(4, 6) | {'total_tokens': [6, 5, 4, 3], 'loss_generating_tokens': [5, 4, 3, 2]}
    joined = F_tst.fold_batch(batch, bag_size=2)
    assert joined['total_tokens'] == [11, 7]
    assert joined['loss_generating_tokens'] == targets(reference.fold([batch], 2))
    apart = F_tst.fold_batch(batch, bag_size=2, expand='batch')
    assert apart['total_tokens'] == [6, 5, 4, 3]
    assert apart['loss_generating_tokens'] == targets(reference.fold([batch], 2, expand='batch'))
    for key in ('total_tokens', 'loss_generating_tokens'):
        one = {name: value for name, value in batch.items() if name in (key, 'input_ids', 'labels', 'attention_mask')}
        folded = F_tst.fold_batch(one, bag_size=2)
        assert {name: folded[name] for name in folded if name.endswith('_tokens')} == {key: joined[key]}


def test_counts_of_tokens_stay_lists_or_tensors():
    of_rows = {'total_tokens': [6, 5, 4, 3], 'loss_generating_tokens': [5, 4, 3, 2]}
    listed, tensors = make_batch(4, 6) | of_rows, make_batch(4, 6)
    tensors |= {key: torch.tensor(counts) for key, counts in of_rows.items()}
    for fold in (
        lambda batch: F_tst.fold_batch(batch, 2),
        lambda batch: lay_out(batch, 2, 'sequence', 'both', torch.ones(2)).batch,
    ):
        lists, given = fold(listed), fold(tensors)
        assert lists['total_tokens'] == [11, 7]
        for key in of_rows:
            assert isinstance(lists[key], list)
            assert given[key].tolist() == lists[key]


@pytest.mark.parametrize('expand', ['sequence', 'batch', 'none'])
def test_token_types_and_positions_that_say_nothing_are_those_of_the_bags(expand: str):
    ids = torch.arange(18).view(3, 6)
    batch = {'input_ids': ids, 'labels': ids, 'token_type_ids': ids * 0, 'position_ids': torch.arange(6).expand(3, 6)}
    folded = F_tst.fold_batch(batch, 3, expand, 'both')
    shape = folded['input_ids'].shape[:2]
    assert torch.equal(folded['position_ids'], torch.arange(shape[1]).expand(shape))
    assert torch.equal(folded['token_type_ids'], torch.zeros(shape))
    assert (
        not {'position_ids', 'token_type_ids'} & lay_out(batch, 3, expand, 'both', takes=('position_ids',)).batch.keys()
    )
    with pytest.raises(ValueError, match='cannot fold token_type_ids'):
        F_tst.fold_batch({**batch, 'token_type_ids': ids % 2}, 3, expand, 'both')


def test_plain_values_are_kept_and_the_batch_is_not_changed():
    batch = {**make_batch(2, 4), 'use_cache': False}
    before = {key: batch[key].clone() for key in ('input_ids', 'labels')}
    assert F_tst.fold_batch(batch, bag_size=2)['use_cache'] is False
    assert all(torch.equal(batch[key], value) for key, value in before.items())


ids = torch.zeros(4, 6, dtype=torch.long)


@pytest.mark.parametrize(
    ('batch', 'settings', 'message'),
    [
        (
            {'input_ids': torch.zeros(2, 0, dtype=torch.int64)},
            {},
            r'input_ids has shape \(2, 0\): give rows with tokens',
        ),
        ({'labels': ids}, {}, 'The batch has no input_ids'),
        ({'input_ids': ids, 'labels': ids, 'inputs_embeds': ids}, {}, 'inputs_embeds'),
        ((ids, ids), {}, 'The batch is a tuple'),
        ({'input_ids': ids, 'labels': ids, 'position_ids': ids}, {}, 'cannot fold position_ids: .* give sequence_id'),
        (
            {'input_ids': ids, 'labels': ids, 'weights': ids},
            {},
            r'a bag has several tokens: if it says what to predict, say that in labels .*have the collator leave w',
        ),
        ({'input_ids': ids, 'labels': ids[:, :5]}, {}, 'labels has shape'),
        ({'input_ids': ids[0], 'labels': ids[0]}, {}, r'input_ids has shape \(6,\)'),
        ({'input_ids': ids[:3], 'labels': ids[:3]}, {}, 'the batch has 3 rows'),
        ({'input_ids': ids, 'labels': ids}, {'bag_size': 7, 'expand': 'batch'}, 'bag_size is 7 but a row has 6'),
        ({'input_ids': ids, 'labels': ids}, {'bag_size': 7, 'expand': 'none'}, 'bag_size is 7 but a row has 6'),
        ({'input_ids': ids, 'labels': ids}, {'bag_size': 4, 'expand': 'batch'}, 'no bag has a whole next one to'),
        ({'input_ids': ids, 'labels': ids}, {'bag_size': 7, 'expand': 'none', 'superpose': 'output'}, 'a row has 6'),
        ({'input_ids': ids, 'labels': ids}, {'expand': 'rows'}, "expand is 'rows'"),
        ({'input_ids': ids, 'labels': ids}, {'superpose': 'none'}, "superpose is 'none'"),
        ({'input_ids': ids, 'labels': ids}, {'superpose': 'output'}, 'set expand: none'),
    ],
)
def test_what_cannot_be_folded_is_refused_in_one_sentence(batch: Any, settings: dict[str, Any], message: str):
    settings = {'bag_size': 2} | settings
    with pytest.raises(ValueError, match=message) as caught:
        F_tst.fold_batch(batch, **settings)
    assert re.fullmatch(r'[^\n]+\.', str(caught.value))


@pytest.mark.parametrize('bag_size', [0, -2, 2.0, True, '2', None])
def test_what_is_no_bag_size_is_refused(bag_size: Any):
    ids = torch.zeros(4, 6, dtype=torch.long)
    with pytest.raises(ValueError, match=re.escape(f'bag_size is {bag_size!r}: give an integer of at least 1')):
        F_tst.fold_batch({'input_ids': ids, 'labels': ids}, bag_size)
