"""What a user may get wrong, and the sentence that each gets, before training wherever it can be known then."""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from common.trainers import Rows, hugging_face, llama, make_trainer, mpt, random_loader
from composer import algorithms
from composer.callbacks import EarlyStopper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from composer_tst import PhaseCheckpointer, TokenSuperposition, WarmupStableDecayScheduler

BAG = {'bag_size': 4, 'duration': '0.3dur'}
NO_TIME = 'which is no Composer Time: write it as 0.3dur, 6000ba, 100000tok, 500sp or 1ep.'

SETTINGS: list[tuple[dict[str, Any], str]] = [
    # settings of token_superposition                              what it says
    ({}, 'bag_size is None and duration is None: give both'),
    ({'bag_size': 4}, 'bag_size is 4 and duration is None: give both'),
    ({'duration': '0.3dur'}, "bag_size is None and duration is '0.3dur': give both"),
    (
        BAG | {'bagsize': 4},
        'token_superposition.bagsize is no setting (did you mean bag_size?): use bag_size, duration',
    ),
    (
        BAG | {'colour': 'red'},
        'token_superposition.colour is no setting: use bag_size, duration, phases, superpose, exp',
    ),
    (BAG | {'duration': 'infba'}, f"duration is 'infba', {NO_TIME}"),
    (BAG | {'duration': 'nandur'}, 'duration is nandur, so no step would be superposed: give a positive time.'),
    ({'phases': 8}, 'phases is 8: give a list of {bag_size, until}, from coarse to fine.'),
    ({'phases': '8,4,2'}, "phases is '8,4,2': give a list of {bag_size, until}, from coarse to fine."),
    ({'phases': BAG}, "phases is {'bag_size': 4, 'duration': '0.3dur'}: give a list of {bag_size, until}"),
    (BAG | {'bag_size': 1}, 'bag_size is 1: give an integer of at least 2.'),
    (BAG | {'bag_size': 0}, 'bag_size is 0: give an integer of at least 2.'),
    (BAG | {'bag_size': -4}, 'bag_size is -4: give an integer of at least 2.'),
    (BAG | {'bag_size': 2.0}, 'bag_size is 2.0: give an integer of at least 2.'),
    (BAG | {'bag_size': 2.5}, 'bag_size is 2.5: give an integer of at least 2.'),
    (BAG | {'bag_size': '4'}, "bag_size is '4': give an integer of at least 2."),
    (BAG | {'bag_size': True}, 'bag_size is True: give an integer of at least 2.'),
    (BAG | {'duration': 0.3}, f'duration is 0.3, {NO_TIME}'),
    (BAG | {'duration': '0.3'}, f"duration is '0.3', {NO_TIME}"),
    (BAG | {'duration': '3000steps'}, f"duration is '3000steps', {NO_TIME}"),
    (BAG | {'duration': '30s'}, 'duration is 30s: give it in dur, ba, tok, sp or ep.'),
    (BAG | {'duration': '10sec'}, ': give it in dur, ba, tok, sp or ep.'),
    (BAG | {'duration': '0dur'}, 'duration is 0dur, so no step would be superposed: give a positive time.'),
    (BAG | {'duration': '-5ba'}, 'duration is -5ba, so no step would be superposed: give a positive time.'),
    (BAG | {'duration': '1dur'}, 'would last to the end and leave no recovery phase: give less than 1dur.'),
    (BAG | {'duration': '1.5dur'}, 'duration is 1.5dur, so superposition would last to the end'),
    (BAG | {'superpose': 'all'}, "superpose is 'all': use one of both, input, output."),
    (BAG | {'expand': 'rows'}, "expand is 'rows': use one of sequence, batch, none."),
    (BAG | {'superpose': 'output'}, 'so expand: sequence has no s-fold data to place: set expand: none.'),
    (BAG | {'weighting': 'powerlaw'}, "weighting is 'powerlaw': use one of uniform, power_law, exponential, first"),
    (BAG | {'weighting': None}, 'weighting is None: use one of uniform'),
    (BAG | {'weighting': 3}, 'weighting is 3: use one of uniform'),
    (BAG | {'weighting': [1, 2]}, 'weighting has 2 numbers but bag_size is 4: give one number for each target.'),
    (BAG | {'weighting': [1, 2, 3, -4]}, 'give finite numbers that are not negative'),
    (BAG | {'weighting': [0, 0, 0, 0]}, 'do not all vanish'),
    (BAG | {'weighting': ['a', 'b', 'c', 'd']}, 'or a list of numbers'),
    (BAG | {'weighting': [1, 2, 3, float('nan')]}, 'give finite numbers'),
    (BAG | {'weighting': [0, 1, 1, 1], 'superpose': 'input'}, 'input predicts the first token alone'),
    (BAG | {'phases': [{'bag_size': 4, 'until': '0.3dur'}]}, 'give phases, or bag_size and duration.'),
    ({'phases': []}, 'phases is []: give a list of {bag_size, until}, from coarse to fine.'),
    ({'phases': [8, 4, 2]}, 'A phase is 8: give it bag_size and until, and nothing else.'),
    ({'phases': [{'bag_size': 4}]}, "A phase is {'bag_size': 4}: give it bag_size and until"),
    ({'phases': [{'bag_size': 4, 'until': '1ba', 'expand': 'none'}]}, 'give it bag_size and until, and nothing else.'),
    ({'phases': [{'bag_size': 4, 'until': 'half'}]}, f"until is 'half', {NO_TIME}"),
    (
        {'phases': [{'bag_size': 2, 'until': '0.1dur'}, {'bag_size': 4, 'until': '0.3dur'}]},
        'phases go from bag_size 2 to 4: order them from coarse to fine.',
    ),
    (
        {'phases': [{'bag_size': 4, 'until': '0.3dur'}, {'bag_size': 2, 'until': '0.1dur'}]},
        'phases end at 0.3dur and then at 0.1dur: give increasing times.',
    ),
    (
        {'phases': [{'bag_size': 4, 'until': '3ba'}, {'bag_size': 2, 'until': '3ba'}]},
        'phases end at 3ba and then at 3ba: give increasing times.',
    ),
    (
        {'phases': [{'bag_size': 4, 'until': '1ba'}, {'bag_size': 2, 'until': '2ba'}], 'weighting': [1, 1, 1, 1]},
        'weighting has 4 numbers but bag_size is 2',
    ),
]

