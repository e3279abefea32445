"""Prints a digest of the results of each implementation; for test_determinism.py.

Arguments: TensorFlow's number of threads, "strict" (op determinism) or "free", implementations.
"""

import hashlib
import sys

import tensorflow as tf

import problems
import tf_center_loss_op as tcl

threads, determinism, *implementations = sys.argv[1:]
tf.config.threading.set_intra_op_parallelism_threads(int(threads))
tf.config.threading.set_inter_op_parallelism_threads(int(threads))
if determinism == "strict":
    tf.keras.utils.set_random_seed(0)
    tf.config.experimental.enable_op_determinism()


def digest(impl):
    result = hashlib.sha256()
    for i, shape in enumerate(problems.SHAPES):
        problem = problems.make(shape, weights=True, ignore="outside")
        features, centers = tf.constant(problem.features), tf.Variable(problem.centers)
        with tf.GradientTape() as tape:
            tape.watch(features)
            loss = tcl.center_loss(
                features,
                problem.labels,
                centers,
                ignore_class=-1,
                sample_weight=problem.sample_weight,
                impl=impl,
                reduction=["mean", "none"][i % 2],
            )
        for part in (loss, tape.gradient(loss, features), centers):
            result.update(part.numpy().tobytes())
    return result.hexdigest()


print([digest(impl) for impl in implementations])
