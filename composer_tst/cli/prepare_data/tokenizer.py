"""The tokenizer: loaded with transformers or trained here, and run on documents of any length."""

import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from composer_tst.cli.main import CommandError
from composer_tst.cli.prepare_data.errors import reason

END_OF_TEXT = '<|endoftext|>'
PADDING = '<|padding|>'
# Longer documents are tokenised piece by piece, if the tokenizer allows it; in characters.
PIECE_CHARS = 1 << 18

# Letters of every version of Unicode, of scripts with and without case.
_LETTERS = 'A-Za-zÀ-ÖØ-öø-ƿΑ-ΡΣ-ωА-яא-תا-يぁ-ゔァ-ヺ一-龥가-힣'
# Between two words, before the space or the line end: where the pre-tokenizers below split whatever is around.
CUT = re.compile(f'(?<=[{_LETTERS}])(?=[ \n][{_LETTERS}])')
# Patterns in which no match holds a letter before a space or a line end: of GPT-2, Llama 3 and GPT-4, and Qwen.
_TAIL = r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
KNOWN_PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    _HEAD + '{1,3}' + _TAIL,
    _HEAD + _TAIL,
)


@contextmanager
def _in_a_sentence(what: str) -> Iterator[None]:
    """Say why the library failed, whose panics are no `Exception`."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == 'PanicException':
            raise CommandError(f'{what}: {reason(error)}') from error
        raise


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
            CommandError: if it cannot be built so.
        """
        definition = _without_special_names(json.loads(self.definition), self.eos_id)
        with _in_a_sentence('--tokenizer: its special tokens cannot be told from text that spells them'):
            backend = Tokenizer.from_str(json.dumps(definition))
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def is_cut(self) -> bool:
        """Whether a long text may be cut at `CUT`, which is proved for byte-level BPE of the usual patterns.

        Models see one pre-token at a time. So it is proved if the pre-tokenizer splits there whatever is on both
        sides, no normalizer looks across, and no added token holds or takes the space.
        """
        definition: dict[str, Any] = json.loads(self.definition)
        added = [token for token in definition['added_tokens'] if not token['special']]
        before: dict = definition['pre_tokenizer'] or {'type': None}
        first, *rest = before.get('pretokenizers') or [before]  # a sequence may be empty
        if first['type'] == 'Split':
            splits = first['behavior'] == 'Isolated' and first['pattern'].get('Regex') in KNOWN_PATTERNS
        else:
            # A space put before every text would come before a piece that begins with a line end.
            splits = first['type'] == 'ByteLevel' and first.get('use_regex', True) and not first['add_prefix_space']
        return (
            splits
            and all(step['type'] == 'ByteLevel' for step in rest)
            # Some other normalizers make a letter and a mark of a letter.
            and (definition['normalizer'] or {'type': 'NFC'})['type'] == 'NFC'
            and not any(token['lstrip'] or token['rstrip'] or re.search(r'\s', token['content']) for token in added)
        )

    def __reduce__(self) -> tuple:
        # Not the backend: its own pickling forgets `encode_special_tokens`.
        return TextTokenizer, (self.definition, self.eos_id)

    def encode(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Tokenise each text by itself, without end-of-text; one array[T] for each.

        Raises:
            CommandError: if the tokenizer cannot, or makes end-of-text of text.
        """
        with _in_a_sentence('--tokenizer: use one with an unknown token or bytes, for some text is neither'):
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        tokens = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        if any((ids == self.eos_id).any() for ids in tokens):
            raise CommandError(
                '--tokenizer: it makes end-of-text of text that spells it or that it does not know: '
                'use one that keeps an id for the ends of documents'
            )
        return tokens

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Cut a document into pieces whose tokens, one after another, are the tokens of the whole; say which is last.

        A piece is about `PIECE_CHARS` long. If no cut is proved, the document stays whole.
        """
        start = 0
        while self.is_cut and (cut := CUT.search(text, start + PIECE_CHARS)):
            yield text[start : cut.start()], False
            start = cut.start()
        yield text[start:], True


def _without_special_names(definition: dict, eos_id: int) -> dict:
    """Give special tokens names that no text spells, in the vocabulary too; their ids stay.

    To encode special tokens as text keeps them from being looked for in the text, but Unigram, WordLevel,
    WordPiece, and BPE that ignores its merges, still find them in their vocabulary. What is an ordinary word, byte
    or part of others keeps its name, and text that spells it is that token.
    """
    model, added = definition['model'], definition['added_tokens']
    is_list = isinstance(model['vocab'], list)
    vocabulary = model['vocab'] if is_list else list(model['vocab'].items())
    pairs = [merge.split(' ', 1) if isinstance(merge, str) else merge for merge in model.get('merges', [])]
    special = {token['content'] for token in added if token['special'] and not token['content'].isalnum()}
    special |= {token['content'] for token in added if token['id'] == eos_id}
    special |= {token for at, (token, number) in enumerate(vocabulary) if (at if is_list else number) == eos_id}
    special -= {part for pair in pairs for part in pair} | set(pre_tokenizers.ByteLevel.alphabet())
    names = {token: f'{token}{uuid.uuid4().hex}' for token in special}
    renamed = [(names.get(token, token), value) for token, value in vocabulary]
    model['vocab'] = renamed if is_list else dict(renamed)
    if 'unk_token' in model:
        model['unk_token'] = names.get(model['unk_token'], model['unk_token'])
    if 'merges' in model:
        # A merge that makes such a token would be a way to it.
        model['merges'] = [pair for pair in pairs if ''.join(pair) not in names]
    for token in added:
        token['content'] = names.get(token['content'], token['content'])
    # It adds special tokens, by their names, and none are asked for.
    definition['post_processor'] = None
    return definition


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Train byte-level BPE with end-of-text and padding tokens.

    Args:
        texts: the sample.
        vocab_size: the most ids; a small sample gives fewer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    options: dict = {
        'vocab_size': vocab_size,
        'special_tokens': [END_OF_TEXT, PADDING],
        'initial_alphabet': pre_tokenizers.ByteLevel.alphabet(),
        'show_progress': False,
    }
    with _in_a_sentence('--train-tokenizer'):
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**options))
    return TextTokenizer(tokenizer.to_str(), tokenizer.token_to_id(END_OF_TEXT))


