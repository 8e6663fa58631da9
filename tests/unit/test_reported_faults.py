"""Where each public report about training, index, evaluation and search that recray was tried on has its test.

A row names the report and the tests that hold what is right; a test that is renamed fails here.
"""

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROWS = {
    "2 ranks with no or uneven data (pytorch#38174, #33148; Lightning#20404)": [
        "unit/test_few_rows.py::test_workers_without_rows",
        "unit/test_trainer.py::test_a_validation_shard_with_fewer_users_than_workers",
        "unit/test_ranks.py::test_results_come_in_order_of_rank",
    ],
    "3 checkpoint by another metric than asked (Lightning#18727, DeepTab#425)": [
        "ray/test_artifact_faults.py::test_another_metric_selects_anew",
        "unit/test_artifacts.py::test_a_changed_key_moves_the_stages_of_the_table",
    ],
    "4 another question to validation (RecBole#1449)": [
        "ray/test_artifact_faults.py::test_another_question_to_validation_selects_anew",
    ],
    "5 a study that continues with another space (optuna#2328, #2199)": [
        "unit/test_tune.py::test_only_comparable_trials_share_a_sweep",
        "ray/test_sweep.py::test_trials_with_another_metric_are_another_sweep",
    ],
    "6 stale data or model when the configuration changes (RecBole#1602, #1697; ntagger#6)": [
        "ray/test_artifact_faults.py::test_a_report_names_the_model_that_was_evaluated",
        "ray/test_artifact_faults.py::test_training_without_a_dataset_of_its_data_section_is_refused",
    ],
    "7 checkpoints with NaN (Lightning#2636, #1008; DeepFilterNet#30)": [
        "unit/test_trainer.py::test_weights_that_overflow_are_neither_saved_nor_resumed_from",
        "unit/test_trainer.py::test_an_epoch_on_disk_that_is_not_finite_is_not_resumed_from",
        "unit/test_trainer.py::test_scores_that_are_not_finite_are_refused",
        "unit/test_trainer.py::test_nothing_is_published_by_a_training_that_diverges",
        "unit/test_trainer.py::test_a_loss_scale_that_fp16_cannot_raise_again_ends_training",
        "unit/test_trainer.py::test_advice_is_what_is_not_set_yet",
        "unit/test_strict_json.py::test_an_undefined_metric_is_null_in_the_record_and_a_word_in_the_text",
    ],
    "8 learning rate jumps with the number of epochs (open_clip#413, OneTrainer#1604)": [
        "ray/test_artifact_faults.py::test_a_falling_schedule_with_more_epochs_is_another_training",
        "ray/test_artifact_faults.py::test_a_constant_rate_with_more_epochs_continues",
        "unit/test_trainer.py::test_a_warm_up_longer_than_training_is_refused_before_it",
    ],
    "9 validation metrics all 0 (tensorflow/recommenders#504)": [
        "unit/test_trainer.py::test_a_validation_split_that_no_model_can_answer",
        "unit/test_trainer.py::test_a_validation_split_that_tells_no_click_metric",
        "unit/test_trainer.py::test_an_index_is_tuned_on_training_users_where_validation_has_only_new_ones",
    ],
    "14 two runs in one folder (openpi#868, #908; CellBender#241)": [
        "unit/test_locks.py::test_a_second_process_is_told_who_writes",
        "unit/test_trainer.py::test_two_trainings_of_one_artefact",
        "ray/test_artifact_faults.py::test_another_value_does_not_destroy_a_trained_model",
    ],
    "23 folders with odd names": ["unit/test_trainer.py::test_a_folder_may_have_any_name"],
    "24 a GPU that is not there": ["ray/test_runtime.py::test_a_gpu_that_does_not_exist_is_refused"],
    "25 the address of a cluster that is gone (ray#17769, ROLL#147)": [
        "ray/test_cluster_gone.py::test_a_command_ends_with_one_line",
        "ray/test_cluster_gone.py::test_a_command_that_waits_for_an_answer_obeys_sigterm",
        "ray/test_runtime.py::test_a_cluster_that_is_gone_is_an_error_at_once",
        "ray/test_runtime.py::test_what_listens_and_is_no_ray",
        "ray/test_runtime.py::test_auto_finds_a_cluster_that_is_gone",
        "ray/test_runtime.py::test_an_address_that_is_none_is_an_error",
    ],
    "27 an output folder that cannot be written": [
        "ray/test_quick_errors.py::test_an_error_comes_before_torch_and_ray"
    ],
    "29 a machine too busy to start Ray": [
        "ray/test_runtime.py::test_a_local_ray_that_starts_slowly_is_tried_again",
        "ray/test_runtime.py::test_a_local_ray_that_does_not_start_says_what_to_do",
        "unit/test_cpus.py::test_threads_spin_for_a_moment_unless_the_user_says_otherwise",
    ],
    "18, 32 NDCG, recall, MAP and GAUC with many targets (recommenders#1749, RecBole#1035, FuXiCTR)": [
        "unit/test_metrics.py::test_equal_trec_eval",
        "unit/test_click_metrics.py::test_equal_scikit_learn",
    ],
    "20 all trials fail (ray#24610)": [
        "ray/test_sweep.py::test_a_trial_that_diverges_is_recorded_with_its_reason",
    ],
    "31 seen items, too few or too many items (implicit#365, #198, #736)": [
        "ray/test_recommend.py::test_lists_of_all_users",
        "unit/test_scoring.py::test_seen_items_never_come_back",
    ],
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.partition(" ")[0])
def test_every_row_has_its_tests(row: str) -> None:
    for test in ROWS[row]:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (TESTS / file).read_text(), f"{test} is gone: name the test that holds row {row}"
