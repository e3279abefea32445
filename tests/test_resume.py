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
from tf_center_loss_op.training import backup_files


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
        return (tmp_path / "backup-1").exists()

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
    complete, partial = sorted(os.listdir(tmp_path))
    assert complete == "backup-1" and partial.endswith(".partial")
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
    assert sorted(os.listdir(tmp_path / "backup")) == ["backup-2", "backup-3"]


@pytest.mark.parametrize(
    "wrong",
    [
        dict(backup_dir=""),
        dict(backup_dir=3),
        dict(save_freq=0),
        dict(save_freq=True),
        dict(save_freq="day"),
    ],
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        tcl.training.AtomicBackup(**dict(backup_dir="backup") | wrong)


def test_without_backups_it_only_resumes(tmp_path):
    with interrupted():
        fit(make_model(), tcl.training.AtomicBackup(tmp_path), Interrupt(BATCHES + 1))
    model = make_model()
    fit(model, tcl.training.AtomicBackup(tmp_path, save_freq=False, delete_checkpoint=False))
    assert os.listdir(tmp_path) == ["backup-1"]
    assert_same(model, uninterrupted()[0])


# A state of valid JSON that no backup writes, as a function of the right one.
WRONG_STATES = {
    "null": lambda state: None,
    "a list": lambda state: [],
    "a number": lambda state: 7,
    "a text": lambda state: "state",
    "an empty object": lambda state: {},
    "another format": lambda state: state | dict(format="another"),
    "no format": lambda state: {k: v for k, v in state.items() if k != "format"},
    "a negative epoch": lambda state: state | dict(epoch=-5),
    "an epoch of text": lambda state: state | dict(epoch="1"),
    "an epoch of a float": lambda state: state | dict(epoch=1.0),
    "an epoch of a bool": lambda state: state | dict(epoch=True),
    "no epoch": lambda state: {k: v for k, v in state.items() if k != "epoch"},
    "a negative batch": lambda state: state | dict(batch=-1),
    "a batch of null": lambda state: state | dict(batch=None),
    "variables of a number": lambda state: state | dict(variables=3),
    "variables of an object": lambda state: state | dict(variables={"a": 1}),
    "variables of names": lambda state: state | dict(variables=["float32"] * 3),
    "variables of triples": lambda state: state | dict(variables=[["float32", [1], 2]]),
    "an unknown dtype": lambda state: state | dict(variables=[["float33", [1]]]),
    "a dtype of a number": lambda state: state | dict(variables=[[1, [1]]]),
    "a shape of a number": lambda state: state | dict(variables=[["float32", 1]]),
    "a shape of texts": lambda state: state | dict(variables=[["float32", ["1"]]]),
    "a negative shape": lambda state: state | dict(variables=[["float32", [-1]]]),
    "metrics of null": lambda state: state | dict(metrics=None),
    "copies of null": lambda state: state | dict(copies=None),
    "fewer copies": lambda state: state | dict(copies=state["copies"][1:]),
    "negative copies": lambda state: state | dict(copies=[-1] * len(state["copies"])),
    "many copies": lambda state: state | dict(copies=[10**18] * len(state["copies"])),
    "copies of texts": lambda state: state | dict(copies=["0"] * len(state["copies"])),
    "fewer variables": lambda state: state | dict(variables=state["variables"][1:]),
    "another dtype": lambda state: state | dict(variables=wider(state["variables"])),
}


def wider(variables):
    return [["float64" if k == 0 else dtype, shape] for k, (dtype, shape) in enumerate(variables)]


def damage(folder, how):
    if how in WRONG_STATES:
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(WRONG_STATES[how](state)))
    elif how == "state":
        (folder / "state.json").write_text('{"epoch": 1')
    elif how == "nested state":
        (folder / "state.json").write_text("[" * 100_000)
    elif how == "bytes as state":
        (folder / "state.json").write_bytes(b"\xff")
    elif how == "header":
        (folder / "0.npy").write_bytes(b"\x93NUMPY\x01\x00\x06\x00((((\n")
    elif how == "truncated":
        path = max(folder.glob("*.npy"), key=os.path.getsize)
        path.write_bytes(path.read_bytes()[:-1])
    else:
        (folder / "0.npy").unlink()


@pytest.fixture(scope="module")
def two_backups(tmp_path_factory):
    """A folder of two backups of a training that was interrupted."""
    folder = tmp_path_factory.mktemp("two_backups")
    options = dict(double_checkpoint=True, delete_checkpoint=False)
    with interrupted():
        fit(make_model(), tcl.training.AtomicBackup(folder, **options), Interrupt(2 * BATCHES + 1))
    assert sorted(os.listdir(folder)) == ["backup-1", "backup-2"]
    return folder


