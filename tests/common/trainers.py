"""Real Trainers on tiny models: what the tests build their runs from."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from composer import Callback, State, Trainer
from composer.core import Algorithm, DataSpec
from composer.loggers import InMemoryLogger, Logger
from composer.metrics import LanguageCrossEntropy
from composer.models import ComposerModel, HuggingFaceModel
from composer.utils import collect_env
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from composer_tst.settings import parse_settings
from composer_tst.surgery import Microbatches, unwrapped

# Some tests run where there is no llm-foundry.
if TYPE_CHECKING:
    from llmfoundry.models.mpt import ComposerMPTCausalLM

VOCAB_SIZE = 300
# Composer reads the list of its own files for every Trainer and every checkpoint: once is enough.
collect_env.get_composer_commit_hash = functools.cache(collect_env.get_composer_commit_hash)


def mpt(**overrides: Any) -> 'ComposerMPTCausalLM':
    """A tiny MPT; plain attention, learned positions."""
    from llmfoundry.models.mpt import ComposerMPTCausalLM

    torch.manual_seed(1)
    settings: dict[str, Any] = {
        'd_model': 16,
        'n_heads': 2,
        'n_layers': 2,
        'expansion_ratio': 2,
        'max_seq_len': 64,
        'vocab_size': VOCAB_SIZE,
        'attn_config': {'attn_impl': 'torch'},
        'loss_fn': 'torch_crossentropy',
        'no_bias': True,
    }
    return ComposerMPTCausalLM(**(settings | overrides))


def hugging_face(model: PreTrainedModel, **settings: Any) -> HuggingFaceModel:
    """Any causal LM of transformers as a ComposerModel with a train and an eval metric."""
    return HuggingFaceModel(
        model, metrics=[LanguageCrossEntropy()], eval_metrics=[LanguageCrossEntropy()], use_logits=True, **settings
    )


def llama(**overrides: Any) -> HuggingFaceModel:
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        'vocab_size': VOCAB_SIZE,
        'hidden_size': 16,
        'intermediate_size': 32,
        'num_hidden_layers': 2,
        'num_attention_heads': 2,
        'num_key_value_heads': 1,
        'tie_word_embeddings': False,
    }
    return hugging_face(LlamaForCausalLM(LlamaConfig(**(settings | overrides))))


class Rows(torch.utils.data.Dataset):
    """`count` rows of `length` random tokens, the first `pad_from(i)` of row i attended if it is given."""

    def __init__(self, count: int, length: int, pad_from: Callable[[int], int] | None = None):
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(2, VOCAB_SIZE, (count, length), generator=generator)
        self.pad_from = pad_from

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = {'input_ids': self.ids[index], 'labels': self.ids[index].clone()}
        if self.pad_from is not None:
            attended = torch.arange(len(row['input_ids'])) < self.pad_from(index)
            row['labels'][~attended] = -100
            row['attention_mask'] = attended.long()
        return row


def random_loader(rows: int = 48, batch_size: int = 4, length: int = 12, **settings: Any) -> DataLoader:
    """A plain map-style loader, in order unless told otherwise."""
    pad_from = settings.pop('pad_from', None)
    options: dict[str, Any] = {'drop_last': True} | settings
    return DataLoader(Rows(rows, length, pad_from), batch_size=batch_size, **options)


def text_loader(
    dataset: Path, tokenizer: PreTrainedTokenizerBase, split: str = 'train', batch_size: int = 4, **settings: Any
) -> DataSpec:
    """llm-foundry's own loader over the session's shards."""
    from llmfoundry.data.dataloader import build_dataloader

    loader = {'num_workers': 0, 'prefetch_factor': None, 'persistent_workers': False, 'pin_memory': False}
    loader |= settings.pop('loader', {})
    max_seq_len = tokenizer.model_max_length
    data = {'local': str(dataset), 'split': split, 'shuffle': split == 'train', 'max_seq_len': max_seq_len}
    config = {'name': 'text', 'dataset': data | settings, 'drop_last': split == 'train'} | loader
    return build_dataloader(config, tokenizer, batch_size)


class Bare(ComposerModel):
    """A user's own model: some embeddings, some head."""

    def __init__(self, *embeddings: nn.Embedding):
        super().__init__()
        self.embeddings = nn.ModuleList(embeddings)

    def forward(self, batch: Any) -> torch.Tensor:
        return self.embeddings[0](batch['input_ids'])

    def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return outputs.sum()


