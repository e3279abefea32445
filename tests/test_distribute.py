"""Several replicas in one process give the results of one on the concatenated batch."""

import pytest

from child import run_program
from replicas import BOUND


def run(*program, cwd):
    """Output of a program within the time limit."""
    return run_program(*program, cwd=cwd, timeout=BOUND)


@pytest.mark.parametrize("replicas", [2, 4])
def test_functions_equal_the_oracle(replicas, implementations, tmp_path):
    run("replicas_functions", replicas, *implementations, cwd=tmp_path)


def test_fit_equals_one_replica(tmp_path):
    run("replicas_fit", cwd=tmp_path)


def test_fit_on_four_replicas_equals_one_replica(tmp_path):
    # The last batch has one sample: three replicas have none.
    run("replicas_fit_on_four", cwd=tmp_path)


def test_global_batch_loss_equals_the_loss_of_one_replica(tmp_path):
    run("replicas_main_loss", cwd=tmp_path)


def test_the_smaller_form_is_exchanged_and_never_the_table(tmp_path):
    run("replicas_exchange", cwd=tmp_path)


def test_an_eager_loop_equals_the_oracle(implementations, tmp_path):
    run("replicas_eager", *implementations, cwd=tmp_path)


def test_side_effects_keep_their_order_and_a_deadlock_is_an_error(tmp_path):
    # TensorFlow runs the side effects of the second replica after all of the first one.
    run("replicas_side_effects", cwd=tmp_path)


def test_the_tutorials_function(tmp_path):
    run("replicas_tutorial", cwd=tmp_path)


def test_bad_input_raises_on_all_replicas_and_moves_nothing(tmp_path):
    run("replicas_bad_input", cwd=tmp_path)


@pytest.mark.parametrize(
    "strategy",
    [
        "tf.distribute.experimental.CentralStorageStrategy",
        "tf.compat.v1.distribute.MirroredStrategy",
    ],
)
def test_other_strategies_are_refused_at_construction(strategy, tmp_path):
    run("refused_strategy", strategy, cwd=tmp_path)


def test_one_device_equals_the_oracle(impl, tmp_path):
    run("one_device_strategy", impl, cwd=tmp_path)


def test_shards_are_saved_and_restored_onto_another_number(tmp_path):
    run("replicas_save_shards", cwd=tmp_path)
