"""What the evidence is made of: every setting that is trained, by experiment."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Scale:
    """A size at which everything is trained.

    Args:
        name: How the command line calls it.
        about: The model and the data, in a sentence.
        overrides: What differs from the YAML, as llm-foundry's command line takes it.
        steps: Training steps of every run, but for longer baselines.
        warmup: Steps of linear warmup.
        seeds: Seeds of the runs with statistics; the first alone where an experiment is a map.
        learning_rates: The baseline's candidates; the best of them is used everywhere.
        workers: Runs that train at the same time.
        device: Where they train, `cpu` or `cuda`.
        fresh_seeds: More seeds, at which no setting was chosen. None where only the experiments on equal steps and
            equal loss are run.
        yaml: What is trained, from the root of the repository.
        data: Where the prepared data are.
        tokens_per_parameter: Positions of the baseline per parameter, where a scale is a budget among others.
        autocast: In bfloat16 on a CPU, for which Composer has no `amp_bf16`.
    """

    name: str
    about: str
    overrides: tuple[str, ...]
    steps: int
    warmup: int
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    workers: int
    device: str
    fresh_seeds: tuple[int, ...] = ()
    yaml: str = 'yamls/quickstart/baseline.yaml'
    data: str = 'data/quickstart'
    tokens_per_parameter: float | None = None
    autocast: bool = False

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds at which something is trained, each once."""
        return tuple(dict.fromkeys((*self.seeds, *self.fresh_seeds)))