class Superposed:
    """A superposed microbatch of a model, event by event, without a Trainer."""

    def __init__(self, model: Any, weighting: Any = 'uniform', bag_size: int = 2):
        settings = parse_settings(bag_size, '1ba', 'both', 'sequence', weighting, None)
        self.state: Any = SimpleNamespace(model=model, batch={}, outputs=None, algorithms=[], callbacks=[])
        self.microbatches = Microbatches(self.state, settings)
        self.microbatches.enter_phase(bag_size)

    def at(self, event: str) -> None:
        """Come to an event."""
        getattr(self.microbatches, event)(self.state, None)

    def loss(self, folded: dict[str, Any]) -> torch.Tensor:
        """Its loss, after the events that come before the backward pass."""
        bag_size = folded['input_ids'].shape[-1]
        labels = nn.functional.pad(folded['labels'].flatten(1)[:, :-bag_size], (bag_size, 0), value=-100)
        self.state.batch = {'input_ids': folded['input_ids'].flatten(1), 'labels': labels}
        inputs = self.microbatches.begin(self.state, {k: v for k, v in folded.items() if k != 'labels'})
        self.state.outputs = self.state.model(inputs)
        self.at('after_forward')
        self.at('before_loss')
        loss = unwrapped(self.state.model).loss(self.state.outputs, self.state.batch)
        self.at('after_loss')
        return loss

    def step(self, folded: dict[str, Any]) -> torch.Tensor:
        """Its loss, once its backward pass is done."""
        loss = self.loss(folded)
        loss.backward()
        self.at('after_backward')
        return loss


class Grads(Callback):
    """Keeps the gradients of every step."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def after_train_batch(self, state: State, logger: Logger) -> None:
        model = state.model
        self.steps.append({name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None})


def make_trainer(
    model: ComposerModel,
    train: Any,
    algorithms: Algorithm | Sequence[Algorithm] | None = None,
    max_duration: str | None = '8ba',
    **settings: Any,
) -> tuple[Trainer, InMemoryLogger]:
    """A Trainer on the device of `pytest --device`, and what it logs."""
    logger = InMemoryLogger()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    defaults: dict[str, Any] = {'optimizers': optimizer, 'progress_bar': False, 'seed': 3}
    trainer = Trainer(
        model=model,
        train_dataloader=train,
        algorithms=algorithms,
        max_duration=max_duration,
        loggers=[logger, *settings.pop('loggers', [])],
        **(defaults | settings),
    )
    return trainer, logger


def logged(logger: InMemoryLogger, key: str) -> list[float]:
    """All values of a metric, in order."""
    return [float(value) for _, value in logger.data.get(key, [])]


def assert_same(mine: Any, other: Any, name: str) -> None:
    """Two parts of checkpoints hold the same, to the bit, but for the time they took."""
    assert type(mine) is type(other), name
    if isinstance(mine, torch.Tensor):
        assert torch.equal(mine, other), name
    elif isinstance(mine, dict):
        assert mine.keys() == other.keys(), name
        for key in mine:
            if not str(key).endswith('wct'):
                assert_same(mine[key], other[key], f'{name}.{key}')
    elif isinstance(mine, (list, tuple)):
        assert len(mine) == len(other), name
        for index, pair in enumerate(zip(mine, other, strict=True)):
            assert_same(*pair, f'{name}.{index}')
    else:
        assert mine == other, f'{name}: {mine} != {other}'
