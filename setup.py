"""What a package index shows: ``REPOSITORY`` is the address that links into the repository begin with."""

import os
import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name('README.md').read_text()


def page(text: str, repository: str | None) -> str:
    """README's text with links to ``repository``, where one is given."""
    if not repository:
        return text
    text = re.sub(r'(!\[[^]]*\]\()(?!\w+:|#)', rf'\g<1>{repository}/raw/main/', text)
    text = re.sub(r'((?:srcset|src)=")(?!\w+:)', rf'\g<1>{repository}/raw/main/', text)
    return re.sub(r'(?<!!)(\[[^]]*\]\()(?!\w+:|#)', rf'\g<1>{repository}/blob/main/', text)


def urls(repository: str | None) -> dict[str, str]:
    """What the method and its surroundings are read about, and where this package is, if that is given."""
    own = {
        'Source': repository,
        'Issues': f'{repository}/issues',
        'Changelog': f'{repository}/blob/main/CHANGELOG.md',
    }
    return {
        'Paper': 'https://arxiv.org/abs/2605.06546',
        'Patch-level training': 'https://arxiv.org/abs/2407.12665',
        'Composer': 'https://github.com/mosaicml/composer',
        'llm-foundry': 'https://github.com/mosaicml/llm-foundry',
        **(own if repository else {}),
    }


setup(
    long_description=page(README, os.environ.get('REPOSITORY')),
    long_description_content_type='text/markdown',
    project_urls=urls(os.environ.get('REPOSITORY')),
)
