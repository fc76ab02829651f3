"""What every training process would spend seconds on, done once by the server that `trainings` forks them off."""

import gc

import composer.utils
import llmfoundry.command_utils
import trainings
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

import composer_tst

list(MODEL_FOR_CAUSAL_LM_MAPPING.values())  # MPT asks whether it is among them, which imports them all
composer.utils.get_composer_env_dict()
assert composer_tst
assert llmfoundry
assert trainings
gc.freeze()  # a training collects garbage as it begins: not among all that was imported
