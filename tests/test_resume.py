"""A training killed at any moment and resumed ends bit for bit as one that was not."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from child import TESTS, run_python

# With dropout (a random state), Adam (an optimizer's state), a schedule and a metric; 32 steps.
TRAINING = """
import sys
import keras, numpy as np, tensorflow as tf
import tf_center_loss_op as tcl

keras.utils.set_random_seed(3)
rng = np.random.default_rng(0)
labels = rng.integers(0, 50, 256).astype("int32")
inputs = rng.normal(size=(256, 16)).astype("float32")
image, label = keras.Input([16]), keras.Input([], dtype="int32")
x = keras.layers.Dropout(0.1, seed=1)(keras.layers.Dense(8)(image))
warm_up = keras.optimizers.schedules.PolynomialDecay(0.01, 20, 0.1)
x = tcl.CenterLoss(50, weight=warm_up, name="centers")([x, label])
model = keras.Model([image, label], keras.layers.Dense(50)(x))
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
dataset = tf.data.Dataset.from_tensor_slices(((inputs, labels), labels)).batch(32)
"""

WITH_CALLBACK = (
    TRAINING
    + """
model.fit(dataset, epochs=4, verbose=0,
          callbacks=[tcl.AtomicBackup("backup", delete_at_end=False)])
"""
)

# tf.train.Checkpoint does not save the random state of Keras layers.
WITH_CHECKPOINT = (
    TRAINING.replace("keras.layers.Dropout(0.1, seed=1)", "")
    + """
done = tf.Variable(0, dtype=tf.int64)
state = tf.train.Checkpoint(model=model, optimizer=model.optimizer, done=done)
manager = tf.train.CheckpointManager(state, "checkpoints", max_to_keep=2)
model.optimizer.build(model.trainable_variables)
state.restore(manager.latest_checkpoint)
while done < 32:
    for batch, target in dataset.skip(int(done) % 8).take(1):
        model.train_on_batch(batch, target)
    done.assign_add(1)
    manager.save()
"""
)

SAVE = """
np.savez("end.npz", *[variable.numpy() for variable in model.variables])
"""


def weights(folder):
    with np.load(folder / "end.npz") as arrays:
        return [arrays[name] for name in arrays.files]


def run_until_killed(source, folder, seconds):
    """Whether the program was still running after so many seconds, when it was killed."""
    program = folder / "killed.py"
    program.write_text(source)
    environment = dict(os.environ, PYTHONPATH=str(TESTS), TF_CPP_MIN_LOG_LEVEL="2")
    child = subprocess.Popen(
        [sys.executable, program], cwd=folder, env=environment, stderr=subprocess.DEVNULL
    )
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.wait()
        return True
    return False


@pytest.mark.parametrize("program", [WITH_CALLBACK, WITH_CHECKPOINT], ids=["fit", "checkpoint"])
def test_killed_at_random_moments(program, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    start = time.monotonic()
    run_python(program + SAVE, whole)
    seconds = time.monotonic() - start
    # While it trains; before that nothing would be at stake.
    moments = random.Random(program).choices([0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95], k=3)
    killed = [run_until_killed(program, broken, moment * seconds) for moment in moments]
    assert any(killed)
    run_python(program + SAVE, broken)
    for expected, resumed in zip(weights(whole), weights(broken), strict=True):
        assert np.array_equal(expected, resumed)


@pytest.mark.parametrize("moment", ["weights half written", "state not written", "not renamed"])
def test_a_backup_that_is_not_complete_is_never_loaded(moment, tmp_path):
    # What a process killed while it wrote its second backup leaves behind.
    stop = {
        "weights half written": """
import numpy
original = numpy.save
def save(path, array):
    original(path, array)
    if "new.partial" in str(path) and pathlib.Path("backup/1").exists():
        open(path, "r+b").truncate(100)
        os._exit(9)
numpy.save = save
""",
        "state not written": """
import json
original = json.dumps
def dumps(value, **options):
    if "epochs" in value and pathlib.Path("backup/1").exists():
        os._exit(9)
    return original(value, **options)
json.dumps = dumps
""",
        "not renamed": """
original = pathlib.Path.rename
def rename(self, target):
    if pathlib.Path("backup/1").exists():
        os._exit(9)
    return original(self, target)
pathlib.Path.rename = rename
""",
    }[moment]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    run_python(WITH_CALLBACK + SAVE, whole)
    torn = "import os, pathlib\n" + stop + WITH_CALLBACK
    assert run_python(torn, broken, check=False).returncode == 9
    assert sorted(os.listdir(broken / "backup")) == ["1", "new.partial"]
    run_python(WITH_CALLBACK + SAVE, broken)
    for expected, resumed in zip(weights(whole), weights(broken), strict=True):
        assert np.array_equal(expected, resumed)


def test_the_backups_are_removed_at_the_end(tmp_path):
    run_python(WITH_CALLBACK.replace(", delete_at_end=False", ""), tmp_path)
    assert not (tmp_path / "backup").exists()


def test_a_backup_of_another_model(tmp_path):
    run_python(WITH_CALLBACK, tmp_path)
    other = WITH_CALLBACK.replace("Dense(8)", "Dense(9)")
    done = run_python(other, tmp_path, check=False)
    assert "backup_dir: expected a backup of this model" in done.stderr
