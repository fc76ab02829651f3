"""Run where composer-tst is not installed: continue runs from its checkpoints, and load what it exported.

Arguments: a folder of YAMLs to train, each in turn, and one of Hugging Face folders to load with plain transformers,
whose logits on ``ids.pt`` are written to ``logits.pt`` beside it.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from llmfoundry.command_utils import train_from_yaml
from transformers import AutoModelForCausalLM

assert importlib.util.find_spec('composer_tst') is None
torch.set_num_threads(1)
runs, exports = Path(sys.argv[1]), Path(sys.argv[2])
for yaml in sorted(runs.glob('*.yaml')):
    train_from_yaml(str(yaml)).close()
for folder in sorted(path for path in exports.iterdir() if path.is_dir()):
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.load(exports / 'ids.pt')).logits
    torch.save(logits, folder / 'logits.pt')
