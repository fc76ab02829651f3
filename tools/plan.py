"""What a run will take before it is run: steps, data, shards, time, and the gain that the published grids suggest.

    python tools/plan.py YAML [KEY=VALUE ...] [--stats STATS.json] [--gpu h100 --gpus 8 --mfu 0.4] [--json]
    python tools/plan.py YAML --sweep
    python tools/plan.py YAML --bag-size 6 --duration 0.3dur --write NEW.yaml

FLOPs are those of matrix products, forward and backward: 6 for each active parameter that multiplies (all but the
input embedding) and 12 * layers * width of attention * length for attention, each per model position.
"""

from __future__ import annotations

import csv
import inspect
import json
import math
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from composer.core import Time, TimeUnit
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_tst import TokenSuperposition
from composer_tst.schedule import Phase, plan_steps

# Dense bf16 peaks in FLOP/s, by their makers.
GPUS = {'a100': 312e12, 'h100': 989e12, 'h200': 989e12, 'b200': 2250e12}
# Published grids: file, parameters, tokens of the baseline, weighting.
GRIDS = (
    ('final_loss_270m_20k.csv', 267e6, 42e9, 'uniform'),
    ('final_loss_270m_100k.csv', 267e6, 209e9, 'uniform'),
    ('final_loss_600m_20k.csv', 600e6, 42e9, 'uniform'),
    ('final_loss_600m_20k_power_law.csv', 600e6, 42e9, 'power_law'),
)
# Within this factor of a published size or budget, that counts as the same scale.
SAME_SCALE = 1.5
SWEEP_BAGS = (2, 3, 4, 6, 8, 12, 16)
SWEEP_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
SETTINGS = sorted(inspect.signature(TokenSuperposition).parameters)
PUBLISHED_WARMUP = 2000
# What Hugging Face's configs call the number of experts.
EXPERTS = ('num_experts', 'num_local_experts', 'n_routed_experts')


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class PlanError(Exception):
    """A failure the user can act on: one sentence that names the key, its value, and what to do."""


# --- The YAML ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What of a YAML decides its cost: B rows of L tokens a loader batch, how long, and the superposition."""

    rows: int
    length: int
    max_duration: Time
    phases: tuple[Phase, ...]
    superpose: str
    expand: str
    weighting: Any


def load(path: str, overrides: list[str]) -> DictConfig:
    """Read a llm-foundry YAML and the overrides of its command line."""
    try:
        config = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(overrides))
        OmegaConf.to_container(config, resolve=True)
    except OSError as error:
        raise PlanError(f'cannot read {path}: {error.strerror}') from error
    except Exception as error:
        # YAML and OmegaConf fail in many ways, with advice over several lines.
        why = ' '.join(str(error).split())
        raise PlanError(f'{path} is no YAML that OmegaConf reads: {why}') from error
    if not isinstance(config, DictConfig):
        raise PlanError(f'{path} is a list, not a config of llm-foundry with keys')
    return config


def value(config: DictConfig, key: str, kind: type | tuple[type, ...], what: str) -> Any:
    """A key of the YAML, or one sentence if it is missing or of another kind."""
    try:
        found = OmegaConf.select(config, key)
    except OmegaConfBaseException as error:
        raise PlanError(f'{key} cannot be resolved: {" ".join(str(error).split())}') from error
    if found is None:
        raise PlanError(f'{key} is missing: give {what}')
    if not isinstance(found, kind) or isinstance(found, bool) or (isinstance(found, int) and found < 1):
        raise PlanError(f'{key} is {found!r}: give {what}')
    return found


