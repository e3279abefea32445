"""A training that is killed at any moment and resumed ends with the bits of one that is not."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import tf_center_loss_op as tcl
from child import command, environment, run_program
from replicas import BOUND


def weights(folder):
    with np.load(folder / "end.npz") as arrays:
        return [arrays[name] for name in arrays.files]


def backups(folder):
    """The names of the complete backups."""
    found = [str(path) for path in folder.glob("backup/*/state.json")]
    return found + [path.read_text() for path in folder.glob("checkpoints/checkpoint")]


def run(program, folder, kill_after=None):
    """Runs a program; True if it was killed `kill_after` seconds after its first new backup."""
    before = backups(folder)
    child = subprocess.Popen(
        command(program),
        cwd=folder,
        env=environment(),
        stderr=subprocess.DEVNULL,
    )
    while kill_after is not None and child.poll() is None and backups(folder) == before:
        time.sleep(0.001)
    try:
        assert child.wait(kill_after) == 0
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert backups(folder)
        return True
    return False


@pytest.mark.parametrize("program", ["train_with_backup", "train_with_checkpoint"])
def test_a_training_killed_at_random_moments_resumes_its_bits(program, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    moments = [random.SystemRandom().uniform(0, 0.5) for _ in range(2)]
    print("killed after", moments)  # pytest shows it where the test fails
    run(program, whole)
    killed = [run(program, broken, moment) for moment in moments]
    assert any(killed)
    run(program, broken)
    for expected, resumed in zip(weights(whole), weights(broken), strict=True):
        assert np.array_equal(expected, resumed)


def test_a_training_killed_on_two_replicas_resumes_its_bits(tmp_path):
    killed = run_program("backup_on_replicas", cwd=tmp_path, check=False, timeout=BOUND)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run_program("backup_on_replicas", cwd=tmp_path, timeout=BOUND)


# In one process: a training is interrupted, and a new model resumes it.

BATCHES, EPOCHS = 6, 3


class Interruption(Exception):
    def __init__(self):
        super().__init__("interrupted by the test")


def interrupted():
    """Expects that a training is interrupted."""
    return pytest.raises(Interruption, match="interrupted by the test")


class Interrupt(keras.callbacks.Callback):
    """Stops a training after some batches, counted over all epochs, or at the end of an epoch."""

    def __init__(self, left):
        super().__init__()
        self.left = left

    def on_train_batch_begin(self, batch, logs=None):
        if self.left <= 0:
            raise Interruption
        self.left -= self.model.steps_per_execution

    def on_epoch_end(self, epoch, logs=None):
        if self.left <= 0:
            raise Interruption


def make_model(steps_per_execution=1, width=4, policy="float32"):
    keras.utils.set_random_seed(5)
    image, label = keras.Input([3]), keras.Input([], dtype="int32")
    x = keras.layers.Dropout(0.2)(keras.layers.Dense(width, dtype=policy)(image))
    x = tcl.CenterLoss(7, loss_weight=0.1, name="center_loss")([x, label])
    model = keras.Model([image, label], keras.layers.Dense(7, dtype="float32")(x))
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=steps_per_execution,
        auto_scale_loss=True,
    )
    return model


def fit(model, *callbacks, **options):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(BATCHES * 4 - 1, 3)).astype("f"), rng.integers(0, 7, BATCHES * 4 - 1)
    callbacks = list(callbacks)
    data = dict(x=[x, y], y=y, batch_size=4, epochs=EPOCHS, validation_data=([x, y], y))
    return model.fit(**data, verbose=0, callbacks=callbacks, **options).history


def numbers(model):
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


def assert_same(model, expected):
    for a, b in zip(numbers(model), numbers(expected), strict=True):
        assert np.array_equal(a, b)


@functools.cache
def uninterrupted(steps_per_execution=1, policy="float32"):
    model = make_model(steps_per_execution, policy=policy)
    return model, fit(model)


@pytest.mark.parametrize(
    "save_freq, steps, after, trained_before",
    [
        ("epoch", 1, 4, 0),  # before the first backup
        ("epoch", 1, 7, 6),
        (1, 1, 6, 6),  # all batches of an epoch trained, the epoch not ended
        (4, 1, 11, 8),
        (2, 2, 4, 4),
        (3, 4, 16, 12),  # the last step of an epoch is shorter
    ],
)
def test_it_resumes_from_any_batch(save_freq, steps, after, trained_before, tmp_path):
    whole, history = uninterrupted(steps)
    with interrupted():
        fit(make_model(steps), tcl.training.AtomicBackup(tmp_path, save_freq), Interrupt(after))
    model, seen = make_model(steps), []
    count = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda *_, **__: seen.append(int(model.optimizer.iterations.numpy()))
    )
    resumed = fit(model, tcl.training.AtomicBackup(tmp_path, save_freq), count)
    assert_same(model, whole)
    # No batch is trained twice.
    first = min(seen)
    assert first == trained_before or first == trained_before + min(steps, BATCHES)
    # The metrics of the interrupted epoch are resumed, too.
    for name, values in history.items():
        assert resumed[name] == values[-len(resumed[name]) :]
    assert not tmp_path.exists()


@pytest.mark.parametrize("moment", ["half a file", "no state", "no name"])
def test_a_backup_that_is_not_complete_is_never_loaded(moment, tmp_path, monkeypatch):
    # The state that a process leaves that is killed while it writes its second backup.
    def second():
        return (tmp_path / "1").exists()

    def half_a_file(path, array, save=np.save):
        save(path, array)
        if second():
            os.truncate(path, 100)
            raise Interruption

    def no_state(state, dumps=json.dumps):
        if second():
            raise Interruption
        return dumps(state)

    def no_name(path, target, rename=Path.rename):
        if second():
            raise Interruption
        rename(path, target)

    with monkeypatch.context() as patch, interrupted():
        target, name, replacement = {
            "half a file": (np, "save", half_a_file),
            "no state": (json, "dumps", no_state),
            "no name": (Path, "rename", no_name),
        }[moment]
        patch.setattr(target, name, replacement)
        fit(make_model(), tcl.training.AtomicBackup(tmp_path, save_freq=2))
    assert sorted(os.listdir(tmp_path)) == ["1", "new.partial"]
    model = make_model()
    fit(model, tcl.training.AtomicBackup(tmp_path, save_freq=2))
    assert_same(model, uninterrupted()[0])


def test_sixteen_bit_variables_resume_their_bits(tmp_path):
    policy = "bfloat16"
    whole, _ = uninterrupted(policy=policy)
    assert any(v.dtype == "bfloat16" for v in whole.variables)
    with interrupted():
        fit(make_model(policy=policy), tcl.training.AtomicBackup(tmp_path), Interrupt(BATCHES + 1))
    model = make_model(policy=policy)
    fit(model, tcl.training.AtomicBackup(tmp_path))
    assert_same(model, whole)


def test_it_replaces_kerass_backup(tmp_path):
    backup = tcl.training.AtomicBackup(
        backup_dir=str(tmp_path / "backup"),
        save_freq="epoch",
        double_checkpoint=True,
        delete_checkpoint=False,
    )
    assert isinstance(backup, keras.callbacks.BackupAndRestore)
    fit(make_model(), backup)
    assert sorted(os.listdir(tmp_path / "backup")) == ["2", "3"]


@pytest.mark.parametrize(
    "wrong", [dict(backup_dir=""), dict(save_freq=0), dict(save_freq=True), dict(save_freq="day")]
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        tcl.training.AtomicBackup(**dict(backup_dir="backup") | wrong)


def test_without_backups_it_only_resumes(tmp_path):
    with interrupted():
        fit(make_model(), tcl.training.AtomicBackup(tmp_path), Interrupt(BATCHES + 1))
    model = make_model()
    fit(model, tcl.training.AtomicBackup(tmp_path, save_freq=False, delete_checkpoint=False))
    assert os.listdir(tmp_path) == ["1"]
    assert_same(model, uninterrupted()[0])


def damage(folder, how):
    if how == "state":
        (folder / "state.json").write_text('{"epoch": 1')
    elif how == "truncated":
        path = max(folder.glob("*.npy"), key=os.path.getsize)
        path.write_bytes(path.read_bytes()[:-1])
    else:
        (folder / "0.npy").unlink()


@pytest.mark.parametrize("how", ["state", "truncated", "missing"])
def test_a_damaged_backup_is_not_loaded(how, tmp_path):
    options = dict(double_checkpoint=True, delete_checkpoint=False)
    with interrupted():
        fit(
            make_model(), tcl.training.AtomicBackup(tmp_path, **options), Interrupt(2 * BATCHES + 1)
        )
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]
    damage(tmp_path / "2", how)
    model = make_model()
    with pytest.warns(UserWarning, match="A backup is damaged, the one before is used"):
        fit(model, tcl.training.AtomicBackup(tmp_path, **options))
    assert_same(model, uninterrupted()[0])
    for folder in tmp_path.iterdir():
        damage(folder, how)
    model = make_model()
    model.optimizer.build(model.trainable_variables)
    before = numbers(model)
    with pytest.raises(ValueError, match="backup_dir: expected complete backups"):
        fit(model, tcl.training.AtomicBackup(tmp_path, **options))
    for a, b in zip(numbers(model), before, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("removed_before", [0, EPOCHS - 1], ids=["an older one", "the last"])
def test_a_process_killed_while_it_removes_backups_leaves_a_usable_state(
    removed_before, tmp_path, monkeypatch
):
    # Only some files were removed: the rest must not count as a backup, nor prevent a new one.
    removed = []

    def half(folder, rmtree=shutil.rmtree):
        removed.append(folder)
        if len(removed) <= removed_before:
            return rmtree(folder)
        for path in [*Path(folder).rglob("*.npy")][:2]:
            path.unlink()
        raise Interruption

    with monkeypatch.context() as patch, interrupted():
        patch.setattr(shutil, "rmtree", half)
        fit(make_model(), tcl.training.AtomicBackup(tmp_path))
    assert (tmp_path / str(removed_before + 1)).exists()
    model = make_model()
    fit(model, tcl.training.AtomicBackup(tmp_path))
    assert_same(model, uninterrupted()[0])


def test_a_backup_of_another_model_is_refused(tmp_path):
    fit(make_model(), tcl.training.AtomicBackup(tmp_path, delete_checkpoint=False))
    state = json.loads((tmp_path / str(EPOCHS) / "state.json").read_text())
    assert state["epoch"] == EPOCHS
    with pytest.raises(ValueError, match="backup_dir: expected a backup of this model"):
        fit(make_model(width=5), tcl.training.AtomicBackup(tmp_path))


def test_a_model_that_is_not_built_is_refused(tmp_path):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="model: expected a built model"):
        model.fit(np.ones([2, 2]), np.ones([2, 1]), callbacks=[tcl.training.AtomicBackup(tmp_path)])
