"""The sizes at which the evidence is trained: a model, a text, a budget, and the size of a step."""

from dataclasses import dataclass, replace

LLAMA = 362_816  # parameters of yamls/evidence/llama
MPT = 2_622_720
PYTHON, PROSE, QUICKSTART = 'Python source', 'prose', 'quickstart'
_DATA = {PYTHON: 'data/tokens', PROSE: 'data/prose', QUICKSTART: 'data/quickstart'}


@dataclass(frozen=True)
class Scale:
    """A size at which everything is trained alike.

    Args:
        name: How rows call it.
        text: What is read; in tables, and in the folder of its data.
        steps: Training steps of every run, but for longer baselines.
        tokens_per_step: Positions of the model in one.
        rates: The learning rates that the baseline is tried at, and beyond them until its best is at no edge.
        parameters: Of the model.
        seq_len: Tokens of a row.
        yaml: What is trained, from the root of the repository.
        overrides: What differs from it, as llm-foundry's command line takes it.
        data: Where the prepared data are.
        autocast: In bfloat16 on a CPU, for which Composer has no `amp_bf16`.
    """

    name: str
    text: str
    steps: int
    tokens_per_step: int
    rates: tuple[float, ...]
    parameters: int
    seq_len: int
    yaml: str
    overrides: tuple[str, ...]
    data: str
    autocast: bool = False

    @property
    def tokens_per_parameter(self) -> float:
        """Positions of the baseline by all parameters."""
        return self.steps * self.tokens_per_step / self.parameters


def _llama(text: str, budget: int, steps: int, batch: int, rates: tuple[float, ...]) -> Scale:
    """A Llama in so many steps of so many rows of 128."""
    tokens = batch * 128
    return Scale(
        name=f'{"prose" if text == PROSE else "python"}-{budget}-{tokens}',
        text=text,
        steps=steps,
        tokens_per_step=tokens,
        rates=rates,
        parameters=LLAMA,
        seq_len=128,
        yaml='yamls/evidence/llama.yaml',
        overrides=(f'global_train_batch_size={batch}', f'device_train_microbatch_size={min(batch, 32)}'),
        data=_DATA[text],
    )


PYTHON_1 = _llama(PYTHON, 1, 350, 8, (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3))
PYTHON_5 = _llama(PYTHON, 5, 1_800, 8, (1e-3, 2e-3, 4e-3, 8e-3))
PYTHON_20 = _llama(PYTHON, 20, 7_100, 8, (1e-3, 2e-3, 4e-3, 8e-3, 16e-3))
PYTHON_20_LARGE = _llama(PYTHON, 20, 1_775, 32, (2e-3, 4e-3, 8e-3, 16e-3))
PROSE_5 = _llama(PROSE, 5, 1_800, 8, (1e-3, 2e-3, 4e-3, 8e-3))
PROSE_20 = _llama(PROSE, 20, 7_100, 8, (2e-3, 4e-3, 8e-3))
PYTHON_40 = _llama(PYTHON, 40, 3_550, 32, (4e-3, 8e-3, 16e-3))
PYTHON_40_LARGER = _llama(PYTHON, 40, 888, 128, (4e-3, 8e-3, 16e-3))
PYTHON_80 = _llama(PYTHON, 80, 7_100, 32, (4e-3, 8e-3, 16e-3))
PYTHON_80_LARGER = _llama(PYTHON, 80, 1_775, 128, (4e-3, 8e-3, 16e-3))
# As many tokens in smaller and in larger steps, by tokens per parameter.
BY_SIZE = {
    20: (PYTHON_20, PYTHON_20_LARGE),
    40: (PYTHON_40, PYTHON_40_LARGER),
    80: (PYTHON_80, PYTHON_80_LARGER),
}
MPT_64 = Scale(
    name='mpt',
    text=QUICKSTART,
    steps=2_000,
    tokens_per_step=1_024,
    rates=(5e-4, 1e-3, 2e-3, 4e-3),
    parameters=MPT,
    seq_len=64,
    yaml='yamls/quickstart/baseline.yaml',
    overrides=('model.d_model=256',),
    data=_DATA[QUICKSTART],
    autocast=True,
)
# At the rate of the other, which was not tuned here.
MPT_256 = replace(
    MPT_64,
    name='mpt-rows-256',
    rates=(2e-3,),
    seq_len=256,
    overrides=(
        *(*MPT_64.overrides, 'max_seq_len=256', 'global_train_batch_size=4', 'device_train_microbatch_size=4'),
        'tokenizer.name=data/quickstart/tokenizer',
    ),
    data='data/rows',
)
SCALES = {
    scale.name: scale
    for scale in (
        *(PYTHON_1, PYTHON_5, PYTHON_20, PYTHON_20_LARGE, PYTHON_40, PYTHON_40_LARGER, PYTHON_80, PYTHON_80_LARGER),
        *(PROSE_5, PROSE_20, MPT_64, MPT_256),
    )
}
