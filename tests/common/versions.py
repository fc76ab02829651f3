"""Prints the versions that docs/versions.md names, of the environment that it runs in."""

import importlib.metadata
import platform

PACKAGES = (
    'torch',
    'mosaicml',
    'llm-foundry',
    'mosaicml-streaming',
    'transformers',
    'numpy',
    'triton',
)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return 'none'


if __name__ == '__main__':
    print(f'Python {platform.python_version()},', ', '.join(f'{package} {version(package)}' for package in PACKAGES))
