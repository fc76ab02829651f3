"""The tokenizer: loaded with transformers or trained here, and run on documents of any length."""

import json
import re
import sys
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from composer_tst.cli.main import CommandError

END_OF_TEXT = '<|endoftext|>'
PADDING = '<|padding|>'
# The 256 bytes and the two tokens above.
SMALLEST_VOCABULARY = 258
LARGEST_VOCABULARY = 1_000_000
# Longer documents are tokenised piece by piece, in characters.
PIECE_CHARS = 1 << 18
# What is compared on each side of a cut to know that tokens do not depend on it, in characters.
PROBE_CHARS = 256
# Where cuts are looked for, before the end of a piece, in characters; and how many are tried.
WINDOW_CHARS = 1 << 14
CUTS_TRIED = 16
# Between a word or a line end and what follows it, as pre-tokenizers cut too.
CUT = re.compile(r'(?<=\S\n)(?=\S)|(?<=\S)(?= \S)')


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer as plain strings, which any process, here or on a cluster, can be handed.

    Args:
        definition: the JSON of `tokenizers`.
        eos_id: the id of the end-of-text token.
    """

    definition: str
    eos_id: int

    @cached_property
    def backend(self) -> Tokenizer:
        """The tokenizer itself, for text only: `<|endoftext|>` within a document is text like any other.

        Raises:
            CommandError: if special tokens cannot be kept out of the reach of text.
        """
        definition = _without_special_names(json.loads(self.definition), self.eos_id)
        try:
            backend = Tokenizer.from_str(json.dumps(definition))
        except Exception as error:
            raise CommandError(
                f'--tokenizer: its special tokens cannot be told from text that spells them: {error}'
            ) from error
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def unknown_id(self) -> int | None:
        """The id of the token for what the vocabulary does not know, if there is one."""
        model = json.loads(self.definition)['model']
        if model.get('unk_id') is not None:
            return model['unk_id']
        return None if model.get('unk_token') is None else model['vocab'].get(model['unk_token'])

    @cached_property
    def may_drop(self) -> bool:
        """Whether characters may come to no token. Where every byte is one, and nothing is removed, none can."""
        return self.missing_bytes != 0 or '"removed"' in self.definition.lower() or self._changes_text

    @cached_property
    def missing_bytes(self) -> int | None:
        """How many of the 256 bytes have no token of their own; None for what is no BPE of bytes."""
        definition = _without_special_names(json.loads(self.definition), self.eos_id)
        if definition['model']['type'] != 'BPE' or '"ByteLevel"' not in json.dumps(definition['pre_tokenizer']):
            return None
        return len(set(pre_tokenizers.ByteLevel.alphabet()) - set(definition['model']['vocab']))

    @property
    def _changes_text(self) -> bool:
        normalizer = json.loads(self.definition)['normalizer']
        return normalizer is not None and normalizer['type'] not in ('NFC', 'NFD', 'NFKC', 'NFKD')

    @cached_property
    def _of_nothing(self) -> set[int]:
        """The ids of spaces as SentencePiece's kind puts them before every text."""
        return {at for token, at in self.backend.get_vocab().items() if not token.strip('▁')}

    @cached_property
    def _dropped(self) -> dict[str, bool]:
        """Whether a character comes to no token, for those that were met."""
        return {}

    def __reduce__(self) -> tuple:
        # Not the backend: its own pickling forgets `encode_special_tokens`.
        return TextTokenizer, (self.definition, self.eos_id)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Tokenise each text by itself, without end-of-text; one array[T] for each.

        Raises:
            CommandError: if the tokenizer cannot.
        """
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:
            raise CommandError(
                f'--tokenizer: it has no token for some of the text ({error}): use one with an unknown token or bytes'
            ) from error
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def count_lost(self, text: str) -> int:
        """Count the characters, but for space, that come to no token."""
        if not self.may_drop:
            return 0
        return sum(text.count(letter) for letter in set(text) if self._is_dropped(letter))

    def _is_dropped(self, letter: str) -> bool:
        if letter not in self._dropped:
            self._dropped[letter] = not letter.isspace() and self._of_nothing.issuperset(self.encode([letter])[0])
        return self._dropped[letter]

    def pieces(self, chunks: Iterable[str]) -> Iterator[str]:
        """Cut a document into pieces whose tokens, one after another, are the tokens of the whole.

        A piece is about `PIECE_CHARS` long. It is cut where the tokens on both sides are seen not to depend
        on each other. Where a tokenizer never allows that, the document stays whole, in memory too.
        """
        held: list[str] = []
        last = ''
        for chunk in chunks:
            for start in range(0, len(chunk), PIECE_CHARS):
                # There is more to come, so what came before may be cut.
                cut = self._last_cut(last)
                if cut is None:
                    held.append(last)
                    last = ''
                else:
                    yield ''.join([*held, last[: cut[0]]])
                    held, last = [], last[cut[1] :]
                last += chunk[start : start + PIECE_CHARS]
        yield ''.join([*held, last])

    def _last_cut(self, text: str) -> tuple[int, int] | None:
        """Where the last piece of a text ends that may be cut off, and where the next one begins."""
        end = len(text) - PROBE_CHARS
        cuts = [match.start() for match in CUT.finditer(text, max(end - WINDOW_CHARS, PROBE_CHARS), max(end, 0))]
        for cut in reversed(cuts[-CUTS_TRIED:]):
            before, after = text[cut - PROBE_CHARS : cut], text[cut : cut + PROBE_CHARS]
            whole, left, right = self.encode([before + after, before, after])
            if np.array_equal(whole, np.concatenate([left, right])):
                return cut, cut
            # SentencePiece's kind puts the mark of a space before every text: there it stands for the one left out.
            right = self.encode([after[1:]])[0] if after.startswith(' ') else right
            if np.array_equal(whole, np.concatenate([left, right])):
                return cut, cut + 1
        return None


def _without_special_names(definition: dict, eos_id: int) -> dict:
    """Give special tokens names that no text spells, in the vocabulary too; their ids stay.

    To encode special tokens as text keeps them from being looked for in the text, but Unigram, WordLevel,
    WordPiece, and BPE that ignores its merges, still find them in their vocabulary.
    """
    model = definition['model']
    vocabulary = model['vocab']
    is_list = isinstance(vocabulary, list)
    ids = {token: at for at, (token, _) in enumerate(vocabulary)} if is_list else vocabulary
    special = {token['content'] for token in definition['added_tokens'] if token['special']}
    special |= {token['content'] for token in definition['added_tokens'] if token['id'] == eos_id}
    special |= {token for token, at in ids.items() if at == eos_id}
    names = {token: f'{token}{uuid.uuid4().hex}' for token in special}
    if is_list:
        model['vocab'] = [[names.get(token, token), score] for token, score in vocabulary]
    else:
        model['vocab'] = {names.get(token, token): at for token, at in vocabulary.items()}
    if 'unk_token' in model:
        model['unk_token'] = names.get(model['unk_token'], model['unk_token'])
    if 'merges' in model:
        # A merge that makes such a token would be a way to it.
        pairs = [merge.split(' ') if isinstance(merge, str) else merge for merge in model['merges']]
        model['merges'] = [pair for pair in pairs if ''.join(pair) not in names]
    for token in definition['added_tokens']:
        token['content'] = names.get(token['content'], token['content'])
    # It adds special tokens, by their names, and none are asked for.
    definition['post_processor'] = None
    return definition


def check_vocabulary(size: int) -> None:
    """Refuse a vocabulary that cannot hold every byte.

    Raises:
        CommandError: if `size` is below the smallest or above the largest.
    """
    if size < SMALLEST_VOCABULARY:
        raise CommandError(f'--train-tokenizer {size}: a byte-level vocabulary needs at least {SMALLEST_VOCABULARY}')
    if size > LARGEST_VOCABULARY:
        raise CommandError(
            f'--train-tokenizer {size}: the largest vocabulary that is trained is {LARGEST_VOCABULARY:,}'
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Train byte-level BPE with end-of-text and padding tokens.

    Args:
        texts: the sample.
        vocab_size: the most ids; a small sample gives fewer, which is said.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer_options: dict = {
        'vocab_size': vocab_size,
        'special_tokens': [END_OF_TEXT, PADDING],
        'initial_alphabet': pre_tokenizers.ByteLevel.alphabet(),
        'show_progress': False,
    }
    trainer = trainers.BpeTrainer(**trainer_options)
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        print(
            f'warning: the text has no more than {size:,} tokens to learn of the {vocab_size:,} asked for',
            file=sys.stderr,
        )
    return TextTokenizer(tokenizer.to_str(), tokenizer.token_to_id(END_OF_TEXT))


def save_tokenizer(tokenizer: TextTokenizer, folder: str) -> None:
    """Save a trained tokenizer to a local folder as transformers' `PreTrainedTokenizerFast` loads it."""
    from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.definition),
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def load_tokenizer(name: str) -> TextTokenizer:
    """Load what transformers loads: a local folder or a hub name.

    Raises:
        CommandError: if there is none, if it has no end-of-text token, or no fast version.
    """
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError and others, with advice over several lines.
        why = str(error).strip().split('\n')[0]
        raise CommandError(f'--tokenizer {name}: neither a folder nor a hub name that loads: {why}') from error
    if tokenizer.eos_token_id is None:
        raise CommandError(f'--tokenizer {name}: it has no end-of-text (eos) token to join documents with')
    if not tokenizer.is_fast:
        raise CommandError(f'--tokenizer {name}: it has no fast version (a tokenizer.json)')
    loaded = TextTokenizer(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)
    model = json.loads(loaded.definition)['model']
    if model.get('dropout'):
        raise CommandError(
            f'--tokenizer {name}: it leaves out merges at random, so that no two runs would agree: '
            'set "dropout" to null in its tokenizer.json'
        )
    if loaded.unknown_id == loaded.eos_id and model['type'] != 'BPE':
        raise CommandError(f'--tokenizer {name}: its unknown token is its end-of-text token: use one that has both')
    if loaded.missing_bytes and not model.get('unk_token'):
        raise CommandError(
            f'--tokenizer {name}: its vocabulary lacks {loaded.missing_bytes} of the 256 bytes, which it would drop '
            '(special tokens do not count, for no text comes to them)'
        )
    return loaded
