"""Which models can be superposed: those whose ids go through one ``nn.Embedding``, and whose loss is all in view."""

import types
from typing import Any

import torch
from composer.models import ComposerModel, HuggingFaceModel
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


def check_model(model: Any) -> None:
    """Refuse a model that cannot be trained superposed.

    Raises:
        ValueError: If it is no causal language model with one input embedding, is wrapped by PEFT, has an
            embedding that does not look up through ``nn.Embedding`` or changes what it looks up, or keeps a loss of its
            own outside its outputs.
    """
    name = type(model).__name__
    if not isinstance(model, ComposerModel):
        raise ValueError(f'{name} is no ComposerModel: wrap it, for example in composer.models.HuggingFaceModel.')
    if isinstance(model, HuggingFaceModel):
        if model.using_peft:
            raise ValueError('The model is wrapped by PEFT: superposition is for pre-training, train it without.')
        if model.config.is_encoder_decoder:
            raise ValueError(f'{name} is an encoder-decoder: superposition needs a causal (decoder-only) model.')
        if not model.shift_labels:
            raise ValueError(f'{name} is no causal language model: superposition needs one (shift_labels=True).')
        if getattr(model.config, 'output_router_logits', False) and not hasattr(model.config, 'router_aux_loss_coef'):
            raise ValueError(
                f'{type(model.config).__name__} does not keep the weight of its router loss in router_aux_loss_coef, '
                'where superposition looks for it: set output_router_logits: false, or use another mixture of experts.'
            )
        if getattr(getattr(model.model, 'transformer', None), 'mb_args', None) is not None:
            raise ValueError(
                'MPT keeps the load-balancing loss of megablocks experts outside its outputs, where superposition '
                'would lose it: use a Hugging Face mixture of experts.'
            )
    embedding = find_embedding(model)
    for option in ('max_norm', 'scale_grad_by_freq', 'sparse'):
        if getattr(embedding, option):
            raise ValueError(
                f'The input embedding of {name} has {option}, which is not defined for bags: make it without.'
            )
    if not _looks_up_through_embedding(embedding):
        raise ValueError(
            f'{type(embedding).__name__} does not look ids up through nn.Embedding.forward: call super().forward(ids) '
            'in its forward.'
        )


def _looks_up_through_embedding(embedding: nn.Embedding) -> bool:
    """Whether the embedding's forward reaches ``nn.Embedding.forward``, tried on one id."""
    cls = type(embedding)
    if cls.forward is nn.Embedding.forward:
        return True
    reached = []

    class Probe(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            reached.append(True)
            return super().forward(input)

    embedding.__class__ = with_lookup(cls, Probe)
    try:
        with torch.no_grad():
            embedding(torch.zeros(1, 1, dtype=torch.long, device=embedding.weight.device))
    finally:
        embedding.__class__ = cls
    return bool(reached)


def with_lookup(cls: type[nn.Embedding], lookup: type[nn.Embedding]) -> type[nn.Embedding]:
    """The class ``cls`` with ``lookup`` between it and ``nn.Embedding``, where its ``super().forward`` looks."""
    return lookup if cls is nn.Embedding else types.new_class(cls.__name__, (cls, lookup))
