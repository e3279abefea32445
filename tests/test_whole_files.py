"""A saved file replaces the old one as a whole, and keeps its mode, links and neighbours."""

import os
import signal
import stat
import threading

import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from child import run_program
from tf_center_loss_op.tables import whole_files

NUMBERS = np.arange(6, dtype=np.float32).reshape(3, 2)


@pytest.fixture
def centers():
    return tf.Variable(NUMBERS, trainable=False)


@pytest.fixture
def umask():
    """A function that sets the umask for the test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
def test_a_new_file_has_the_mode_that_open_gives(centers, umask, mask, tmp_path):
    umask(mask)
    (tmp_path / "plain").write_bytes(b"")
    tcl.tables.save(centers, tmp_path / "centers.npy")
    assert mode(tmp_path / "centers.npy") == mode(tmp_path / "plain") == 0o666 & ~mask


@pytest.mark.parametrize("old", [0o600, 0o640, 0o644, 0o666, 0o755])
def test_a_replaced_file_keeps_its_mode(centers, umask, old, tmp_path):
    path = tmp_path / "centers.npy"
    path.write_bytes(b"old")
    path.chmod(old)
    umask(0o077)
    tcl.tables.save(centers, path)
    assert mode(path) == old and np.array_equal(np.load(path), NUMBERS)


def test_the_scratch_file_of_a_private_file_is_private(umask, tmp_path):
    umask(0)
    (tmp_path / "private").write_bytes(b"old")
    (tmp_path / "private").chmod(0o600)
    with whole_files.replacing(tmp_path / "private"):
        (scratch,) = [path for path in tmp_path.iterdir() if path.name != "private"]
        assert mode(scratch) == 0o600


def test_a_write_protected_file_is_not_replaced(centers, tmp_path, monkeypatch):
    path = tmp_path / "centers.npy"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # Root may write.
    with pytest.raises(PermissionError, match=r"centers\.npy"):
        tcl.tables.save(centers, path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["centers.npy"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_a_replaced_file_keeps_its_owner(centers, tmp_path):
    path = tmp_path / "centers.npy"
    path.write_bytes(b"old")
    os.chown(path, 65534, 65533)
    tcl.tables.save(centers, path)
    assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65533)


def test_threads_that_save_never_touch_the_umask(centers, tmp_path, monkeypatch):
    def refused(mask):
        raise AssertionError("the umask belongs to the whole process")

    monkeypatch.setattr(os, "umask", refused)
    errors = []

    def save(k):
        try:
            for _ in range(20):
                tcl.tables.save(centers, tmp_path / f"{k % 2}.npy")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(os.listdir(tmp_path)) == ["0.npy", "1.npy"]


@pytest.mark.parametrize("target", ["there", "new"])
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("links", [1, 3])
def test_a_symbolic_link_is_followed(centers, target, absolute, links, tmp_path):
    folder, real = tmp_path / "links", tmp_path / "elsewhere" / "real.npy"
    folder.mkdir(), real.parent.mkdir()
    if target == "there":
        real.write_bytes(b"old")
        real.chmod(0o600)
    end = real if absolute else os.path.join("..", "elsewhere", "real.npy")
    for k in range(links):
        (folder / str(k)).symlink_to(end)
        end = str(k)
    tcl.tables.save(centers, folder / end)
    assert (folder / end).is_symlink() and np.array_equal(np.load(real), NUMBERS)
    assert target == "new" or mode(real) == 0o600
    assert len(os.listdir(folder)) == links and os.listdir(real.parent) == ["real.npy"]


def test_a_link_in_the_folder_names_is_followed(centers, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    tcl.tables.save(centers, tmp_path / "link" / "centers.npy")
    assert np.array_equal(np.load(tmp_path / "real" / "centers.npy"), NUMBERS)


def test_a_circle_of_links_is_an_error(centers, tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        tcl.tables.save(centers, tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


class PathLike:
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


@pytest.mark.parametrize("name", ["c.npy", "n" * 255, "Zentren-\u00fc\u4e2d.npy"])
@pytest.mark.parametrize("kind", [str, os.fsencode, PathLike, lambda p: PathLike(os.fsencode(p))])
def test_every_kind_of_path(centers, name, kind, tmp_path):
    path = kind(str(tmp_path / name))
    for _ in range(2):
        tcl.tables.save(centers, path)
    assert os.listdir(tmp_path) == [name]
    loaded = tf.Variable(tf.zeros([3, 2]))
    tcl.tables.load(loaded, path)
    assert np.array_equal(loaded.numpy(), NUMBERS)


def test_a_path_of_the_greatest_length(centers, tmp_path):
    # np.save takes it, so a scratch file must not need a longer one.
    folder = str(tmp_path)
    while len(folder) < 3800:
        folder = os.path.join(folder, "f" * 200)
    folder = os.path.join(folder, "f" * (4095 - len(folder) - len("//f/c.npy")), "f")
    os.makedirs(folder)
    path = os.path.join(folder, "c.npy")
    assert len(path) >= 4090
    tcl.tables.save(centers, path)
    assert os.listdir(folder) == ["c.npy"]


def test_a_relative_path(centers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tcl.tables.save(centers, "centers.npy")
    assert np.array_equal(np.load(tmp_path / "centers.npy"), NUMBERS)


@pytest.mark.parametrize(
    "path", ["", ".", "folder", "folder/", "none/c.npy", "file/c.npy", "n" * 256]
)
def test_a_path_that_cannot_be_a_file_changes_nothing(centers, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match=r"path: expected a file|Is a directory|Not a|too long"):
        tcl.tables.save(centers, path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and not os.listdir("folder")


def test_a_device_is_written_to_and_not_replaced(centers, tmp_path):
    tcl.tables.save(centers, os.devnull)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    (tmp_path / "link").symlink_to(os.devnull)
    tcl.tables.save(centers, tmp_path / "link")
    assert os.listdir(tmp_path) == ["link"]


def test_a_killed_process_leaves_the_old_file_and_no_scratch_file_for_long(centers, tmp_path):
    path = tmp_path / "centers.npy"
    tcl.tables.save(centers, path)
    killed = run_program("killed_while_saving", path, cwd=tmp_path, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert np.array_equal(np.load(path), NUMBERS)
    assert len(os.listdir(tmp_path)) == 2
    tcl.tables.save(centers, tmp_path / "another.npy")
    assert sorted(os.listdir(tmp_path)) == ["another.npy", "centers.npy"]


def test_a_file_that_is_being_written_is_left_alone(tmp_path):
    path = tmp_path / "text"
    with whole_files.replacing(path) as first:
        first.write(b"first")
        with whole_files.replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["text"]


def test_files_of_others_are_left_alone(centers, tmp_path):
    names = ["12.tmp", "centers.npy.tmp", "centers.npyabc.tmp", ".tf_center_loss_op-notes", "x.tmp"]
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / ".tf_center_loss_op-0.tmp").mkdir()
    os.mkfifo(tmp_path / ".tf_center_loss_op-1.tmp")
    (tmp_path / ".tf_center_loss_op-2.tmp").symlink_to("x.tmp")
    before = sorted(os.listdir(tmp_path))
    tcl.tables.save(centers, tmp_path / "centers.npy")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "centers.npy"])


def test_a_scratch_file_that_is_removed_before_its_lock_is_made_again(tmp_path, monkeypatch):
    lock = whole_files.fcntl.flock

    def removed_first(file, how):
        (scratch,) = tmp_path.iterdir()
        scratch.unlink()
        monkeypatch.undo()
        lock(file, how)

    monkeypatch.setattr(whole_files.fcntl, "flock", removed_first)
    with whole_files.replacing(tmp_path / "text") as file:
        file.write(b"whole")
    assert (tmp_path / "text").read_bytes() == b"whole" and os.listdir(tmp_path) == ["text"]
