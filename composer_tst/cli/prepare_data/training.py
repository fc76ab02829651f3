"""The text a tokenizer is trained on: a sample that is spread over the input, and the same every time."""

import hashlib
from collections.abc import Iterator, Sequence

from composer_tst.cli.prepare_data.documents import Document, read_documents
from composer_tst.cli.prepare_data.parts import Part, Settings, choose_split

# BPE finds its merges in far less text than a corpus; in characters.
SAMPLE_CHARS = 32 << 20
DOCUMENT_CHARS = 1 << 20
LEAST_PART_CHARS = 1 << 20


def sample_texts(parts: Sequence[Part], settings: Settings) -> Iterator[str]:
    """Take documents of the largest split, the beginnings of long ones, from parts all over the input.

    What is taken depends on the text and on the plan of parts, and on neither names nor times. Bad documents
    are passed over here and dealt with when their part is converted.
    """
    # In whatever order splits are named; of two of one size, that which is called train.
    largest, _ = max(settings.splits, key=lambda split: (split[1], split[0] == 'train', split[0]))
    share = max(SAMPLE_CHARS // max(len(parts), 1), LEAST_PART_CHARS)
    left = SAMPLE_CHARS
    for number in sorted(range(len(parts)), key=lambda number: hashlib.blake2b(b'%d' % number).digest()):
        part_left = min(share, left)
        for document in _documents(parts[number], settings, largest):
            text = next(iter(document.chunks))[: min(DOCUMENT_CHARS, part_left)]
            part_left -= len(text)
            left -= len(text)
            yield text
            if part_left <= 0:
                break
        if left <= 0:
            return


def _documents(part: Part, settings: Settings, split: str) -> Iterator[Document]:
    for piece in part:
        for document in read_documents(piece, settings.text_key):
            if isinstance(document, Document) and choose_split(document.digest, settings.splits) == split:
                yield document
