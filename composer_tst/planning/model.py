"""The model: its parameters and its FLOPs, counted without memory for its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .config import PlanError, value

# What Hugging Face's configs call the number of experts.
EXPERTS = ('num_experts', 'num_local_experts', 'n_routed_experts')


@dataclass(frozen=True)
class Model:
    """Counts of parameters, and the two numbers that decide a position's FLOPs at a length."""

    parameters: int
    active: int
    multiplying: int
    attention: int  # layers * heads * width of a head

    def flops(self, length: int) -> int:
        """FLOPs of one position, forward and backward, in a row of `length` positions."""
        return 6 * self.multiplying + 12 * self.attention * length


def build(config: DictConfig) -> Model:
    """Count a model's parameters on the meta device."""
    import torch

    found = value(config, 'model', DictConfig, 'the model, as llm-foundry takes it')
    settings: Any = OmegaConf.to_container(found, resolve=True)
    name = value(config, 'model.name', str, 'hf_causal_lm or mpt_causal_lm')
    try:
        if name == 'hf_causal_lm':
            from llmfoundry.utils.config_utils import set_config_overrides
            from transformers import AutoConfig, AutoModelForCausalLM
            from transformers.modeling_utils import no_init_weights

            hf = AutoConfig.from_pretrained(settings['pretrained_model_name_or_path'])
            set_config_overrides(hf, settings.get('config_overrides') or {})
            with torch.device('meta'), no_init_weights():
                model: Any = AutoModelForCausalLM.from_config(hf)
        elif name == 'mpt_causal_lm':
            from llmfoundry.models.mpt import ComposerMPTCausalLM

            settings = {key: item for key, item in settings.items() if key != 'name'}
            model = ComposerMPTCausalLM(**{**settings, 'init_device': 'meta'}).model
            hf = model.config
        else:
            raise PlanError(f'model.name is {name!r}: this reads hf_causal_lm and mpt_causal_lm')
    except PlanError:
        raise
    except Exception as error:
        # What a config is refused for takes many forms, some over several lines.
        raise PlanError(f'model: {name} refuses these settings: {" ".join(str(error).split())[:300]}') from error
    count = sum(weight.numel() for weight in model.parameters())
    experts = sum(weight.numel() for key, weight in model.named_parameters() if '.experts.' in key)
    every = next((getattr(hf, key) for key in EXPERTS if hasattr(hf, key)), 1)
    if every > 1 and not experts:
        raise PlanError(f'model: {type(model).__name__} is a mixture whose experts this cannot tell from the rest')
    active = count - experts + experts * getattr(hf, 'num_experts_per_tok', every) // every
    # A tied matrix multiplies as the head; where there is no head of its own there is but one.
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = getattr(hf, 'tie_word_embeddings', False) or head is None
    multiplying = active - (0 if tied else embedding.numel())
    layers = getattr(hf, 'num_hidden_layers', None) or hf.n_layers
    heads = getattr(hf, 'num_attention_heads', None) or hf.n_heads
    width = getattr(hf, 'head_dim', None) or (getattr(hf, 'hidden_size', None) or hf.d_model) // heads
    return Model(count, active, multiplying, layers * heads * width)