def read_run(config: DictConfig) -> Run:
    """Check the keys that decide the cost."""
    rows = value(config, 'global_train_batch_size', int, 'the rows of a step, a positive integer')
    length = value(config, 'max_seq_len', int, 'the tokens of a row, a positive integer')
    text = value(config, 'max_duration', (str, int), 'a Composer Time in ba, tok, sp or ep, as 20000ba')
    try:
        max_duration = Time.from_timestring(text) if isinstance(text, str) else Time.from_epoch(text)
    except ValueError:
        raise PlanError(f'max_duration is {text!r}: give a Composer Time in ba, tok, sp or ep, as 20000ba') from None
    if max_duration.unit not in (TimeUnit.BATCH, TimeUnit.TOKEN, TimeUnit.SAMPLE, TimeUnit.EPOCH):
        raise PlanError(f'max_duration is {text}: give it in ba, tok, sp or ep')
    if max_duration.value < 1:
        raise PlanError(f'max_duration is {text}: give a positive time')
    settings = superposition_settings(config)
    if settings is None:
        return Run(rows, length, max_duration, (), 'both', 'sequence', 'uniform')
    try:
        algorithm = TokenSuperposition(**settings)
    except (TypeError, ValueError) as error:
        raise PlanError(f'algorithms.token_superposition: {error}') from error
    phases, weighting = tuple(algorithm.schedule.phases), algorithm.weighting
    return Run(rows, length, max_duration, phases, algorithm.superpose, algorithm.expand, weighting)


def superposition_settings(config: DictConfig) -> dict[str, Any] | None:
    """What the YAML says of `token_superposition`, None if it does not name it."""
    algorithms: Any = OmegaConf.select(config, 'algorithms')
    if algorithms is None:
        return None
    if not isinstance(algorithms, DictConfig):
        raise PlanError(f'algorithms is {algorithms!r}: give its settings by name')
    if 'token_superposition' not in algorithms:
        return None
    found: Any = algorithms.token_superposition
    if found is not None and not isinstance(found, DictConfig):
        raise PlanError(f'algorithms.token_superposition is {found!r}: give its settings by name')
    settings: Any = OmegaConf.to_container(found, resolve=True) if found is not None else {}
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise PlanError(f'algorithms.token_superposition.{unknown[0]} is no setting: use {", ".join(SETTINGS)}')
    return settings


def change_settings(config: DictConfig, bag_size: int | None, duration: str | None) -> None:
    """Put one phase, or a part of it, into the YAML in place of what it says."""
    given = {key: item for key, item in (('bag_size', bag_size), ('duration', duration)) if item is not None}
    if given:
        kept = {key: item for key, item in (superposition_settings(config) or {}).items() if key != 'phases'}
        OmegaConf.update(config, 'algorithms.token_superposition', {**kept, **given}, merge=False, force_add=True)


# --- The model --------------------------------------------------------------------------------------------------


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


# --- Steps, data, time ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhaseCost:
    """A phase in numbers: data tokens are read, positions are what the model works on."""

    bag_size: int
    steps: int
    data_tokens: int
    positions: int
    flops_per_step: float