def files_of(tokenizer: TextTokenizer) -> dict[str, str]:
    """The files, by name, of which transformers loads a trained tokenizer."""
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'eos_token': END_OF_TEXT,
        'pad_token': PADDING,
        'clean_up_tokenization_spaces': False,
    }
    return {'tokenizer.json': tokenizer.definition, 'tokenizer_config.json': json.dumps(config, indent=2)}


def load_tokenizer(name: str) -> TextTokenizer:
    """Load what transformers loads, a local folder or a hub name, and build what runs here.

    Raises:
        CommandError: if there is none, or if it cannot be used.
    """
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    path = os.path.expanduser(name)
    kind = 'this folder does not load' if os.path.isdir(path) else 'there is no such folder, nor a hub name that loads'
    with _in_a_sentence(f'--tokenizer {name}: {kind}'):
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
        definition = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ''
    if tokenizer.eos_token_id is None:
        raise CommandError(f'--tokenizer {name}: it has no end-of-text (eos) token to join documents with')
    if not definition:
        raise CommandError(f'--tokenizer {name}: it has no fast version (a tokenizer.json)')
    loaded = TextTokenizer(definition, tokenizer.eos_token_id)
    if problem := _problem(loaded):
        raise CommandError(f'--tokenizer {name}: {problem}')
    loaded.encode([tokenizer.eos_token, f'a {tokenizer.eos_token} b'])
    return loaded


def _problem(loaded: TextTokenizer) -> str:
    """What of a text a tokenizer would drop, or do otherwise in each run; empty if nothing."""
    definition = json.loads(loaded.definition)
    model = definition['model']
    if model.get('dropout'):
        return 'it leaves out merges at random: set "dropout" to null in its tokenizer.json'
    if model['type'] != 'BPE' or model.get('unk_token'):
        return ''
    # No text comes to special tokens, and one of these may be all there is of a byte.
    known = loaded.backend.get_vocab(with_added_tokens=False).keys()
    missing = {f'<0x{byte:02X}>' for byte in range(256)} - (known if model.get('byte_fallback') else set())
    if '"ByteLevel"' in json.dumps([definition['pre_tokenizer'], definition['normalizer']]):
        missing = set(pre_tokenizers.ByteLevel.alphabet()) - known
    advice = 'use one with all of them or an unknown token'
    return f'it would drop {len(missing)} of the 256 bytes: {advice}' if missing else ''
