"""Steps and tables whose memory is not to be had, by every path; for test_out_of_memory.py.

Prints the errors, as JSON.
"""

import contextlib
import json
import resource
from pathlib import Path

import tensorflow as tf

import tf_center_loss_op as tcl

BATCH = 6_000_000  # The labels are sorted in 200 MB.
SPARE = 120_000_000
TABLE = 2**28, 4  # 4 GiB

features, labels = tf.zeros([BATCH, 1]), tf.range(BATCH)
centers = tf.Variable(tf.ones([BATCH, 1]), trainable=False)
errors = {}


@contextlib.contextmanager
def little_memory():
    """Lets the process have SPARE more bytes than it has now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + SPARE, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attempt(name, call):
    with little_memory():
        try:
            call()
            errors[name] = None
        except Exception as error:
            errors[name] = [type(error).__name__, str(error)]


def step():
    return tcl.update_centers(features, labels, centers, rule="mean", impl="native")


def loss():
    return tcl.center_loss(features, labels, centers, impl="native", update_centers=False)


# The first call of each allocates what stays, and compiles.
for jit in (False, True):
    compiled = tf.function(step, jit_compile=jit)
    compiled()
    attempt("xla" if jit else "function", compiled)
step()
attempt("eager", step)
kept = loss()
attempt("loss", loss)

# Nothing was written meanwhile: each of three steps that ran has halved the centers.
assert centers.numpy().min() == centers.numpy().max() == 2.0**-3
step()
assert centers.numpy().max() == 2.0**-4

for initializer in ("zeros", "ones", tcl.tables.RandomNormal()):
    name = initializer if isinstance(initializer, str) else "normal"
    attempt(name, lambda: tcl.tables.create(*TABLE, initializer=initializer))  # noqa: B023
layer = tcl.CenterLoss(TABLE[0])
attempt("layer", lambda: layer.build((None, TABLE[1])))

small = tcl.tables.create(BATCH, 1)
attempt("nothing", lambda: tcl.update_centers(features[:5], labels[:5], small, impl="native"))
print(json.dumps(errors))
