"""Which models can be superposed: those whose ids go through one ``nn.Embedding``, and whose loss is all in view."""

import types
from typing import Any

from composer.models import ComposerModel
from torch import nn


def find_embedding(model: ComposerModel) -> nn.Embedding:
    """The module that turns a model's token ids into vectors.

    Raises:
        ValueError: If the model has no ``get_input_embeddings`` and not exactly one ``nn.Embedding``, or what
            it returns is no ``nn.Embedding``.
    """
    name = type(model).__name__
    owners: tuple[Any, ...] = (model, getattr(model, 'model', None))
    for owner in owners:
        if hasattr(owner, 'get_input_embeddings'):
            found = owner.get_input_embeddings()
            break
    else:
        found = model
    # FSDP and activation checkpointing wrap modules, so look inside what was found.
    embeddings = [module for module in found.modules() if isinstance(module, nn.Embedding)]
    if len(embeddings) != 1:
        raise ValueError(
            f'{name} has {len(embeddings)} nn.Embedding modules where its input embedding is looked for: define '
            'get_input_embeddings() on it to return the nn.Embedding that token ids go through.'
        )
    return embeddings[0]


def with_lookup(cls: type[nn.Embedding], lookup: type[nn.Embedding]) -> type[nn.Embedding]:
    """The class ``cls`` with ``lookup`` between it and ``nn.Embedding``, where its ``super().forward`` looks."""
    return lookup if cls is nn.Embedding else types.new_class(cls.__name__, (cls, lookup))
