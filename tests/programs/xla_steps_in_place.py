"""Programs with reads, compiled by XLA, on a table of 2 GiB: none copies it; for test_xla.py.

A copy would show in the peak of the resident memory, or in the address.
"""

import tensorflow as tf

import tf_center_loss_op as tcl
from measure import address, memory

C, D, B = 2**20, 512, 256
centers = tf.Variable(tf.zeros([C, D]))
features = tf.random.normal([B, D])
labels = tf.random.uniform([B], 0, C - 10, tf.int64)


def step(labels=labels):
    return tcl.center_loss(features, labels, centers)


def read(labels=labels):
    return tf.gather(centers, labels)


def alone():
    return step()


def between_reads():
    return read(), step(), read()


def read_first_and_used_last():
    early = read()
    return early * step()


def loss_first_step_later():
    loss = tcl.center_loss(features, labels, centers, update_centers=False)
    tcl.update_centers(features, labels, centers)
    return loss


def read_in_a_branch():
    early = tf.cond(features[0, 0] > 0, lambda: read()[0, 0], lambda: 0.0)
    return early, step()


def sum_of_the_table():
    return tf.reduce_sum(centers), step()


def loop_between_reads():
    whole, total = tf.reduce_sum(centers), read()
    for i in tf.range(5, dtype=tf.int64):
        total += read(labels + i)
        step(labels + i)
        total += read(labels + i)
    return whole, total, step()


programs = [
    alone,
    between_reads,
    read_first_and_used_last,
    loss_first_step_later,
    read_in_a_branch,
    sum_of_the_table,
    loop_between_reads,
]
programs = [tf.function(program, jit_compile=True) for program in programs]
before = address(centers)
tf.function(step, jit_compile=True)(labels)
peak = memory("VmHWM")
for program in programs:
    for _ in range(2):
        program()
    assert address(centers) == before, program
    now = memory("VmHWM")
    assert now - peak < 2**30, (program, now - peak)  # half a table
step()  # and by the op without XLA
assert address(centers) == before
