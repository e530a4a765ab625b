"""What train/trl_adapter.py relies on beyond public interfaces: a new version that changes it fails here, by name."""

import dataclasses
import inspect
import re

import pytest
import transformers
import trl
from accelerate.state import AcceleratorState, DistributedType, PartialState
from conftest import REPO
from peft.helpers import disable_input_dtype_casting
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl.trainer.utils import FusedCausalLMOutput

DATASET = ("self", "dataset", "processing_class", "args")
CALLED = {  # what is overridden or called -> its parameters, the first of them where TRL's trainers differ in the rest
    "SFTTrainer._prepare_dataset": (trl.SFTTrainer._prepare_dataset, DATASET),
    "DPOTrainer._prepare_dataset": (trl.DPOTrainer._prepare_dataset, DATASET),
    "KTOTrainer._prepare_dataset": (trl.KTOTrainer._prepare_dataset, DATASET),
    "RewardTrainer._prepare_dataset": (trl.RewardTrainer._prepare_dataset, DATASET),
    "Trainer._get_train_sampler": (transformers.Trainer._get_train_sampler, ("self", "train_dataset")),
    "KTOTrainer._get_train_sampler": (trl.KTOTrainer._get_train_sampler, ("self", "train_dataset")),
    "Trainer.training_step": (transformers.Trainer.training_step, ("self", "model", "inputs", "num_items_in_batch")),
    "SFTTrainer.training_step": (trl.SFTTrainer.training_step, ("self", "args", "kwargs")),
    "DPOTrainer._compute_loss": (trl.DPOTrainer._compute_loss, ("self", "model", "inputs", "return_outputs")),
    "RewardTrainer.compute_loss": (
        trl.RewardTrainer.compute_loss,
        ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    ),
    "get_length_grouped_indices": (get_length_grouped_indices, ("lengths", "batch_size", "mega_batch_mult", "generator")),
    "disable_input_dtype_casting": (disable_input_dtype_casting, ("model",)),
    "AcceleratorState.__init__": (
        AcceleratorState.__init__,
        ("self", "mixed_precision", "cpu", "dynamo_plugin", "deepspeed_plugin", "fsdp_plugin"),
    ),
}
WRITTEN = {  # words in the source of a module that the adapter or the rows of the trainers count on
    trl.DPOTrainer: (
        "fused_lm_head",
        'self._metrics[mode]["rewards/margins"]',
        "ref_model",
        '"prompt_ids"',
        '"chosen_ids"',
        '"rejected_ids"',
        "completion_mask",
    ),
    trl.KTOTrainer: ('"prompt_ids"', '"completion_ids"', '"KL_completion_ids"', '"label"'),
    trl.RewardTrainer: ("self._metrics[mode]", "center_rewards_coefficient"),
    trl.SFTTrainer: ("fused_lm_head", "skip_prepare_dataset"),
}


@pytest.mark.parametrize("name", CALLED)
def test_signatures(name):
    function, wanted = CALLED[name]
    found = tuple(inspect.signature(function).parameters)
    assert found[: len(wanted)] == wanted, f"{name} takes {found} now; train/trl_adapter.py counts on {wanted}"


@pytest.mark.parametrize("trainer", WRITTEN, ids=lambda t: t.__name__)
def test_what_trainers_read_and_write(trainer):
    source = inspect.getsource(inspect.getmodule(trainer))
    missing = [word for word in WRITTEN[trainer] if word not in source]
    assert not missing, f"TRL changed {trainer.__name__}: {missing} are gone"


def test_fields():
    found = {field.name for field in dataclasses.fields(FusedCausalLMOutput)}
    wanted = {"loss", "log_probs", "entropy", "mean_logits", "is_top1", "label_mask"}
    assert wanted <= found, f"TRL changed FusedCausalLMOutput: {sorted(wanted - found)} are gone"
    assert "_n_gpu" in inspect.getsource(transformers.TrainingArguments.n_gpu.fget), "transformers keeps n_gpu elsewhere"
    assert hasattr(DistributedType, "FSDP"), "accelerate renamed its distributed types"
    assert hasattr(DistributedType, "MULTI_CPU"), "accelerate renamed its distributed types"
    assert isinstance(PartialState._shared_state, dict), "accelerate keeps its shared state elsewhere"
    assert "_mixed_precision" in inspect.getsource(AcceleratorState), "accelerate keeps the precision elsewhere"


def test_a_private_name_of_a_trainer_stands_in_the_adapter_only():
    """`args._n_gpu`, `self._metrics`, `_prepare_dataset` and their like; `launch.py` and `worker.py` start processes only."""
    private = r"\b_(n_gpu|metrics|prepare_dataset|get_train_sampler|compute_loss|shared_state|mixed_precision)\b|trainer_pt_utils|trainer\.utils"
    for path in (REPO / "ultramed").rglob("*.py"):
        if path.name != "trl_adapter.py":
            assert not re.search(private, path.read_text()), path
