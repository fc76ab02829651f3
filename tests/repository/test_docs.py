"""The pages: short, and every link in them leads somewhere."""

import re
from pathlib import Path

import pytest
from common import REPO

from tools import draw_method

OTHERS = ('.', 'data', 'runs', 'build', 'dist')  # hidden ones too: pytest's cache has a page
PAGES = sorted(path for path in REPO.rglob('*.md') if not path.relative_to(REPO).parts[0].startswith(OTHERS))


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


def test_the_first_page_is_short():
    assert len((REPO / 'README.md').read_text().splitlines()) <= 150


def test_the_drawing_is_what_its_script_draws():
    assert (REPO / 'docs' / 'method.svg').read_text() == draw_method.drawing()


def test_pictures_are_small():
    pictures = [path for path in (REPO / 'docs').iterdir() if path.suffix in ('.png', '.svg')]
    assert len(pictures) >= 3
    assert all(path.stat().st_size < 300_000 for path in pictures)