WARMUP: dict[str, Any] = {'t_warmup': '2ba'}
SCHEDULER: list[tuple[dict[str, Any], str]] = [
    # settings of warmup_stable_decay                              what it says in a run of 8 batches
    ({'t_warmup': None}, "t_warmup=None is not a Composer time; write a number and a unit, as '2000ba'."),
    ({'t_warmup': 2}, 't_warmup=2 is not a Composer time'),
    ({'t_warmup': '2 steps'}, "t_warmup='2 steps' is not a Composer time"),
    ({'t_warmup': '-1ba'}, 't_warmup=-1ba is negative; give a length of time.'),
    ({'t_warmup': '10s'}, 't_warmup=10s is on the wall clock; give it in dur, ba, tok, sp or ep.'),
    ({'t_decay': '-0.1dur'}, 't_decay=-0.1dur is negative'),
    ({'t_decay': '10s'}, 't_decay=10s is on the wall clock'),
    ({'t_decay': '2000tok'}, 't_decay=2000tok cannot be counted back from max_duration=8ba; give it in ba'),
    ({'t_decay': '9ba'}, 't_warmup=2ba and t_decay=9ba do not fit in max_duration=8ba; shorten one of them'),
    ({'t_decay': '1.5dur'}, 't_decay=1.5dur do not fit in max_duration=8ba'),
    ({'t_warmup': '0tok', 't_decay': '9ba'}, 't_warmup=0tok and t_decay=9ba do not fit in max_duration=8ba'),
    ({'t_warmup': '6ba', 't_decay': '4ba'}, 't_warmup=6ba and t_decay=4ba do not fit in max_duration=8ba'),
    ({'twarmup': '2ba'}, 'scheduler.twarmup is no setting (did you mean t_warmup?): use t_warmup, t_decay, alpha_f'),
    ({'alpha_f': '0.0'}, "alpha_f='0.0' must be a number from 0 to 1: it is a share of the learning rate."),
    ({'t_warmup': 'infba'}, "t_warmup='infba' is not a Composer time"),
    ({'scale_warmup': 'yes'}, "scale_warmup='yes' must be true or false."),
    ({'alpha_f': None}, 'alpha_f=None must be a number from 0 to 1'),
    ({'alpha_f': 1.1}, 'alpha_f=1.1 must be a number from 0 to 1'),
    ({'alpha_f': -0.1}, 'alpha_f=-0.1 must be a number from 0 to 1'),
]


