"""The pages: short sentences, few numbers, and every link leads somewhere."""

import re
from pathlib import Path

import pytest
from common import REPO

from tools import draw_method

OTHERS = ('.', 'data', 'runs', 'build', 'dist')  # hidden ones too: pytest's cache has a page
PAGES = sorted(path for path in REPO.rglob('*.md') if not path.relative_to(REPO).parts[0].startswith(OTHERS))


# The words that nine of ten sentences have at most.
LONGEST = {
    'README.md': 25,
    'docs/method_card.md': 25,
    'docs/compatibility.md': 28,
    'docs/resuming.md': 28,
    'CONTRIBUTING.md': 28,
}
NUMBERS_IN_100_WORDS = 5


def sentences(text: str) -> list[str]:
    """A page's sentences, outside headings, code blocks, tables and pictures; of a link, its words."""
    text = re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)
    text = re.sub(r'^(#|\||!\[).*$', '', text, flags=re.M)
    text = re.sub(r'\]\([^)]*\)', ']', text)
    text = re.sub(r'^\s*(- |\d+\. )', '\n', text, flags=re.M)  # an item is a paragraph
    paragraphs = [re.sub(r'\s+', ' ', paragraph).strip() for paragraph in re.split(r'\n\s*\n', text)]
    return [
        sentence for paragraph in paragraphs for sentence in re.split(r'(?<=[.?!])[*)]* (?=\S)', paragraph) if sentence
    ]


def words(sentence: str) -> list[str]:
    """Its words; signs that stand alone are none."""
    return [word for word in sentence.split() if re.search(r'\w', word)]


def numbers(sentence: str) -> list[str]:
    """Those in figures, in code and with units too, but not in names such as FSDP2."""
    return re.findall(r'(?<![\w.,])\d[\d.,]*', sentence)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r'^#+ (.+)$', path.read_text(), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('path', PAGES, ids=lambda path: str(path.relative_to(REPO)))
def test_every_link_leads_somewhere(path: Path):
    for link in re.findall(r'\]\(([^)\s]+)\)', path.read_text()):
        if link.startswith('https://'):
            continue
        name, _, anchor = link.partition('#')
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_sentences_and_their_numbers_are_counted():
    page = '# 1\n\nOne [two](https://3.org/4) `0.5dur`. Of FSDP2:\n\n- 6,000 + 7?\n\n| 8 |\n\n```\n9.\n```\n'
    assert sentences(page) == ['One [two] `0.5dur`.', 'Of FSDP2:', '6,000 + 7?']
    assert [len(words(sentence)) for sentence in sentences(page)] == [3, 2, 2]
    assert [numbers(sentence) for sentence in sentences(page)] == [['0.5'], [], ['6,000', '7']]


@pytest.mark.parametrize('page', LONGEST)
def test_a_page_reads_at_once(page: str):
    said = sentences((REPO / page).read_text())
    long = [sentence for sentence in said if len(words(sentence)) > LONGEST[page]]
    assert len(long) <= len(said) / 10, long
    count = sum(len(words(sentence)) for sentence in said)
    found = [sentence for sentence in said if numbers(sentence)]
    assert sum(len(numbers(sentence)) for sentence in found) <= count * NUMBERS_IN_100_WORDS / 100, found


def test_the_first_page_is_short():
    assert len((REPO / 'README.md').read_text().splitlines()) <= 150


def test_the_drawing_is_what_its_script_draws():
    assert (REPO / 'docs' / 'method.svg').read_text() == draw_method.drawing()


def test_pictures_are_small():
    pictures = [path for path in (REPO / 'docs').iterdir() if path.suffix in ('.png', '.svg')]
    assert len(pictures) >= 3
    assert all(path.stat().st_size < 300_000 for path in pictures)
