"""What every training process would spend seconds on, done once by the server that `runs` forks them off."""

import gc

import composer.utils
import llmfoundry.command_utils
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

import composer_tst
from common import runs

list(MODEL_FOR_CAUSAL_LM_MAPPING.values())  # MPT asks whether it is among them, which imports them all
composer.utils.get_composer_env_dict()
assert composer_tst
assert llmfoundry
assert runs
gc.freeze()  # a training collects garbage as it begins: not among all that was imported