DAMAGES = ["state", "nested state", "bytes as state", "header", *WRONG_STATES]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damage_is_found_and_named(how, two_backups, tmp_path):
    folder = shutil.copytree(two_backups, tmp_path / "backups")
    for backup in folder.iterdir():
        damage(backup, how)
    callback = tcl.training.AtomicBackup(folder)
    model = make_model()
    callback.set_model(model)
    before = numbers(model)
    words = r"backup_dir: expected complete backups, got '.*backup-2': .*'.*backup-1': "
    with pytest.raises(ValueError, match=words):
        callback.on_train_begin()
    for a, b in zip(numbers(model), before, strict=True):
        assert np.array_equal(a, b)


def test_other_metrics_than_those_of_the_backup_are_an_error(tmp_path):
    with interrupted():
        fit(make_model(), tcl.training.AtomicBackup(tmp_path, save_freq=2), Interrupt(3))
    model = make_model()
    top = keras.metrics.SparseTopKCategoricalAccuracy(2)
    model.compile("adam", model.loss, metrics=["accuracy", top])
    with pytest.raises(ValueError, match="expected a backup with the metrics of this model"):
        fit(model, tcl.training.AtomicBackup(tmp_path, save_freq=2))


NOT_OURS = ["7", "007", "x.partial", "new.partial", "backup-8", "backup-1.partial", "notes"]


@pytest.mark.parametrize("content", ["nothing", "a file", "a state"])
def test_the_files_of_others_stay(content, tmp_path):
    folder = tmp_path / "backups"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "12.partial").write_text("mine")
    for name in NOT_OURS:
        (folder / name).mkdir()
        if content == "a file":
            (folder / name / "0.npy").write_text("mine")
        if content == "a state":
            (folder / name / "state.json").write_text("{}")
    before = sorted(path.relative_to(tmp_path) for path in folder.rglob("*"))
    fit(make_model(), tcl.training.AtomicBackup(folder, save_freq=4))
    assert sorted(path.relative_to(tmp_path) for path in folder.rglob("*")) == before


def test_a_file_of_others_in_a_backup_stays(tmp_path):
    with interrupted():
        fit(make_model(), tcl.training.AtomicBackup(tmp_path), Interrupt(BATCHES + 1))
    (tmp_path / "backup-1" / "notes.txt").write_text("mine")
    model = make_model()
    fit(model, tcl.training.AtomicBackup(tmp_path))
    assert [path.name for path in tmp_path.rglob("*")] == ["backup-1", "notes.txt"]
    assert_same(model, uninterrupted()[0])


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    random = "backup-0123456789abcdef.partial"
    for name in (random, "backup-5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "AtomicBackup.txt").write_text(backup_files.FORMAT)
        (tmp_path / name / "0-1.npy").write_text("half")
        (tmp_path / name / ".tf_center_loss_op-0.tmp").write_text("half")
    (tmp_path / random.replace("0", "1")).mkdir()  # Killed before the marker was written.
    fit(make_model(), tcl.training.AtomicBackup(tmp_path, delete_checkpoint=False))
    assert os.listdir(tmp_path) == [f"backup-{EPOCHS}"]


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_integers_of_numpy_and_every_kind_of_path(kind, tmp_path):
    with interrupted():
        backup = tcl.training.AtomicBackup(kind(str(tmp_path / "b")), save_freq=np.int64(2))
        fit(make_model(), backup, Interrupt(3))
    assert os.listdir(tmp_path / "b") == ["backup-1"]


@pytest.mark.parametrize("how", ["state", "truncated", "missing", "a negative epoch"])
def test_a_damaged_backup_is_not_loaded(how, tmp_path):
    options = dict(double_checkpoint=True, delete_checkpoint=False)
    with interrupted():
        fit(
            make_model(), tcl.training.AtomicBackup(tmp_path, **options), Interrupt(2 * BATCHES + 1)
        )
    assert sorted(os.listdir(tmp_path)) == ["backup-1", "backup-2"]
    damage(tmp_path / "backup-2", how)
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

    def half(path, unlink=Path.unlink, **options):
        if path.suffix == ".npy" and path.parent.name == f"backup-{removed_before + 1}":
            if len(removed) == 2:
                raise Interruption
            removed.append(path)
        unlink(path, **options)

    with monkeypatch.context() as patch, interrupted():
        patch.setattr(Path, "unlink", half)
        fit(make_model(), tcl.training.AtomicBackup(tmp_path))
    assert (tmp_path / f"backup-{removed_before + 1}").exists()
    model = make_model()
    fit(model, tcl.training.AtomicBackup(tmp_path))
    assert_same(model, uninterrupted()[0])


def test_a_backup_of_another_model_is_refused(tmp_path):
    fit(make_model(), tcl.training.AtomicBackup(tmp_path, delete_checkpoint=False))
    state = json.loads((tmp_path / f"backup-{EPOCHS}" / "state.json").read_text())
    assert state["epoch"] == EPOCHS
    with pytest.raises(ValueError, match="backup_dir: expected a backup of this model"):
        fit(make_model(width=5), tcl.training.AtomicBackup(tmp_path))


def test_a_model_that_is_not_built_is_refused(tmp_path):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="model: expected a built model"):
        model.fit(np.ones([2, 2]), np.ones([2, 1]), callbacks=[tcl.training.AtomicBackup(tmp_path)])
