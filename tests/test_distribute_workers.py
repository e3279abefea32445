"""Several processes give the results of one replica; if one is killed, the others end."""

import re

import numpy as np

from replicas import Cluster


def test_two_workers_equal_one_replica(tmp_path):
    with Cluster("workers_two", tmp_path, worker=2) as cluster:
        cluster.finish()
    tables = [np.load(tmp_path / f"centers-{k}.npy") for k in range(2)]
    assert tables[0].any()
    assert np.array_equal(*tables)


def test_three_workers_equal_one_replica(tmp_path):
    with Cluster("workers_three", tmp_path, worker=3) as cluster:
        cluster.finish()


def test_a_killed_worker_ends_the_other_and_both_resume(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    with Cluster("workers_training", whole, worker=2) as cluster:
        cluster.finish()

    with Cluster("workers_training", broken, worker=2) as cluster:
        cluster.kill("worker", 1, after="done 4")
        # The other worker ends with TensorFlow's error, within the time limit.
        assert cluster.wait("worker", 0, seconds=60) != 0
        log = cluster.log("worker", 0)
    assert re.search(
        r"(Unavailable|Internal|Aborted|Cancelled|DeadlineExceeded)Error|UNAVAILABLE", log
    )
    assert not (broken / "end-0.npz").exists()

    with Cluster("workers_training", broken, worker=2) as cluster:
        cluster.finish()
        resumed = int(re.search(r"resumed at (\d+)", cluster.log("worker", 0)).group(1))
    assert 3 <= resumed < 12
    for k in range(2):
        with np.load(whole / f"end-{k}.npz") as one, np.load(broken / f"end-{k}.npz") as other:
            assert len(one.files) == 3
            for name in one.files:
                assert one[name].any()
                assert np.array_equal(one[name], other[name])