def rows_of(change: Callable[[dict[str, Any]], Any], **settings: Any) -> DataLoader:
    """A loader of 12 batches whose rows are changed."""

    class Changed(Rows):
        def __getitem__(self, index: int) -> Any:
            return change(super().__getitem__(index))

    return DataLoader(Changed(48, 12), batch_size=4, drop_last=True, **settings)


def t5() -> Any:
    from composer.models import HuggingFaceModel

    sizes: dict[str, Any] = {'d_model': 16, 'd_kv': 8, 'd_ff': 16, 'num_layers': 1, 'num_heads': 2, 'vocab_size': 300}
    return HuggingFaceModel(T5ForConditionalGeneration(T5Config(**sizes)))


def llama_of(tokenizer: str) -> Any:
    words = Tokenizer(WordLevel({'[UNK]': 0}, unk_token='[UNK]'))
    model: Any = llama().model
    return hugging_face(model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, name_or_path=tokenizer))


def plus_1000(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value + 1000 for key, value in row.items()}


class Endless:
    """A loader that does not say how long it is."""

    batch_size = 4

    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(random_loader())


RUNS: list[tuple[str, dict[str, Any], str]] = [
    # what is unusual of a run of 8 batches, bags of 4 until 3ba     its settings                         what it says
    ('no recovery', {'duration': '8ba'}, 'lasts until 8ba but training ends at 8ba, so there would be no recovery'),
    ('superposed past the end', {'duration': '9ba'}, 'lasts until 9ba but training ends at 8ba'),
    ('in iterations', {'max_duration': '2iter'}, 'max_duration is 2iter: superposition needs it in ba, tok, sp or ep.'),
    ('in tokens, past the end', {'duration': '200tok', 'max_duration': '100tok'}, 'until 200tok but training ends'),
    # A step reads 4 batches of 48 tokens, so that the fifth ends both.
    ('in samples, no recovery', {'duration': '0.95dur', 'max_duration': '80sp'}, 'so there would be no recovery phase'),
    ('among the callbacks', {'callbacks': [TokenSuperposition(2, '1ba')]}, 'is in callbacks: it is an algorithm, give'),
    ('two of them', {'beside': TokenSuperposition(2, '1ba')}, 'has TokenSuperposition more than once: give'),
    ('in tokens, by the rows', {'duration': '500000tok', 'train': random_loader()}, 'until 500000tok but training'),
    ('a phase without a step', {'duration': '0.01dur'}, 'less than 1ba of 8ba: give it a later moment.'),
    ('an eval batch without labels', {'eval_dataloader': rows_of(lambda row: {'input_ids': row['input_ids']})},
     'An eval batch has no labels (it has input_ids): have the collator of the eval loader add them.'),
    ('in samples, of single batches', {'duration': '100sp', 'expand': 'none'}, 'so there would be no recovery phase'),
    ('an empty loader', {'train': random_loader(rows=3)}, 'loader has 0 batches'),
    ('a small loader', {'train': random_loader(rows=12)}, 'loader has 3 batches but one superposed step reads 4: use'),
    ('epochs without an end', {'train': Endless(), 'duration': '1ep'}, 'Superposition until 1ep may never end'),
    ('an enormous bag', {'bag_size': 10**9}, 'loader has 12 batches but one superposed step reads 1000000000: use'),
    ('rows of tuples', {'train': rows_of(lambda row: tuple(row.values()))}, 'The train loader yields list'),
    ('no labels', {'train': rows_of(lambda row: {'input_ids': row['input_ids']})},
     'The batch has no labels (it has input_ids): have the collator add them.'),
    ('a larger vocabulary', {'train': rows_of(plus_1000)},
     "but the embedding of LlamaForCausalLM has 300 rows: train on data of the model's own tokenizer, or give"),
    ('data of another tokenizer', {'model': lambda: llama_of('our-words'), 'train': rows_of(plus_1000)},
     "the embedding of LlamaForCausalLM has 300 rows: train on data of the model's own tokenizer our-words, or give"),
    ('no input_ids', {'train': rows_of(lambda row: {'labels': row['labels']})}, 'needs a mapping with input_ids'),
    ('positions', {'train': rows_of(lambda row: row | {'position_ids': torch.arange(12) // 2})},
     'cannot fold position_ids: it is not of whole rows, and a bag has several tokens: have the collator leave'),
    ('embeddings', {'train': rows_of(lambda row: row | {'inputs_embeds': torch.ones(12, 16)})}, 'give input_ids'),
    ('a short mask', {'train': rows_of(lambda row: row | {'attention_mask': torch.ones(6)})}, 'attention_mask has'),
    ('short rows', {'train': random_loader(length=6), 'expand': 'none'}, 'bag_size is 4 but a row has 6 tokens'),
    ('an encoder-decoder', {'model': t5}, 'is an encoder-decoder: use a causal (decoder-only) model.'),
    ('another method', {'beside': algorithms.LabelSmoothing()}, 'LabelSmoothing cannot be combined with Token'),
    ('a stopper', {'callbacks': [EarlyStopper('LanguageCrossEntropy', 'train')]}, 'set its dataloader_label to eval.'),
]  # fmt: skip


def one_sentence(error: BaseException, says: str) -> None:
    text = str(error)
    assert says in text
    assert '\n' not in text
    assert text.endswith('.')


@pytest.mark.parametrize(('settings', 'says'), SETTINGS)
def test_settings(settings: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        TokenSuperposition(**settings)
    one_sentence(caught.value, says)


@pytest.mark.parametrize(('settings', 'says'), SCHEDULER)
def test_scheduler(settings: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        make_trainer(llama(), random_loader(), schedulers=WarmupStableDecayScheduler(**{**WARMUP, **settings}))
    one_sentence(caught.value, says)


@pytest.mark.parametrize(('settings', 'says'), [run[1:] for run in RUNS], ids=[run[0] for run in RUNS])
def test_run(settings: dict[str, Any], says: str):
    run: dict[str, Any] = {'model': llama, 'train': random_loader(), 'callbacks': [], 'max_duration': '8ba'} | settings
    names = ('bag_size', 'duration', 'superpose', 'expand')
    bags = {'bag_size': 4, 'duration': '3ba'} | {name: run.pop(name) for name in names if name in run}
    stack = [TokenSuperposition(**bags), *([run.pop('beside')] if 'beside' in run else [])]
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        make_trainer(run.pop('model')(), run.pop('train'), stack, **run)[0].fit()
    one_sentence(caught.value, says)


def test_the_class_for_an_instance():
    stack: Any = [TokenSuperposition]
    with pytest.raises(ValueError, match='algorithms has the class TokenSuperposition: give an instance') as caught:
        make_trainer(llama(), random_loader(), stack)
    one_sentence(caught.value, 'duration=')


def test_a_setting_of_a_callback_that_has_none():
    with pytest.raises(ValueError, match='phase_checkpointer.every is no setting: it has none.'):
        PhaseCheckpointer(every='1ba')


def test_a_callback_without_its_algorithm():
    with pytest.raises(ValueError, match='saves at changes of bag size: add token_superposition to algorithms'):
        make_trainer(mpt(), random_loader(), callbacks=[PhaseCheckpointer()])
