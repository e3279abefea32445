"""Which form replicas exchange, in which precision, of which size; for test_distribute.py."""

import numpy as np
import tensorflow as tf

import tf_center_loss_op as tcl
from replica_checks import C, D, batches, mirrored_table, sharded_table, step_of
from replicas import copies, gather, mirrored, spread
from tf_center_loss_op._core import arguments
from tf_center_loss_op.distribute.global_batch import GlobalBatch

strategy = mirrored(2)

# The smaller form by hand, for D = 6, int32 labels and two replicas of four samples. Samples take
# 4 * (6 * 4 + 4) = 112 bytes on each replica (64 in float16), sums 6 * 4 + 16 = 40 bytes a label.
with strategy.scope():
    centers = tf.Variable(tf.zeros([C, D]), trainable=False)


@tf.function
def form(features, labels):
    def step(features, labels):
        a = arguments.check(features, labels, centers, alpha=0.5, rule="paper")
        return GlobalBatch(a).sums_are_smaller

    return strategy.run(step, args=(features, labels))


for dtype, labels, expected in [
    ("float32", [[0, 1, 2, 3], [0, 0, 0, 0]], False),  # 160 > 112
    ("float32", [[0, 1, 2, 2], [0, 0, 0, 0]], False),  # 120 > 112
    ("float32", [[0, 1, 1, 1], [2, 2, 2, 3]], True),  # 80 < 112
    ("float16", [[0, 1, 1, 1], [2, 2, 2, 3]], False),  # 80 > 64
    ("float16", [[0, 0, 0, 0], [2, 2, 2, 2]], True),  # 40 < 64
]:
    features = spread(strategy, [np.zeros([4, D], dtype)] * 2)
    result = form(features, spread(strategy, [np.int32(part) for part in labels]))
    assert [bool(k) for k in strategy.experimental_local_results(result)] == [expected] * 2

# 16-bit features in both forms give the results of one replica, with equal copies.
for dtype, labels in [("float16", "few"), ("bfloat16", "distinct")]:
    features, ids = batches(2, 0, labels)
    features = [tf.cast(part, dtype).numpy() for part in features]
    start = np.ones([C, D], "f")
    centers, alone = mirrored_table(strategy)[0](start), tf.Variable(start)
    run = step_of(strategy, centers)
    loss, gradient = run(spread(strategy, features), spread(strategy, ids))
    x, y = tf.concat(features, 0), np.concatenate(ids)
    with tf.GradientTape() as tape:
        tape.watch(x)
        expected = tcl.center_loss(x, y, alone)
    np.testing.assert_allclose(gather(strategy, loss).sum(), expected, rtol=1e-6)
    assert np.array_equal(gather(strategy, gradient), tape.gradient(expected, x).numpy())
    np.testing.assert_allclose(copies(strategy, centers), alone.numpy(), rtol=1e-6)
    assert not np.array_equal(alone.numpy(), start)


def collectives(graph):
    """Shapes of the results of all collective ops, also of functions."""
    definition = graph.as_graph_def(add_shapes=True)
    nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
    for node in nodes:
        if node.op.startswith("Collective"):
            yield from node.attr["_output_shapes"].list.shape


# No collective op has C in its shape: nothing of the table's size is exchanged.


for make in (mirrored_table(strategy)[0], sharded_table(strategy)[0]):
    step = step_of(strategy, make(np.zeros([C, D], "f")))
    features, ids = batches(2, 0)
    traced = step.get_concrete_function(spread(strategy, features), spread(strategy, ids))
    found = list(collectives(traced.graph))
    assert len(found) >= 6, found
    assert not any(C in [dim.size for dim in shape.dim] for shape in found)
