"""The page of a package index, whose links must be absolute: ``REPOSITORY`` is the address that README's begin with."""

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


setup(
    long_description=page(README, os.environ.get('REPOSITORY')),
    long_description_content_type='text/markdown',
)
