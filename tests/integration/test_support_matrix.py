"""What docs/tested.md calls tested is tested: each row has tests, which are collected."""

import re
import subprocess
import sys

import pytest

from tests.distributed.launch import ROOT

TRAINER = "integration/test_trainer.py::"
ZERO = "distributed/test_zero.py::"
ECOSYSTEM = "integration/test_ecosystem.py::"
TWO = "distributed/test_clients_on_two_processes.py::"
ADAPTERS = "integration/test_adapters_roundtrip.py::"
# The beginning of a row, and the tests behind it.
ROWS = {
    "one process; float32": [
        TRAINER + "test_every_parameter_moves",
        TRAINER + "test_pure_bfloat16_weights",
        TRAINER + "test_bf16_autocast",
        TRAINER + "test_a_compiled_model_trains_the_same_weights",
        "unit/optimizer/test_torch_parity.py::test_adamw_half_is_torch_adamw",
        "unit/optimizer/test_step.py::test_a_gradient_scaler_skips_the_step",
    ],
    "accumulation, activation checkpointing": [
        TRAINER + "test_gradient_accumulation_equals_the_larger_batch",
        TRAINER + "test_gradient_checkpointing_gives_the_same_weights",
        TRAINER + "test_clipping_acts_on_the_gradient_and_not_on_the_update",
        TRAINER + "test_schedules_move_both_halves_together",
        TRAINER + "test_resume_is_bitwise",
    ],
    "DDP on 2 and 3 processes, FSDP2": [
        "distributed/test_layouts.py::test_equals_one_process",
        "distributed/test_loaded.py::test_tensor_parallel_loading_equals_one_process",
    ],
    "checkpoints (`torch.distributed.checkpoint`)": [
        "distributed/test_reshard.py::test_training_goes_on_as_if_it_had_not_stopped",
    ],
    "the stock Trainer under DDP and FSDP2": [
        "distributed/test_trainer_launches.py::test_two_processes_equal_one",
        "distributed/test_trainer_launches.py::test_resume_is_bitwise",
    ],
    "runs that a signal stops": [
        "integration/test_preemption.py::test_a_stopped_run_goes_on_as_if_it_had_not_been",
        "distributed/test_preemption.py::test_two_ranks_stop_together_and_go_on_exactly",
        "distributed/test_preemption.py::test_a_slurm_job_goes_back_into_the_queue_and_ends",
    ],
    "launches: `accelerate launch`": [
        "distributed/test_accelerate_configs.py::test_the_same_weights_are_trained",
        "distributed/test_deepspeed_launcher.py::test_the_launchers_train_the_same_weights",
        "distributed/test_multi_node.py::test_two_machines_train_the_weights_of_one_process",
        "distributed/test_trainer_launches.py::test_the_launch_is_what_was_asked_for",  # torchrun
        "integration/test_slurm.py::test_the_recipe_takes_the_launch",
    ],
    "an unmodified script through `hf_muon.run`": [
        ECOSYSTEM + "test_muon_trains_a_script_that_does_not_know_it",
        ECOSYSTEM + "test_two_processes_of_the_script_equal_one",
        ECOSYSTEM + "test_the_loop_on_two_processes_equals_one",
        ECOSYSTEM + "test_the_loop_goes_on_from_its_checkpoint",
        ECOSYSTEM + "test_the_plugin_registers_before_axolotl_makes_its_arguments",
        ECOSYSTEM + "test_the_files_of_both_frameworks_choose_our_optimizer",
    ],
    "TRL (SFT, DPO, reward, GRPO)": [
        "integration/test_recipe_post_training.py::test_a_method_trains_with_muon_and_learns",
        "integration/test_recipe_clients.py::test_an_encoder_decoder",
        "integration/test_sentence_transformers.py::"
        "test_all_tensors_of_model_and_loss_are_trained_and_something_is_learned",
        "integration/test_sentence_transformers.py::test_setfit",
        ECOSYSTEM + "test_a_loop_of_another_library_learns_and_resumes_bit_by_bit",
        TWO + "test_both_ranks_train_the_same_weights",
        TWO + "test_something_is_learned",
        TWO + "test_a_run_goes_on_bit_by_bit",
        TWO + "test_the_saved_model_computes_what_the_trained_one_did",
    ],
    "LoRA, rsLoRA, PiSSA, DoRA": [
        ADAPTERS + "test_factors_are_trained_by_muon_in_pairs",
        ADAPTERS + "test_a_saved_adapter_computes_what_was_trained",
        ADAPTERS + "test_merging_and_unmerging_keep_the_logits",
        "unit/routing/test_golden_peft.py::test_every_route_equals_the_frozen_one",
    ],
    "`lora_update=product` and `tangent`": [
        "unit/optimizer/test_lora.py::test_product_equals_the_float64_oracle",
        "unit/optimizer/test_lora.py::test_tangent_equals_the_oracle_on_whole_matrices",
        "distributed/test_pairs.py::test_equals_one_process_bit_by_bit",
        "integration/test_lora.py::test_trl_fine_tunes_with_adapters_of_its_own_making",
        "integration/test_lora.py::test_adapters_of_a_base_model_in_four_bits",
    ],
    "agreement with `torch.optim.Muon`": [
        "unit/optimizer/test_torch_parity.py::"
        "test_wide_square_and_one_row_matrices_are_bitwise_equal",
        "unit/optimizer/test_torch_parity.py::test_tall_matrices_differ_by_rounding_only",
        "unit/optimizer/test_torch_parity.py::test_adamw_half_is_torch_adamw",
    ],
    "DeepSpeed ZeRO 1, 2 and 3": [
        ZERO + "test_equals_one_process",
        "distributed/test_deepspeed_own_cases.py::"
        "test_half_precision_goes_on_from_a_checkpoint_with_its_momentum",
        "distributed/test_training.py::test_equals_one_process",
    ],
    "DeepSpeed checkpoints": [
        "distributed/test_zero_checkpoint.py::test_resume_is_bitwise",
        "distributed/test_zero_checkpoint.py::"
        "test_a_universal_checkpoint_goes_on_on_another_number_of_ranks",
    ],
    "FSDP1; DeepSpeed with an `optimizer` section": [
        "unit/optimizer/test_groups.py::test_a_flat_shard_in_a_matrix_group_is_refused",
        "integration/test_deepspeed_config.py::test_is_refused",
    ],
    "CUDA and other accelerators": [],  # not tested, and the page has to say so
    "versions": ["unit/test_versions.py::test_the_versions_that_are_named_are_installed"],
}


@pytest.fixture(scope="module")
def table():
    """The rows of the page's table: what, and how it is tested."""
    page = (ROOT / "docs" / "tested.md").read_text()
    return dict(re.findall(r"^\| (\S.*?) \| (.*?) \|$", page, re.MULTILINE))


def test_every_row_has_its_tests_and_every_test_its_row(table):
    rows = {start: [row for row in table if row.startswith(start)] for start in ROWS}
    assert all(len(found) == 1 for found in rows.values()), rows
    assert len(table) == len(ROWS)


def test_what_is_not_tested_is_called_so(table):
    for start, tests in ROWS.items():
        (said,) = (said for row, said in table.items() if row.startswith(start))
        assert (said == "not tested") == (not tests)


@pytest.mark.full
def test_the_tests_are_collected():
    named = {f"tests/{test}" for tests in ROWS.values() for test in tests}
    files = sorted({test.partition("::")[0] for test in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-o", "addopts=", "-q", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-3000:]
    collected = {line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line}
    assert named - collected == set()
