"""Tokenizers in composer-tst prepare-data: text stays text, nothing is dropped without a word, samples repeat."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common.preparing import L, make_text, of_split, refuse, sources_of, succeed, write_jsonl
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from composer_tst.cli.prepare_data import parts, sample, tokenizer

EOS = '</s>'

pytest_plugins = ['common.preparing_fixtures']


def test_end_of_text_written_in_a_document_is_not_an_end_of_text(bpe: tokenizer.TextTokenizer):
    assert bpe.eos_id not in bpe.encode(['before<|endoftext|>after'])[0]


def metaspace_tokenizer() -> tokenizer.TextTokenizer:
    """As of Llama 2: no pre-tokenizer, and a mark at the beginning of every text."""
    vocabulary = {chr(code): code for code in range(32, 127)} | {'\n': 1, '▁': 2, '<s>': 3, '▁t': 4, '<unk>': 0}
    model: Any = models.BPE
    steps: Any = normalizers
    backend: Any = Tokenizer(model(vocabulary, [('▁', 't')], unk_token='<unk>'))
    backend.normalizer = steps.Sequence([steps.Prepend('▁'), steps.Replace(' ', '▁')])
    return tokenizer.TextTokenizer(backend.to_str(), 3)


def test_long_documents_are_cut_where_tokens_do_not_change(
    bpe: tokenizer.TextTokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokenizer, 'PIECE_CHARS', 3000)
    monkeypatch.setattr(tokenizer, 'PROBE_CHARS', 64)
    text = Path(argparse.__file__).read_text() + ' ' * 5000 + '\n\n\n\tx' + 'ab' * 4000 + make_text(1, 9000)
    chunks = [text[at : at + 7001] for at in range(0, len(text), 7001)]
    pieces = list(bpe.pieces(chunks))
    assert len(pieces) > 20
    assert np.array_equal(np.concatenate(bpe.encode(pieces)), bpe.encode([text])[0])
    marking = metaspace_tokenizer()
    pieces = list(marking.pieces(chunks))
    assert len(pieces) > 5
    assert np.array_equal(np.concatenate(marking.encode(pieces)), marking.encode([text])[0])


def words_of(*extra: str) -> list[str]:
    letters = [chr(code) for code in range(33, 127)]
    return ['<unk>', EOS, '<pad>', *letters, *extra]


def model_of(kind: str) -> Any:
    """A model that reaches its special tokens through its own vocabulary."""
    made: Any = models
    words = words_of('▁', 'the', 'end', '/s')
    vocabulary = {word: at for at, word in enumerate(words)}
    if kind == 'unigram':
        return made.Unigram([(word, 0.0 if at < 3 else -2.0) for at, word in enumerate(words)], unk_id=0)
    if kind == 'wordlevel':
        return made.WordLevel(vocabulary, unk_token='<unk>')
    if kind == 'wordpiece':
        pieces = {f'##{chr(code)}': len(words) + at for at, code in enumerate(range(33, 127))}
        return made.WordPiece(vocabulary | pieces, unk_token='<unk>')
    return made.BPE(vocabulary, [], unk_token='<unk>', ignore_merges=kind == 'ignores_merges')


def folder_of(path: Path, model: Any, **kept: Any) -> str:
    """A folder with a tokenizer of that model, which splits at spaces."""
    backend: Any = Tokenizer(model)
    steps: Any = pre_tokenizers
    backend.pre_tokenizer = kept.pop('pre_tokenizer', steps.WhitespaceSplit())
    options = {'eos_token': EOS, 'pad_token': '<pad>', 'unk_token': '<unk>'} | kept
    PreTrainedTokenizerFast(tokenizer_object=backend, **options).save_pretrained(str(path))
    return str(path)


@pytest.mark.parametrize('kind', ['unigram', 'wordlevel', 'wordpiece', 'ignores_merges', 'bpe'])
def test_text_that_spells_a_special_token_is_text(kind: str, tmp_path: Path):
    loaded = tokenizer.load_tokenizer(folder_of(tmp_path / 'tokenizer', model_of(kind)))
    ids = loaded.encode([f'the end {EOS} {EOS}{EOS} <pad> end'])[0].tolist()
    assert not {1, 2} & set(ids)
    plain = {token: at for token, at in loaded.backend.get_vocab().items() if token in ('the', 'end')}
    assert plain == {'the': words_of('▁').index('▁') + 1, 'end': words_of('▁').index('▁') + 2}
    # And through the whole command, whose count of the ends would betray one.
    path = write_jsonl(tmp_path / 'a.jsonl', [f'{number} {EOS} <pad> {EOS}' for number in range(40)])
    succeed(path, '--output', tmp_path / 'out', '--seq-len', 4, '--tokenizer', tmp_path / 'tokenizer', '--verify')


def test_a_token_that_merges_make_is_not_reached_by_them(tmp_path: Path):
    made: Any = models
    vocabulary = {word: at for at, word in enumerate(words_of('</', 's>'))}
    model = made.BPE(vocabulary, [('<', '/'), ('s', '>'), ('</', 's>')], unk_token='<unk>')
    loaded = tokenizer.load_tokenizer(folder_of(tmp_path / 'tokenizer', model))
    assert loaded.encode([EOS])[0].tolist() == [vocabulary['</'], vocabulary['s>']]


def test_an_unknown_token_that_is_end_of_text_too_is_refused(tmp_path: Path):
    made: Any = models
    vocabulary = {word: at for at, word in enumerate([EOS, 'the'])}
    folder = folder_of(tmp_path / 'tokenizer', made.WordLevel(vocabulary, unk_token=EOS), unk_token=EOS)
    path = write_jsonl(tmp_path / 'a.jsonl', ['the end'])
    sentence = refuse(path, '--output', tmp_path / 'out', '--seq-len', 2, '--tokenizer', folder)
    assert 'its unknown token is its end-of-text token' in sentence


def test_a_tokenizer_that_drops_merges_at_random_is_refused(tmp_path: Path):
    made: Any = models
    vocabulary = {word: at for at, word in enumerate(words_of('th'))}
    folder = folder_of(tmp_path / 'tokenizer', made.BPE(vocabulary, [('t', 'h')], dropout=0.5, unk_token='<unk>'))
    path = write_jsonl(tmp_path / 'a.jsonl', ['the end'])
    sentence = refuse(path, '--output', tmp_path / 'out', '--seq-len', 2, '--tokenizer', folder)
    assert 'set "dropout" to null in its tokenizer.json' in sentence


def test_what_a_tokenizer_drops_is_counted_and_said(tmp_path: Path):
    made: Any = models
    vocabulary = {word: at for at, word in enumerate(words_of())}
    folder = folder_of(tmp_path / 'tokenizer', made.BPE(vocabulary, []))
    path = write_jsonl(tmp_path / 'a.jsonl', ['the naïve end', 'of 東京 and ☃', 'plain'])
    common = ['--seq-len', 2, '--tokenizer', folder, '--split', 'train=1']
    result = succeed(path, '--output', tmp_path / 'out', *common)
    stats = json.loads((tmp_path / 'out' / 'stats.json').read_text())['splits']['train']
    assert stats['characters'] == len('the naïve endof 東京 and ☃plain')
    assert stats['lost_characters'] == len('ï東京☃')
    assert 'warning: 4 characters of split train, 13.79%, have no token' in result.stderr


def test_unknown_tokens_are_counted_and_said(tmp_path: Path):
    folder = folder_of(tmp_path / 'tokenizer', model_of('wordlevel'))
    path = write_jsonl(tmp_path / 'a.jsonl', ['the end', 'the naïve end 東京'])
    result = succeed(path, '--output', tmp_path / 'out', '--seq-len', 2, '--tokenizer', folder, '--split', 'train=1')
    assert json.loads((tmp_path / 'out' / 'stats.json').read_text())['splits']['train']['unknown_tokens'] == 2
    assert 'warning: 25.00% of the tokens of split train are the unknown token' in result.stderr


def test_byte_level_without_all_bytes_is_refused(tmp_path: Path):
    made: Any = models
    steps: Any = pre_tokenizers
    vocabulary = {word: at for at, word in enumerate(words_of())}
    folder = folder_of(tmp_path / 'tokenizer', made.BPE(vocabulary, []), pre_tokenizer=steps.ByteLevel())
    path = write_jsonl(tmp_path / 'a.jsonl', ['the end'])
    sentence = refuse(path, '--output', tmp_path / 'out', '--seq-len', 2, '--tokenizer', folder)
    assert 'its vocabulary lacks 162 of the 256 bytes' in sentence


def test_a_tokenizer_without_a_token_for_the_unknown_gets_one_sentence(tmp_path: Path):
    made: Any = models
    folder = folder_of(tmp_path / 'tokenizer', made.WordLevel({'the': 0, EOS: 1}, unk_token='<none>'), unk_token=None)
    path = write_jsonl(tmp_path / 'a.jsonl', ['the end'])
    sentence = refuse(path, '--output', tmp_path / 'out', '--seq-len', 2, '--tokenizer', folder)
    assert sentence.startswith('--tokenizer: it has no token for some of the text (WordLevel error')


# Training one


def test_the_sample_is_of_the_largest_split_in_whatever_order_they_are_named(tmp_path: Path):
    texts = [make_text(number) for number in range(60)]
    source_path = write_jsonl(tmp_path / 'a.jsonl', texts)

    planned = parts.plan_parts(sources_of(source_path))
    for splits in ((('val', 0.2), ('train', 0.8)), (('train', 0.8), ('val', 0.2))):
        sampled = list(sample.sample_texts(planned, parts.Settings(L, splits, 'text', False)))
        assert sampled == of_split(texts, 'train', splits)


def test_the_sample_depends_on_no_time_and_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, 'PART_BYTES', 1000)
    monkeypatch.setattr(sample, 'LEAST_PART_CHARS', 100)
    monkeypatch.setattr(sample, 'SAMPLE_CHARS', 4000)
    samples = []
    for number, folder in enumerate(('one', 'two', 'three')):
        (tmp_path / folder).mkdir()
        path = write_jsonl(tmp_path / folder / 'a.jsonl', [make_text(at) for at in range(80)])
        os.utime(path, (number, number))
        planned = parts.plan_parts(sources_of(path))
        samples.append(list(sample.sample_texts(planned, parts.Settings(L, (('train', 1.0),), 'text', False))))
    assert len(samples[0]) > 10
    assert samples[0] == samples[1] == samples[2]


def test_fewer_tokens_than_asked_are_said(tmp_path: Path):
    path = write_jsonl(tmp_path / 'a.jsonl', ['the end of it all'] * 3)
    result = succeed(path, '--output', tmp_path / 'out', '--seq-len', 2, '--train-tokenizer', 5000)
    assert 'tokens to learn of the 5,000 asked for' in result.stderr


def byte_level(tmp_path: Path, **settings: Any) -> str:
    """Byte-level BPE without merges."""
    made: Any = models
    steps: Any = pre_tokenizers
    vocabulary = {word: at for at, word in enumerate([EOS, *sorted(steps.ByteLevel.alphabet())])}
    settings = {'pre_tokenizer': steps.ByteLevel(add_prefix_space=False)} | settings
    return folder_of(tmp_path / 'tokenizer', made.BPE(vocabulary, []), unk_token=None, **settings)


def test_a_special_token_that_is_a_byte_is_refused(tmp_path: Path):
    path = write_jsonl(tmp_path / 'a.jsonl', ['the end!'])
    arguments = [path, '--output', tmp_path / 'out', '--seq-len', 2, '--split', 'train=1']
    sentence = refuse(*arguments, '--tokenizer', byte_level(tmp_path, pad_token='!'))
    assert 'its vocabulary lacks 1 of the 256 bytes' in sentence


def test_what_is_removed_before_bytes_are_made_is_counted(tmp_path: Path):
    steps: Any = pre_tokenizers
    removing = steps.Sequence([steps.Split(Regex('[0-9]'), 'removed'), steps.ByteLevel(add_prefix_space=False)])
    path = write_jsonl(tmp_path / 'a.jsonl', ['1984 and 42', 'no digit'])
    arguments = [path, '--output', tmp_path / 'out', '--seq-len', 2, '--split', 'train=1']
    result = succeed(*arguments, '--tokenizer', byte_level(tmp_path, pre_tokenizer=removing))
    assert 'warning: 6 characters of split train' in result.stderr


def test_what_a_fallback_to_some_bytes_drops_is_counted(tmp_path: Path):
    made: Any = models
    letters = [EOS, *'aehnotd ', *(f'<0x{byte:02X}>' for byte in '𒀀𓀀𐤀ꙮ'.encode())]
    vocabulary = {word: at for at, word in enumerate(dict.fromkeys(letters))}
    folder = folder_of(tmp_path / 'tokenizer', made.BPE(vocabulary, [], byte_fallback=True), unk_token=None)
    path = write_jsonl(tmp_path / 'a.jsonl', ['the 東京 end', '𒀀 the one'])
    result = succeed(path, '--output', tmp_path / 'out', '--seq-len', 2, '--tokenizer', folder, '--split', 'train=1')
    assert 'warning: 2 characters of split train' in result.stderr


@pytest.mark.parametrize(
    ('size', 'limit'), [(10, 'at least 258'), (257, 'at least 258'), (10**12, 'the largest'), (10**20, 'the largest')]
)
def test_a_vocabulary_of_no_sensible_size_is_refused_before_anything_is_written(size: int, limit: str, tmp_path: Path):
    path = write_jsonl(tmp_path / 'a.jsonl', ['the end'])
    sentence = refuse(path, '--output', tmp_path / 'out', '--seq-len', 2, '--train-tokenizer', size)
    assert sentence.startswith(f'--train-tokenizer {size}: ')
    assert limit in sentence
    assert not (tmp_path / 'out').exists()
