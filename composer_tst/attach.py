"""Attaching superposition to a model, and taking it off again.

Three things change while it is attached, none of them a parameter, a buffer or a state-dict key:

- A forward pre-hook on the ComposerModel takes a folded batch apart: the model gets ``(B, P)`` ids and no labels,
  so that any architecture runs as it does on plain tokens and computes no loss of its own.
- The input embedding's lookup returns the mean embedding of each bag instead. Whatever else the embedding does
  (Gemma's scale, MPT's tied output head) stays: only ``nn.Embedding``'s own lookup is replaced, beneath it.
- ``ComposerModel.loss`` is the multi-hot cross-entropy of the logits, plus the router loss that a mixture of
  experts reports beside them. It stays one tensor, as llm-foundry's KillLossSpike needs it.

A plain batch passes all three untouched, and so does every batch in evaluation mode.
"""

import types
from collections.abc import Mapping
from typing import Any, cast

import torch
from composer.models import ComposerModel, HuggingFaceModel
from torch import nn
from torch.distributed.tensor import DTensor

from composer_tst.embedding import bag_embedding
from composer_tst.loss import multi_hot_cross_entropy

_NOT_FOR_MODELS = ('labels', 'bag_mask', 'loss_generating_tokens', 'total_tokens')


class BagLookup(nn.Embedding):
    """The lookup of an ``nn.Embedding`` that has bags to look up.

    Attributes:
        bags: The token ids ``(B, P, s)`` and the attended tokens ``(B, P, s)`` or None; None for a plain lookup.
    """

    bags: tuple[torch.Tensor, torch.Tensor | None] | None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Mean embeddings, shape ``input.shape + (d,)``, of the bags that stand at the positions of ``input``."""
        if self.bags is None or not self.training:
            return super().forward(input)
        ids, mask = self.bags
        if isinstance(self.weight, DTensor):
            # FSDP has made the weight whole by now.
            raise ValueError(
                'The input embedding is divided by tensor parallelism, and superposition needs it whole: leave it out '
                'of the layer plan.'
            )
        return bag_embedding(self, ids, mask).view(*input.shape, -1)


def _with_lookup(cls: type[nn.Embedding], lookup: type[nn.Embedding]) -> type[nn.Embedding]:
    """The class ``cls`` with ``lookup`` between it and ``nn.Embedding``, where its ``super().forward`` looks."""
    return lookup if cls is nn.Embedding else types.new_class(cls.__name__, (cls, lookup))


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
            embedding that does not look up through ``nn.Embedding``, or keeps a loss of its own outside its outputs.
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

    embedding.__class__ = _with_lookup(cls, Probe)
    try:
        with torch.no_grad():
            embedding(torch.zeros(1, 1, dtype=torch.long, device=embedding.weight.device))
    finally:
        embedding.__class__ = cls
    return bool(reached)


class Superposition:
    """Superposition attached to a model, until :meth:`remove`.

    Args:
        model: A model that :func:`check_model` accepts.

    Attributes:
        weights: Weights of a bag's targets, ``(s,)``, or None for uniform ones.
        router_losses: The router loss of each microbatch since :meth:`forget`; empty without a mixture of experts.
    """

    weights: torch.Tensor | None = None

    def __init__(self, model: ComposerModel):
        self.router_losses: list[torch.Tensor] = []
        self._model: Any = model
        embedding = find_embedding(model)
        self._embedding_class = type(embedding)
        embedding.__class__ = _with_lookup(type(embedding), BagLookup)
        self._embedding = cast(BagLookup, embedding)
        self._embedding.bags = None
        self._hook = model.register_forward_pre_hook(self._take_apart)
        self._model.loss = self._loss

    def forget(self) -> None:
        """Forget the last step; a forward pass that bypasses the hook then looks up plain ids."""
        self._embedding.bags = None
        self.router_losses = []

    def remove(self) -> None:
        """Leave the model as it was before."""
        self._hook.remove()
        del self._model.loss
        del self._embedding.bags
        cast(nn.Embedding, self._embedding).__class__ = self._embedding_class

    def _take_apart(self, model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Bags ``(B, P, s)`` of a folded batch go to the embedding, ids ``(B, P)`` and the rest to the model."""
        batch = args[0]
        self._embedding.bags = None
        if not _is_folded(batch):
            return None
        inputs = {key: value for key, value in batch.items() if key not in _NOT_FOR_MODELS}
        ids = batch['input_ids']
        if ids.ndim == 3:
            self._embedding.bags = (ids, batch.get('bag_mask'))
            # One id stands for its bag: models read its shape, and reshape it, but look it up in vain.
            inputs['input_ids'] = ids[..., -1].contiguous()
        return (inputs,)

    def _loss(self, outputs: Any, batch: Any) -> Any:
        """Multi-hot cross-entropy of logits ``(B, P, V)`` and labels ``(B, P, s)``, and any router loss: a scalar.

        Raises:
            ValueError: If the logits are not one for each position.
        """
        if not _is_folded(batch):
            return type(self._model).loss(self._model, outputs, batch)
        logits = _logits(outputs)
        targets = batch['labels'].to(logits.device)
        if logits.shape[:2] != targets.shape[:2]:
            raise ValueError(
                f'{type(self._model).__name__} returns logits of shape {tuple(logits.shape)} for bags of shape '
                f'{tuple(targets.shape)}: have its forward return logits (B, P, V), one for each position.'
            )
        if self.weights is not None:
            # Copied to a GPU once: at every loss, the copy would wait for it.
            self.weights = self.weights.to(logits.device)
        mce = multi_hot_cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), self.weights)
        aux_loss = outputs.get('aux_loss') if isinstance(outputs, Mapping) else None
        if aux_loss is None:
            return mce
        router = self._model.config.router_aux_loss_coef * aux_loss
        self.router_losses.append(router.detach())
        return mce + router


def _is_folded(batch: Any) -> bool:
    labels = batch.get('labels') if isinstance(batch, Mapping) else None
    return labels is not None and labels.ndim == 3


def _logits(outputs: Any) -> torch.Tensor:
    if isinstance(outputs, Mapping):
        return outputs['logits']
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]