CPU = Scale(
    name='cpu',
    about='the quickstart at twice its width (on Python source), in bfloat16, rows of 64, 1,024 s-tokens a step.',
    overrides=('model.d_model=256',),
    steps=2000,
    warmup=100,
    seeds=(17, 18, 19),
    learning_rates=(5e-4, 1e-3, 2e-3, 4e-3),
    workers=2,
    device='cpu',
    fresh_seeds=(20, 21, 22),
    autocast=True,
)
GPU = Scale(
    name='gpu',
    about='the data of `make quickstart` (Python source), rows of 64, 8,192 s-tokens a step.',
    overrides=(
        *('model.d_model=768', 'model.n_heads=12', 'model.n_layers=8'),
        *('global_train_batch_size=128', 'device_train_microbatch_size=128', 'precision=amp_bf16'),
    ),
    steps=1200,  # with bags of 8, 4 and 2 that reads 21M tokens, of the 23M there are
    warmup=100,
    seeds=(17, 18, 19),
    learning_rates=(5e-4, 1e-3, 2e-3),
    workers=1,
    device='cuda',
)
ROWS = replace(
    CPU,
    name='rows',
    about='that of `cpu` and its learning rate, in rows of 256, four a step.',
    overrides=(
        *(*CPU.overrides, 'max_seq_len=256', 'global_train_batch_size=4', 'device_train_microbatch_size=4'),
        'tokenizer.name=data/quickstart/tokenizer',
    ),
    learning_rates=(2e-3,),
    fresh_seeds=(),
    data='data/rows',
)


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Args:
        name: How tables call it.
        algorithm: What superposes, as llm-foundry's command line takes it; nothing for a baseline.
        length: Steps, as a multiple of the scale's.
        warmup: Steps of warmup, as a share of all steps; the scale's own if None.
        cost: Operations of a step in the mean, in those of a plain step; attention, which `batch` makes cheaper, aside.
    """

    name: str
    algorithm: tuple[str, ...] = ()
    length: float = 1.0
    warmup: float | None = None
    cost: float = 1.0


@dataclass(frozen=True)
class Experiment:
    """Settings that answer one question, each at ``seeds``.

    Reported as ``table``, as ``iso-loss``, as ``grid``, or as ``limited``, against the baseline of the same data.
    """

    title: str
    question: str
    settings: Sequence[Setting]
    seeds: Sequence[int]
    form: str = 'table'

    @property
    def large(self) -> bool:
        """Whether it has so many settings that all but its first seed wait until all else is done."""
        return len(self.settings) > 7


def superposed(name: str, algorithm: str = 'token_superposition', **settings: object) -> Setting:
    """A setting with superposition."""
    return Setting(name, tuple(f'algorithms.{algorithm}.{key}={json.dumps(settings[key])}' for key in settings))


def one_size(bag_size: int, share: float, **others: str) -> Setting:
    """One bag size until a share of the steps."""
    name = ', '.join((f's = {bag_size}', f'r = {share:g}', *others.values()))
    cost = 1 - share + share / bag_size if others.get('expand') == 'none' else 1.0
    return replace(superposed(name, bag_size=bag_size, duration=f'{share:g}dur', **others), cost=cost)


def limited(setting: Setting) -> Setting:
    """The same on a split that holds little more than a baseline reads."""
    return Setting(f'{setting.name}, limited data', (*setting.algorithm, 'train_loader.dataset.split=limited'))


def rated(name: str, **scheduler: float) -> Setting:
    """Bags of 4 with a learning rate of its own while superposed."""
    settings = ('name=rate_of_its_own', 'until=0.3', *(f'{key}={scheduler[key]:g}' for key in scheduler))
    return Setting(f'{S4.name}, {name}', (*S4.algorithm, *(f'scheduler.{setting}' for setting in settings)))


def phases(*steps: tuple[int, float], **others: object) -> Setting:
    """A setting of several phases, ``(bag size, share of steps at which it ends)`` each."""
    listed = [{'bag_size': bag_size, 'until': f'{until:g}dur'} for bag_size, until in steps]
    name = f'phases {", ".join(str(s) for s, _ in steps)} until {", ".join(f"{until:g}" for _, until in steps)}'
    extra = ''.join(f', {" then ".join(value) if isinstance(value, list) else value}' for value in others.values())
    algorithm = 'weights_by_phase' if 'weightings' in others else 'token_superposition'
    return superposed(name + extra, algorithm, phases=listed, **others)


BASELINE = Setting('baseline')
BASELINES = (BASELINE, *(Setting(f'baseline, {length:g} times the steps', length=length) for length in (1.5, 2)))
PUBLISHED = one_size(6, 0.3)  # every published run of a dense model outside the grids
S4 = one_size(4, 0.3)  # what most is compared with here: the smallest bag size near the published optimum
S4_BATCH = one_size(4, 0.3, expand='batch')
# Phases from coarse to fine: which bag sizes, how they share the steps, where they end.
TO_FINE = (
    ((8, 0.1), (4, 0.2), (2, 0.3)),
    ((4, 0.2), (2, 0.3)),
    ((16, 0.1), (8, 0.2), (4, 0.3), (2, 0.4)),
    ((16, 0.075), (8, 0.15), (4, 0.225), (2, 0.3)),
    ((8, 0.2), (4, 0.3), (2, 0.35)),  # geometric shares, most of the data first
    ((8, 0.05), (4, 0.15), (2, 0.35)),  # geometric shares, most of the steps last
    ((8, 0.067), (4, 0.133), (2, 0.2)),
    ((8, 0.133), (4, 0.267), (2, 0.4)),
    ((8, 0.167), (4, 0.333), (2, 0.5)),
)
COARSE_TO_FINE = phases(*TO_FINE[0])
PHASES_BATCH = phases(*TO_FINE[0], expand='batch')
FINALISTS = 3
# In the operations of one run with `sequence`, at s = 4 and r = 0.3: of a token's forward pass, 4.33M operations
# (2 layers of width 256 and a head of 2,048), attention takes 0.13M over 64 positions and 0.03M over 16.
BATCH_SAVES = 1.007
GRID_BAGS = (2, 3, 4, 6, 8)
GRID_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)


def experiments(scale: Scale, losses: Mapping[Setting, float] | None = None) -> list[Experiment]:
    """All experiments at a scale, the most telling first.

    Args:
        scale: The scale.
        losses: Final losses at its first seed. Once they are there for every setting of an experiment that is a map,
            the best of these are judged at other seeds.
    """
    seeds, first = scale.seeds, scale.seeds[:1]
    losses = losses or {}
    recipes = [S4, PUBLISHED, COARSE_TO_FINE, PHASES_BATCH]
    equal = [
        Experiment(
            'Equal steps',
            'Does TST end lower than the baseline after the same number of steps?',
            [BASELINE, *recipes],
            seeds,
        ),
        Experiment(
            'Equal loss',
            'How many more steps does a baseline need, each length with a schedule of its own?',
            [*(BASELINES if scale.fresh_seeds else BASELINES[:2]), *recipes],
            seeds,
            form='iso-loss',
        ),
    ]
    if not scale.fresh_seeds:
        return equal
    sides = [
        superposed('s = 4, r = 0.3, input only', bag_size=4, duration='0.3dur', superpose='input'),
        superposed('s = 4, r = 0.3, output only', bag_size=4, duration='0.3dur', superpose='output', expand='none'),
    ]
    longer = f'{S4_BATCH.name}, {BATCH_SAVES:g} times the steps'
    # The published optimum first.
    shares = sorted(GRID_SHARES, key=lambda share: abs(share - 0.3))
    grid = [one_size(bag_size, share) for share in shares for bag_size in GRID_BAGS]
    return [
        *equal,
        Experiment(
            'Coarse to fine',
            'Do phases from coarse to fine beat one bag size?',
            [BASELINE, S4, COARSE_TO_FINE],
            (*seeds, *scale.fresh_seeds),
        ),
        Experiment('Beyond the paper', 'What beats one bag size, uniform weights, a hard switch?', beyond(), first),
        *finals(
            'The best of these, again',
            beyond(),
            losses,
            [BASELINE, S4, COARSE_TO_FINE],
            scale.fresh_seeds,
        ),
        Experiment(
            'Coarse to fine, in rows of their own',
            'Do phases gain more with `batch`, which joins no rows? It was among the best at seed 17 and the best of '
            'these at 20 to 22; 18 and 19 were added after that.',
            [BASELINE, S4, S4_BATCH, COARSE_TO_FINE, PHASES_BATCH],
            (*seeds[1:], *scale.fresh_seeds),
        ),
        Experiment(
            'A map of `batch`',
            'Which bag sizes, which shares of the steps, and where to end, when rows are folded by themselves?',
            in_rows_of_their_own(),
            first,
        ),
        *finals(
            'The best of the map, again',
            in_rows_of_their_own(),
            losses,
            [BASELINE, S4, S4_BATCH, PHASES_BATCH],
            (*seeds[1:], *scale.fresh_seeds),
        ),
        Experiment('Sides', 'Bags in, bags out, or both?', [BASELINE, S4, *sides], seeds),
        Experiment(
            'Weightings',
            "Which weights of a bag's targets, for small and for large bags?",
            [*weighted(4), *weighted(12)],
            seeds,
        ),
        Experiment('Grid', 'Is the loss U-shaped in s and in r?', grid, seeds, form='grid'),
        Experiment(
            'Sequence or batch',
            f'Where does the s-fold data go? With rows of 64, `batch` saves so little that {BATCH_SAVES:g} times the '
            'steps take as many operations.',
            [S4, S4_BATCH, replace(S4_BATCH, name=longer, length=BATCH_SAVES)],
            seeds,
        ),
    ]


def weighted(bag_size: int) -> list[Setting]:
    """One bag size with each of the weightings, `S4` among them where it is that one."""
    return [
        one_size(bag_size, 0.3),
        *(one_size(bag_size, 0.3, weighting=rule) for rule in ('power_law', 'exponential', 'first')),
    ]


def finals(
    title: str,
    settings: Sequence[Setting],
    losses: Mapping[Setting, float],
    beside: Sequence[Setting],
    seeds: Sequence[int],
    finalists: int = FINALISTS,
) -> list[Experiment]:
    """The best of some settings beside others, at seeds that had no say in choosing them; empty before all have run."""
    if not all(setting in losses for setting in settings):
        return []
    contenders = [setting for setting in settings if setting.algorithm and setting not in beside]
    best = sorted(contenders, key=lambda setting: losses[setting])[:finalists]
    question = 'Are the settings that were best at the first seed better at others?'
    return [Experiment(title, question, [*beside, *best], seeds)]


def beyond() -> list[Setting]:
    """What the paper did not try, at the cost of bags of 4 for 30 % of the steps."""
    return [
        *(phases(*steps) for steps in TO_FINE),
        phases(*TO_FINE[0], weighting='power_law'),
        PHASES_BATCH,
        Setting(COARSE_TO_FINE.name + ', warm-up until 0.3', COARSE_TO_FINE.algorithm, warmup=0.3),
        Setting('baseline, warm-up until 0.3', warmup=0.3),
        rated('half the learning rate while superposed', factor=0.5),
        rated('twice the learning rate while superposed', factor=2),
        rated('a second warm-up until 0.35', rewarm=0.05),
        phases(*TO_FINE[0], weightings=['uniform', 'power_law', 'exponential']),
        phases((4, 0.15), (4, 0.3), weightings=['uniform', 'first']),
    ]


def in_rows_of_their_own() -> list[Setting]:
    """Phases from coarse to fine, and single bag sizes, with `batch`."""
    return [
        *(phases(*steps, expand='batch') for steps in TO_FINE),
        *(one_size(bag_size, share, expand='batch') for bag_size, share in ((2, 0.3), (4, 0.3), (4, 0.5), (8, 0.3))),
    ]