def cost_phases(run: Run, model: Model, rows_in_data: int | None) -> list[PhaseCost]:
    """The phases of a run, recovery last."""
    draws = [phase.bag_size if run.expand != 'none' else 1 for phase in run.phases]
    per_batch = {TimeUnit.TOKEN: Fraction(run.rows * run.length), TimeUnit.SAMPLE: Fraction(run.rows)}
    if rows_in_data:
        per_batch[TimeUnit.EPOCH] = Fraction(1, max(1, rows_in_data // run.rows))
    plan = plan_steps(run.phases, draws, run.max_duration, per_batch)
    if plan is None:
        raise PlanError('a time is given in epochs, which needs --stats to know the length of one')
    for phase, start, end in zip(run.phases, [0, *plan.ends], plan.ends, strict=False):
        if end <= start or end >= plan.total:
            raise PlanError(
                f'algorithms.token_superposition: the phase with bag_size {phase.bag_size} goes from step {start} to '
                f'{end} of {plan.total}: give it steps, and leave some for recovery'
            )
    costs = []
    bags = [(phase.bag_size, drawn) for phase, drawn in zip(run.phases, draws, strict=True)]
    for (bag, drawn), start, end in zip([*bags, (1, 1)], [0, *plan.ends], [*plan.ends, plan.total], strict=True):
        rows, length = run.rows, run.length
        fewest = bag if run.superpose == 'output' else 2 * bag
        if run.expand != 'sequence' and bag > 1 and length < fewest:
            raise PlanError(
                f'algorithms.token_superposition: max_seq_len is {length}, and a row by itself needs {fewest} tokens '
                f'for bags of {bag}: use expand: sequence, a smaller bag_size, or longer rows'
            )
        if bag > 1 and run.superpose != 'output' and run.expand != 'sequence':
            rows, length = rows * drawn, length // bag
        steps = end - start
        costs.append(
            PhaseCost(
                bag, steps, steps * drawn * run.rows * run.length, steps * rows * length,
                float(rows * length * model.flops(length)),
            )
        )  # fmt: skip
    return costs


# --- The published grids ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """A change of the final loss in nats: at the nearest published scale, and the range over all of them."""

    change: float
    low: float
    high: float
    source: str
    extrapolation: str  # why it is one, or empty


def read_grid(name: str) -> dict[tuple[float, int], float]:
    """Change of the final loss against the baseline of the same grid, by share of steps and bag size."""
    with (resources.files('composer_tst') / 'published' / name).open() as file:
        losses = {
            (float(line['step_ratio']), int(line['bag_size'])): float(line['final_loss'])
            for line in csv.DictReader(file)
        }
    return {key: loss - losses[0.0, 1] for key, loss in losses.items()}


def interpolate(grid: dict[tuple[float, int], float], share: float, bag: float) -> float | None:
    """Bilinear, from no change at a share of 0 and at bags of 1; None where the grid has no such point."""
    shares = sorted({key[0] for key in grid})
    bags = sorted({key[1] for key in grid})
    total = 0.0
    for share_at, share_weight in _neighbours(shares, share):
        for bag_at, bag_weight in _neighbours(bags, bag):
            weight = share_weight * bag_weight
            if weight == 0 or share_at == 0 or bag_at == 1:
                continue
            if (share_at, bag_at) not in grid:
                return None
            total += weight * grid[share_at, bag_at]
    return total if shares[0] <= share <= shares[-1] and bags[0] <= bag <= bags[-1] else None


def _neighbours(points: list, at: float) -> list[tuple[Any, float]]:
    low = max((point for point in points if point <= at), default=points[0])
    high = min((point for point in points if point >= at), default=points[-1])
    share = 0.0 if high == low else (at - low) / (high - low)
    return [(low, 1 - share), (high, share)]


def expect(run: Run, model: Model, tokens: float, share: float, bag: float) -> Expected | None:
    """Read the expected change of the final loss off the published grids; None if none has the point.

    Args:
        tokens: of the plain run of equal cost.
        share: of steps that are superposed.
        bag: the bag size, or over several phases its mean.
    """
    weighting = 'power_law' if run.weighting == 'power_law' else 'uniform'
    read = []
    for name, parameters, budget, weighted in GRIDS:
        change = interpolate(read_grid(name), share, bag)
        if weighted == weighting and change is not None:
            distance = math.log(model.parameters / parameters) ** 2 + math.log(tokens / budget) ** 2
            read.append((distance, change, name.removesuffix('.csv'), parameters, budget))
    if not read:
        return None
    _, change, name, parameters, budget = min(read)
    why = []
    if max(model.parameters / parameters, parameters / model.parameters) > SAME_SCALE:
        why.append(f'the nearest published model has {parameters / 1e6:.0f}M parameters')
    if max(tokens / budget, budget / tokens) > SAME_SCALE:
        why.append(f'the nearest published budget is {budget / 1e9:.0f}B tokens')
    if (run.superpose, run.expand) != ('both', 'sequence'):
        why.append('the grids are for superpose: both and expand: sequence')
    if len(run.phases) > 1:
        why.append(f'the grids have one phase, and this is read at the mean bag size, {bag:.1f}')
    if run.weighting not in ('uniform', 'power_law'):
        why.append('the grids have uniform and power-law weights')
    changes = [each[1] for each in read]
    return Expected(change, min(changes), max(changes), name, '; '.join(why))


# --- The plan ---------------------------------------------------------------------------------------------------


def make_plan(run: Run, model: Model, stats: dict | None, split: str, speed: float) -> dict[str, Any]:
    """Everything there is to say, as JSON.

    Args:
        stats: what `tools/prepare_data.py` wrote, if it is there.
        speed: FLOP/s of all GPUs together, at the MFU reached.
    """
    data = _split_of(stats, split, run) if stats is not None else None
    costs = cost_phases(run, model, data['rows'] if data else None)
    flops = sum(cost.steps * cost.flops_per_step for cost in costs)
    steps = sum(cost.steps for cost in costs)
    tokens = sum(cost.data_tokens for cost in costs)
    equivalent = flops / model.flops(run.length)
    superposed = costs[:-1]
    share = sum(cost.steps for cost in superposed) / steps
    plan: dict[str, Any] = {
        'parameters': model.parameters,
        'active_parameters': model.active,
        'phases': [asdict(cost) for cost in costs],
        'steps': steps,
        'superposed_share_of_steps': share,
        'data_tokens': tokens,
        'equivalent_tokens': equivalent,
        'flops': flops,
        'hours': flops / speed / 3600,
        'shard_bytes': tokens * (data['bytes'] / data['tokens'] if data else 4),
        'passes_over_data': tokens / data['tokens'] if data else None,
        'expected': None,
    }
    if superposed:
        bag = sum(cost.steps * cost.bag_size for cost in superposed) / sum(cost.steps for cost in superposed)
        expected = expect(run, model, equivalent, share, bag)
        plan['expected'] = expected and asdict(expected)
    return plan


def read_stats(path: str) -> dict:
    """Read a `stats.json`."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise PlanError(f'--stats {path}: cannot be read: {error}') from error


def _split_of(stats: dict, split: str, run: Run) -> dict:
    if stats.get('seq_len') != run.length:
        raise PlanError(
            f'--stats: its rows have {stats.get("seq_len")} tokens and max_seq_len is {run.length}: '
            f'prepare the data with --seq-len {run.length}'
        )
    found = stats.get('splits', {}).get(split)
    if not found or not found['tokens']:
        raise PlanError(f'--stats: it has no split {split!r} with rows in it: prepare one')
    return found


def train_split(config: DictConfig) -> str:
    """The split that the train loader reads."""
    dataset: Any = OmegaConf.select(config, 'train_loader.dataset') or {}
    if not isinstance(dataset, (dict, DictConfig)):
        raise PlanError(f'train_loader.dataset is {dataset!r}: give its settings by name')
    streams = list((dataset.get('streams') or {}).values())
    return (streams[0].get('split') if streams else dataset.get('split')) or 'train'


def table(plan: dict[str, Any], gpu: str) -> str:
    """The plan in lines for people."""
    active = '' if plan['active_parameters'] == plan['parameters'] else f', {si(plan["active_parameters"])} active'
    lines = [
        f'parameters          {si(plan["parameters"])}{active}',
        '',
        'phase        bag      steps   data tokens   FLOPs per step',
    ]
    for cost in plan['phases']:
        name = 'superposed' if cost['bag_size'] > 1 else 'plain'
        lines.append(
            f'{name:<10} {cost["bag_size"]:>5} {cost["steps"]:>10,} {si(cost["data_tokens"]):>13}'
            f' {cost["flops_per_step"]:>16.3g}'
        )
    lines += [
        f'{"all":<16} {plan["steps"]:>10,} {si(plan["data_tokens"]):>13} {plan["flops"]:>16.3g} in all',
        '',
        f'superposed steps    {plan["superposed_share_of_steps"]:.1%} of all',
        f'equivalent tokens   {si(plan["equivalent_tokens"])}: what plain training reads at this cost',
        f'shards              {plan["shard_bytes"] / 1e9:,.1f} GB',
    ]
    passes = plan['passes_over_data']
    if passes is not None:
        repeats = 'no row is read twice' if passes <= 1 else 'data repeats: prepare more, or lower bag_size or duration'
        lines.append(f'passes over data    {passes:.2f}, {repeats}')
    lines.append(f'time                {plan["hours"]:,.1f} hours on {gpu}')
    expected = plan['expected']
    if expected:
        lines.append(
            f'expected loss       {expected["change"]:+.3f} nats against plain training at this cost, by '
            f'{expected["source"]} ({over_scales(expected)})'
        )
        if expected['extrapolation']:
            lines.append(f'                    This is an extrapolation: {expected["extrapolation"]}.')
    elif plan['superposed_share_of_steps']:
        lines.append('expected loss       not stated: no published grid has this bag size, share and weighting')
    return '\n'.join(lines)


def over_scales(expected: dict[str, Any]) -> str:
    """How much the published grids differ."""
    if expected['low'] == expected['high']:
        return 'the only published grid of these settings'
    return f'{expected["low"]:+.3f} to {expected["high"]:+.3f} over published scales'


def si(number: float) -> str:
    """A number with three digits and a suffix."""
    for size, suffix in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if number >= size:
            return f'{number / size:.3g}{suffix}'
    return f'{number:.3g}'


def sweep(run: Run, model: Model) -> list[dict[str, Any]]:
    """The plain run's steps with every bag size and share of them: data tokens and the expected change."""
    plain = replace(run, max_duration=equal_steps(run), phases=())
    steps = int(plain.max_duration.value)
    found = []
    for bag in SWEEP_BAGS:
        for share in SWEEP_SHARES:
            superposed = int(share * steps)
            drawn = bag if run.expand != 'none' else 1
            tokens = (superposed * drawn + steps - superposed) * run.rows * run.length
            expected = expect(plain, model, steps * run.rows * run.length, share, bag)
            found.append(
                {'bag_size': bag, 'share': share, 'data_tokens': tokens, 'expected': expected and asdict(expected)}
            )
    return found


def sweep_table(points: list[dict[str, Any]]) -> str:
    """The sweep as a grid: change of the final loss, and data tokens."""
    lines = ['bag size' + ''.join(f'r = {share}'.rjust(18) for share in SWEEP_SHARES)]
    whys: dict[str, str] = {}
    for bag in SWEEP_BAGS:
        cells = []
        for point in (point for point in points if point['bag_size'] == bag):
            expected = point['expected']
            change = f'{expected["change"]:+.3f}' if expected else 'not stated'
            if expected and expected['extrapolation']:
                change += whys.setdefault(expected['extrapolation'], '*' * (len(whys) + 1))
            cells.append(f'{change} {si(point["data_tokens"])}'.rjust(18))
        lines.append(f'{bag:>8}' + ''.join(cells))
    lines.append('Each: expected change of the final loss in nats, and data tokens.')
    lines += [f'{mark} This is an extrapolation: {why}.' for why, mark in whys.items()]
    return '\n'.join(lines)


def equal_steps(run: Run) -> Time:
    """The steps of the plain run that `max_duration` describes."""
    per_batch = {TimeUnit.BATCH: 1, TimeUnit.TOKEN: run.rows * run.length, TimeUnit.SAMPLE: run.rows}
    if run.max_duration.unit not in per_batch:
        raise PlanError(f'max_duration is {run.max_duration.to_timestring()}: give it in ba, tok or sp')
    return Time.from_batch(math.ceil(run.max_duration.value / per_batch[run.max_duration.unit]))


def fill_in(config: DictConfig, run: Run) -> DictConfig:
    """The YAML with the steps of the plain run, and a scheduler where it has another."""
    if not run.phases:
        raise PlanError('--write needs a superposition: give --bag-size and --duration, or the algorithm in the YAML')
    config = config.copy()
    steps = equal_steps(run)
    # A share of tokens would be another share of steps.
    config.max_duration = steps.to_timestring()
    if OmegaConf.select(config, 'scheduler.name') != 'warmup_stable_decay':
        warmup = min(PUBLISHED_WARMUP, int(steps.value) // 10)
        config.scheduler = {
            'name': 'warmup_stable_decay', 't_warmup': f'{warmup}ba', 't_decay': '0.1dur', 'alpha_f': 0.0
        }  # fmt: skip
    decay = str(OmegaConf.select(config, 'scheduler.t_decay', default='0.1dur'))
    if not decay.endswith(('dur', 'ba', 'ep')):
        raise PlanError(f'scheduler.t_decay is {decay}: give it in dur or ba, since --write counts max_duration in ba')
    return config


def write(config: DictConfig, path: str) -> None:
    """Write a YAML where there is none."""
    if Path(path).exists():
        raise PlanError(f'--write {path}: it exists: remove it or name another')
    try:
        Path(path).write_text(OmegaConf.to_yaml(config))
    except OSError as error:
        raise PlanError(f'--write {path}: {error.strerror}') from error


@app.command()
def main(
    yaml: Annotated[str, typer.Argument(metavar='YAML', help='A config of llm-foundry.')],
    overrides: Annotated[list[str] | None, typer.Argument(metavar='KEY=VALUE...', help='As for llmfoundry.')] = None,
    bag_size: Annotated[int | None, typer.Option(help='Instead of what the YAML says.')] = None,
    duration: Annotated[str | None, typer.Option(help='Instead of what the YAML says.')] = None,
    stats: Annotated[str | None, typer.Option(help='The stats.json of the data.')] = None,
    gpu: Annotated[str, typer.Option(help=', '.join(GPUS))] = 'h100',
    gpus: Annotated[int, typer.Option(min=1, help='How many.')] = 8,
    mfu: Annotated[float, typer.Option(help='The share of their peak that training reaches.')] = 0.4,
    as_json: Annotated[bool, typer.Option('--json', help='As JSON.')] = False,
    sweeping: Annotated[bool, typer.Option('--sweep', help='Bag sizes and shares of steps instead.')] = False,
    out: Annotated[str | None, typer.Option('--write', metavar='NEW.yaml', help='The YAML to run, filled in.')] = None,
) -> None:
    """Say what a run will take and what it may bring."""
    try:
        if gpu not in GPUS:
            raise PlanError(f'--gpu {gpu}: give one of {", ".join(GPUS)}')
        if not 0 < mfu <= 1:
            raise PlanError(f'--mfu {mfu}: give a share above 0 and up to 1')
        config = load(yaml, overrides or [])
        change_settings(config, bag_size, duration)
        run = read_run(config)
        if out:
            config = fill_in(config, run)
            run = read_run(config)  # what is printed is what is written
        model = build(config)
        speed = gpus * GPUS[gpu] * mfu
        if sweeping:
            points = sweep(run, model)
            print(json.dumps(points, indent=2) if as_json else sweep_table(points))
        else:
            plan = make_plan(run, model, read_stats(stats) if stats else None, train_split(config), speed)
            print(json.dumps(plan, indent=2) if as_json else table(plan, f'{gpus} {gpu.upper()} at MFU {mfu:g}'))
        if out:
            write(config, out)
    except PlanError as error:
        typer.echo(f'error: {error}', err=True)
        raise typer.Exit(1) from None


if __name__ == '__main__':
    app()
