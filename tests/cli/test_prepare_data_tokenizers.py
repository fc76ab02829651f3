"""Tokenizers in composer-tst prepare-data: text stays text, nothing is dropped without a word, samples repeat."""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common.preparing import L, make_text, of_split, refuse, sources_of, succeed, write_jsonl
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data import parts, tokenizer

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


def byte_level_of(pattern: str) -> tokenizer.TextTokenizer:
    """Byte-level BPE that learned merges, with another pattern before it."""
    made: Any = pre_tokenizers
    backend: Any = Tokenizer.from_str(tokenizer.train_tokenizer([make_text(n, 300) for n in range(20)], 600).definition)
    backend.pre_tokenizer = made.Sequence([
        made.Split(Regex(pattern), 'isolated'), made.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    return tokenizer.TextTokenizer(backend.to_str(), 0)


@pytest.mark.parametrize('kind', ['bytes', *range(3)])
def test_long_documents_are_cut_where_it_is_proved(kind: Any, bpe: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer, 'PIECE_CHARS', 500)
    cutting = bpe if kind == 'bytes' else byte_level_of(tokenizer.KNOWN_PATTERNS[kind])
    text = Path(argparse.__file__).read_text() + ' ' * 5000 + '\n\n\n\tx' + 'ab' * 4000 + make_text(1, 9000)
    text += 'é\u0301 \n a.\n\nb 字\n字 ждём\r\nждём  ждём\tждём 5 a 12345 b' * 300
    pieces = [piece for piece, _ in cutting.pieces(text)]
    assert ''.join(pieces) == text
    assert len(pieces) > 100
    assert np.array_equal(np.concatenate(cutting.encode(pieces)), cutting.encode([text])[0])


def test_long_documents_stay_whole_where_no_cut_is_proved(bpe: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer, 'PIECE_CHARS', 500)
    text = make_text(1, 3000)
    spaced: Any = Tokenizer.from_str(bpe.definition)
    spaced.add_tokens(['of the'])
    stripping: Any = Tokenizer.from_str(bpe.definition)
    stripping.add_tokens([AddedToken('of', rstrip=True)])
    replacing: Any = Tokenizer.from_str(bpe.definition)
    steps: Any = normalizers
    before: Any = pre_tokenizers
    replacing.normalizer = steps.Replace(' ', '')
    prefixing: Any = Tokenizer.from_str(bpe.definition)
    prefixing.pre_tokenizer = before.ByteLevel(add_prefix_space=True)
    bare: Any = Tokenizer.from_str(bpe.definition)
    bare.pre_tokenizer = before.Sequence([])
    whole = [metaspace_tokenizer(), byte_level_of(r' ?\p{L}+ ?|.')]
    for backend in (spaced, stripping, replacing, prefixing, bare):
        whole.append(tokenizer.TextTokenizer(backend.to_str(), 0))
    for each in whole:
        assert list(each.pieces(text)) == [(text, True)]


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


@pytest.mark.parametrize('special', [True, False])
@pytest.mark.parametrize('word', ['the', '!', 'naive'])
def test_an_added_token_that_is_an_ordinary_word_works(word: str, special: bool, tmp_path: Path):
    """With merges that make other words of it."""
    made: Any = models
    steps: Any = pre_tokenizers
    tokens = [EOS, *sorted(steps.ByteLevel.alphabet()), 'th', 'the', 'ther', 'there', '!!']
    merges = [('t', 'h'), ('th', 'e'), ('the', 'r'), ('ther', 'e'), ('!', '!')]
    backend: Any = Tokenizer(made.BPE({token: at for at, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = steps.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    added: Any = AddedToken(word, special=special, normalized=False)
    fast.add_tokens([added], special_tokens=special)
    fast.save_pretrained(str(tmp_path / 'tokenizer'))
    loaded = tokenizer.load_tokenizer(str(tmp_path / 'tokenizer'))
    text = f'the there !! naive {EOS} end the'
    expected: Any = fast(text, add_special_tokens=False, split_special_tokens=True)['input_ids']
    assert loaded.encode([text])[0].tolist() == expected
    assert tokens.index('there') in expected or not special
    path = write_jsonl(tmp_path / 'a.jsonl', [text] * 9)
    succeed(path, '--output', tmp_path / 'out', '--seq-len', 4, '--tokenizer', tmp_path / 'tokenizer', '--verify')


def test_an_end_of_text_that_text_makes_is_refused_before_anything_is_begun(tmp_path: Path):
    made: Any = models
    steps: Any = pre_tokenizers
    tokens = [*sorted(steps.ByteLevel.alphabet()), 'th', 'the', 'ther']
    merges = [('t', 'h'), ('th', 'e'), ('the', 'r')]
    backend: Any = Tokenizer(made.BPE({token: at for at, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = steps.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token='the').save_pretrained(str(tmp_path / 'tokenizer'))
    path = write_jsonl(tmp_path / 'a.jsonl', ['no end'])
    sentence = refuse(path, '--output', tmp_path / 'out', '--seq-len', 2, '--tokenizer', tmp_path / 'tokenizer')
    assert 'it makes end-of-text of text' in sentence
    assert not (tmp_path / 'out').exists()


def test_a_panic_of_the_library_is_a_sentence():
    class PanicException(BaseException):  # as pyo3 calls what it makes of one
        pass

    def panic() -> None:
        raise PanicException('index out of\nbounds')

    with pytest.raises(CommandError, match='^--tokenizer: index out of bounds$'):  # noqa: SIM117
        with tokenizer._in_a_sentence('--tokenizer'):
            panic()
    with pytest.raises(KeyboardInterrupt), tokenizer._in_a_sentence(''):
        raise KeyboardInterrupt


def test_an_unknown_token_that_is_end_of_text_too_is_refused(tmp_path: Path):
    made: Any = models
    vocabulary = {word: at for at, word in enumerate([EOS, 'the'])}
    folder = folder_of(tmp_path / 'tokenizer', made.WordLevel(vocabulary, unk_token=EOS), unk_token=EOS)
    path = write_jsonl(tmp_path / 'a.jsonl', ['the end'])
    sentence = refuse(path, '--output', tmp_path / 'out', '--seq-len', 2, '--tokenizer', folder)
    assert 'it makes end-of-text of text that spells it or that it does not know' in sentence


def test_a_tokenizer_that_drops_merges_at_random_is_refused(tmp_path: Path):
    made: Any = models
    vocabulary = {word: at for at, word in enumerate(words_of('th'))}
    folder = folder_of(tmp_path / 'tokenizer', made.BPE(vocabulary, [('t', 'h')], dropout=0.5, unk_token='<unk>'))
    path = write_jsonl(tmp_path / 'a.jsonl', ['the end'])
    sentence = refuse(path, '--output', tmp_path / 'out', '--seq-len', 2, '--tokenizer', folder)
    assert 'set "dropout" to null in its tokenizer.json' in sentence


def test_a_tokenizer_that_drops_what_it_does_not_know_is_refused(tmp_path: Path):
    made: Any = models
    vocabulary = {word: at for at, word in enumerate(words_of())}
    path = write_jsonl(tmp_path / 'a.jsonl', ['the naïve end'])
    arguments = [path, '--output', tmp_path / 'out', '--seq-len', 2]
    folder = folder_of(tmp_path / 'one', made.BPE(vocabulary, []))
    assert 'it would drop 256 of the 256 bytes: use one with' in refuse(*arguments, '--tokenizer', folder)
    vocabulary |= {f'<0x{byte:02X}>': 200 + byte for byte in range(100)}
    folder = folder_of(tmp_path / 'two', made.BPE(vocabulary, [], byte_fallback=True))
    assert 'it would drop 156 of the 256 bytes' in refuse(*arguments, '--tokenizer', folder)
    assert not (tmp_path / 'out').exists()


def test_byte_level_without_all_bytes_is_refused(tmp_path: Path):
    made: Any = models
    steps: Any = pre_tokenizers
    vocabulary = {word: at for at, word in enumerate(words_of())}
    folder = folder_of(tmp_path / 'tokenizer', made.BPE(vocabulary, []), pre_tokenizer=steps.ByteLevel())
    path = write_jsonl(tmp_path / 'a.jsonl', ['the end'])
    sentence = refuse(path, '--output', tmp_path / 'out', '--seq-len', 2, '--tokenizer', folder)
    assert 'it would drop 162 of the 256 bytes' in sentence


def test_a_tokenizer_without_a_token_for_the_unknown_gets_one_sentence(tmp_path: Path):
    made: Any = models
    folder = folder_of(tmp_path / 'tokenizer', made.WordLevel({'the': 0, EOS: 1}, unk_token='<none>'), unk_token=None)
    path = write_jsonl(tmp_path / 'a.jsonl', ['the end'])
    sentence = refuse(path, '--output', tmp_path / 'out', '--seq-len', 2, '--tokenizer', folder)
    assert 'for some text is neither: WordLevel error' in sentence


# Training one


def test_the_sample_is_of_the_largest_split_in_whatever_order_they_are_named(tmp_path: Path):
    texts = [make_text(number) for number in range(60)]
    source_path = write_jsonl(tmp_path / 'a.jsonl', texts)

    planned = parts.plan_parts(sources_of(source_path))
    for splits in ((('val', 0.2), ('train', 0.8)), (('train', 0.8), ('val', 0.2))):
        sampled = list(parts.sample_texts(planned, parts.Settings(L, splits)))
        assert sampled == of_split(texts, 'train', splits)


def test_the_sample_depends_on_no_time_and_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, 'PART_BYTES', 1000)
    monkeypatch.setattr(parts, 'SAMPLE_CHARS', 4000)
    samples = []
    for number, folder in enumerate(('one', 'two', 'three')):
        (tmp_path / folder).mkdir()
        path = write_jsonl(tmp_path / folder / 'a.jsonl', [make_text(at) for at in range(80)])
        os.utime(path, (number, number))
        planned = parts.plan_parts(sources_of(path))
        samples.append(list(parts.sample_texts(planned, parts.Settings(L, (('train', 1.0),)))))
    assert len(samples[0]) > 10
    assert samples[0] == samples[1] == samples[2]
