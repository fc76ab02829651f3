"""The model: its parameters and its FLOPs, counted without memory for its weights."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from composer_tst.cli.main import CommandError, meant
from composer_tst.cli.plan.keys import shards, value

# What llm-foundry's MPT takes beside its architecture. The loss it takes by default is installed with a GPU alone.
NO_ARCHITECTURE = ('name', 'loss_fn', 'use_train_metrics', 'additional_train_metrics')
# Attention that needs no GPU, of as many parameters and FLOPs.
PLAIN_ATTENTION = {'attn_impl': 'torch', 'rope_impl': 'hf'}
# What configs call the number of experts, and of those that a token goes through; MPT's and DBRX's in their ffn_config.
EXPERTS = ('num_experts', 'num_local_experts', 'n_routed_experts', 'moe_num_experts')
OF_A_TOKEN = ('num_experts_per_tok', 'moe_top_k')


@dataclass(frozen=True)
class Model:
    """Counts of parameters, and the two numbers that decide a position's FLOPs at a length."""

    parameters: int
    active: int
    multiplying: int
    attention: int  # layers * heads * width of a head
    mpt: bool = False

    def flops(self, length: int) -> int:
        """FLOPs of one position, forward and backward, in a row of `length` positions."""
        return 6 * self.multiplying + 12 * self.attention * length


def build(config: DictConfig) -> Model:
    """Count a model's parameters on the meta device."""
    found = value(config, 'model', DictConfig, 'the model, as llm-foundry takes it')
    settings: Any = OmegaConf.to_container(found, resolve=True)
    name = value(config, 'model.name', str, 'hf_causal_lm or mpt_causal_lm')
    if name not in BUILDERS:
        raise CommandError(f'model.name is {name!r}: this reads {" and ".join(BUILDERS)}')
    try:
        with _quiet():
            model = BUILDERS[name](settings)
            # Training enlarges the embedding of an MPT to what the tokenizer needs.
            enlarged = name == 'mpt_causal_lm' or bool(settings.get('allow_embedding_resizing'))
            _check_vocabulary(config, model, enlarged)
            return _count(model)
    except CommandError:
        raise
    except Exception as error:
        # What a config is refused for takes many forms, some over several lines.
        raise CommandError(f'model: {name} refuses these settings: {" ".join(str(error).split())[:300]}') from error


def _check_vocabulary(config: DictConfig, model: Any, enlarged: bool) -> None:
    """Refuse ids that the embedding has no row for: of a tokenizer or of shards, if they are on this machine."""
    from transformers import AutoTokenizer

    rows = model.get_input_embeddings().weight.shape[0]
    named = OmegaConf.select(config, 'tokenizer.name')
    try:
        ids = len(AutoTokenizer.from_pretrained(named, local_files_only=True))
    except Exception:
        ids = None  # it is elsewhere, or not one of Hugging Face
    if enlarged:
        rows = math.inf if ids is None else max(rows, ids)
    sources = [(f'tokenizer.name {named}', ids or 0)]
    sources += [(f'the data in {folder}', stats['vocab_size']) for folder, stats in shards(config)]
    for source, known in sources:
        if known > rows:
            raise CommandError(
                f'{source} has {known:,} ids, and the model ({type(model).__name__}, tokenizer {named}) embeds '
                f'{rows:,}: give the model a vocab_size of at least {known}, or the tokenizer that made the data'
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without advice on models that are to be trained: this one is only counted."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.set_verbosity(before)


def _hugging_face(settings: dict[str, Any]) -> Any:
    import torch
    from llmfoundry.models.hf import ComposerHFCausalLM
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import no_init_weights

    known = inspect.signature(ComposerHFCausalLM).parameters
    for key in settings:
        if key not in (*known, 'name', 'master_weights_dtype'):
            raise CommandError(f'model.{key} is no setting of hf_causal_lm{meant(key, known)}: remove it')
    named, trusted = settings.get('pretrained_model_name_or_path'), settings.get('trust_remote_code', True)
    overrides, token = settings.get('config_overrides') or {}, settings.get('use_auth_token', False)
    try:
        hf = ComposerHFCausalLM.build_config(named, trusted, token, 'eager', overrides)  # pyright: ignore
    except OSError as error:
        raise CommandError(
            f'model.pretrained_model_name_or_path is {named!r}, which is no folder with a config.json, and the hub '
            'does not answer for it: give such a folder, as composer-tst recipe NAME --output FILE writes beside FILE'
        ) from error
    with torch.device('meta'), no_init_weights():
        model = AutoModelForCausalLM.from_config(hf, trust_remote_code=trusted)
    model.tie_weights()  # which is left out where weights are not initialized
    return model


def _mpt(settings: dict[str, Any]) -> Any:
    from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM

    shape = {key: item for key, item in settings.items() if key not in NO_ARCHITECTURE}
    shape['attn_config'] = {**(shape.get('attn_config') or {}), **PLAIN_ATTENTION}
    return MPTForCausalLM(MPTConfig(**{**shape, 'init_device': 'meta'}))


BUILDERS = {'hf_causal_lm': _hugging_face, 'mpt_causal_lm': _mpt}


def _count(model: Any) -> Model:
    hf = model.config
    count = sum(weight.numel() for weight in model.parameters())
    experts = sum(weight.numel() for key, weight in model.named_parameters() if '.experts.' in key)
    every = _setting(hf, EXPERTS)
    if (every > 1 and not experts) or (experts and not every):
        raise CommandError(f'model: {type(model).__name__} is a mixture whose experts this cannot tell from the rest')
    active = count - experts + experts * (_setting(hf, OF_A_TOKEN) or every) // max(1, every)
    # A tied matrix multiplies as the head; where there is no head of its own there is but one.
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = getattr(hf, 'tie_word_embeddings', False) or head is None
    multiplying = active - (0 if tied else embedding.numel())
    layers = getattr(hf, 'num_hidden_layers', None) or hf.n_layers
    heads = getattr(hf, 'num_attention_heads', None) or hf.n_heads
    width = getattr(hf, 'head_dim', None) or (getattr(hf, 'hidden_size', None) or hf.d_model) // heads
    return Model(count, active, multiplying, layers * heads * width, hf.model_type == 'mpt')


def _setting(hf: Any, names: Sequence[str]) -> int:
    """The first of these that a config has, itself or for its feed-forward layers; 0 without one."""
    layers: Any = getattr(hf, 'ffn_config', None) or {}
    layers = layers if isinstance(layers, Mapping) else vars(layers)
    found = (getattr(hf, name, None) or layers.get(name) for name in names)
    return next((count for count in found if count), 0)
