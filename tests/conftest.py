"""One small data set of real text and one tokenizer for the whole session."""

import atexit
import contextlib
import gc
import importlib.util
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

import numpy
import pytest
import torch
from common import SEQ_LEN, VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser):
    parser.addoption('--device', default='cpu', choices=['cpu', 'cuda'], help='where the tests compute')


def pytest_configure(config: pytest.Config):
    if config.getoption('device') == 'cpu':
        # Trainers take a GPU wherever they see one, those in processes that tests start too.
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    elif not torch.cuda.is_available():
        raise pytest.UsageError('--device cuda: torch finds no GPU here; leave it out to test on the CPU.')


@pytest.hookimpl(tryfirst=True)  # before xdist reads what is marked here
def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Share tests out (`make test`): a file is one process's, and so is all that is marked `streaming`.

    StreamingDataset looks for a free name for its shared memory and then takes it: two that do so at once clash.
    """
    for item in items:
        streams = item.get_closest_marker('streaming')
        item.add_marker(pytest.mark.xdist_group('streaming' if streams else item.path.stem))


def pytest_collection_finish():
    """Start the server that trainings are forked off, before data preparation starts one that has imported less."""
    if 'common.runs' in sys.modules:
        sys.modules['common.runs'].start_server()
    # llm-foundry collects garbage before each training: not among all that has been imported.
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Where llm-foundry is not installed (`make test-next`), skip what asks for it."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if (error.name or '').split('.')[0] != 'llmfoundry' or importlib.util.find_spec('llmfoundry'):
            raise
        pytest.skip('needs llm-foundry, which this environment lacks: make test has it')


@pytest.fixture(autouse=True)
def in_full_precision():
    """A Trainer lets all of its process multiply float32 matrices on a GPU as TF32: not what a test compares with."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope='session', autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory):
    """A folder of its own for temporary files: StreamingDataset goes through all names that any process has left."""
    tempfile.tempdir = os.environ['TMPDIR'] = str(tmp_path_factory.mktemp('t'))


@pytest.fixture(autouse=True)
def shared_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """StreamingDataset lets go of its shared memory at exit alone, some sixty file descriptors each: do so now."""
    if 'streaming' not in sys.modules:
        yield
        return
    from streaming.base.shared.memory import SharedMemory

    made: list[SharedMemory] = []
    begin = SharedMemory.__init__

    def noted(self: SharedMemory, *arguments: Any, **settings: Any) -> None:
        begin(self, *arguments, **settings)
        made.append(self)

    monkeypatch.setattr(SharedMemory, '__init__', noted)
    yield
    if made:
        gc.collect()
    for memory in made:
        with contextlib.suppress(BufferError):  # still in use: at exit, then
            memory.cleanup()
            atexit.unregister(memory.cleanup)
    assert not made or request.node.get_closest_marker('streaming'), 'It makes a StreamingDataset: mark it `streaming`.'


@pytest.fixture(autouse=True)
def seed():
    """A test that fails fails again."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def device(pytestconfig: pytest.Config) -> torch.device:
    """Where to compute: that of `pytest --device`."""
    return torch.device(str(pytestconfig.getoption('device')))


@pytest.fixture(scope='session')
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MDS shards of the standard library's `json` and `email` sources: OUT/train, OUT/val, OUT/tokenizer."""
    output = tmp_path_factory.mktemp('data') / 'mds'
    stdlib = Path(sysconfig.get_paths()['stdlib'])
    # Each by its name: a pattern would leave out those that begin with _, as what Spark leaves.
    sources = [str(path) for name in ('json', 'email') for path in sorted((stdlib / name).glob('*.py'))]
    command = [
        *(sys.executable, '-m', 'composer_tst', 'prepare-data'),
        *(*sources, '--format', 'text'),
        *('--output', str(output), '--seq-len', str(SEQ_LEN), '--train-tokenizer', str(VOCAB_SIZE)),
        *('--split', 'train=0.8,val=0.2'),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return output


@pytest.fixture(scope='session')
def tiny_quickstart(dataset: Path) -> list[str]:
    """What makes the quickstart's YAMLs a tiny run on the session's data set, as the command line takes it."""
    return [
        f'variables.data={dataset}',
        f'max_seq_len={SEQ_LEN}',
        f'model.vocab_size={VOCAB_SIZE}',
        'model.d_model=16',
        'global_train_batch_size=4',
        'device_train_microbatch_size=2',
        'device_eval_batch_size=4',
        'eval_subset_num_batches=2',
        'eval_interval=2ba',
        'scheduler.t_warmup=2ba',
    ]


@pytest.fixture(scope='session')
def tokenizer(dataset: Path) -> 'PreTrainedTokenizerBase':
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(dataset / 'tokenizer', model_max_length=SEQ_LEN)
