"""Measures the cost of a step on several replicas: `python -m bench.distribute`.

Times a training step (loss, gradient with respect to the features, step of the centers) under
MirroredStrategy over logical CPU devices, against the number of replicas, batch and D, with the
table mirrored and sharded. Counts the bytes that each replica sends in a step. Before timing,
checks that the loss equals that of one replica on the concatenated batch. Each number of replicas
runs in a separate process.

`python -m bench.distribute --paper` calculates instead of measuring: memory, traffic and time of a
sharded table that is too large for one device. It needs no GPU; its assumptions are arguments.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import textwrap
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

RESULTS = Path(__file__).parent / "results" / "distribute.json"
CLASSES = 100_000
REPLICAS = (1, 2, 4)
BATCHES = (64, 256)
DIMS = (64, 512)
LABELS = ("uniform", "ten classes")
ROUNDS = 40
LABEL_BYTES, FLOAT_BYTES = 8, 4


def sent_by_gather(replicas, rows, row_bytes):
    """Returns the bytes that one replica sends in an all-gather of `rows` rows (ring algorithm)."""
    return (replicas - 1) * rows * row_bytes


def sent_by_sum(replicas, rows, row_bytes):
    """Returns the bytes that one replica sends in an all-reduce of `rows` rows (ring algorithm)."""
    return 2 * (replicas - 1) * rows * row_bytes // replicas


def measure(replicas):
    """Yields the cases of this number of replicas; the process must not have used TensorFlow."""
    import tensorflow as tf

    import tf_center_loss_op as tcl
    from tf_center_loss_op.distribute.exchange import Exchange

    cpu = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * replicas
    tf.config.set_logical_device_configuration(cpu, devices)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{k}" for k in range(replicas)])
    sent = tf.Variable(tf.zeros([], tf.int64))
    counting = False

    def counted(method, cost):
        def call(self, rows, *rest):
            if counting and tf.distribute.get_replica_context()._replica_id == 0:
                count, size = tf.shape(rows, tf.int64)[0], int(np.prod(rows.shape[1:]))
                sent.assign_add(cost(replicas, count, size * rows.dtype.size))
            return method(self, rows, *rest)

        return call

    Exchange._gather = counted(Exchange._gather, sent_by_gather)
    Exchange.add = counted(Exchange.add, sent_by_sum)

    def spread(array):
        parts = np.split(array, replicas)
        return strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(parts[context.replica_id_in_sync_group])
        )

    def step_of(centers):
        @tf.function(autograph=False)
        def run(features, labels):
            def step(features, labels):
                with tf.GradientTape() as tape:
                    tape.watch(features)
                    loss = tcl.center_loss(features, labels, centers)
                return loss, tape.gradient(loss, features)

            return strategy.run(step, args=(features, labels))

        return run

    @tf.function(autograph=False)
    def nothing(features, labels):
        return strategy.run(lambda x, y: tf.reduce_sum(x[:1]), args=(features, labels))

    def median(step, *batch):
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for part in strategy.experimental_local_results(step(*batch)):
                (part[0] if isinstance(part, tuple) else part).numpy()
            times.append(time.perf_counter() - start)
        return statistics.median(times[ROUNDS // 4 :])

    rng = np.random.default_rng(0)
    for batch in BATCHES:
        for dim in DIMS:
            for kind in LABELS:
                features = rng.standard_normal((replicas * batch, dim), np.float32)
                classes = CLASSES if kind == "uniform" else 10
                labels = rng.integers(0, classes, replicas * batch)
                alone = tf.Variable(tf.zeros([CLASSES, dim]), trainable=False)
                expected = float(tcl.center_loss(features, labels, alone))
                case = {"replicas": replicas, "batch": batch, "dim": dim, "labels": kind}
                parts = spread(features), spread(labels)
                case["empty_us"] = 1e6 * median(nothing, *parts)
                for table in ("mirrored", "sharded"):
                    with strategy.scope():
                        if table == "mirrored":
                            centers = tf.Variable(tf.zeros([CLASSES, dim]), trainable=False)
                        else:
                            centers = tcl.distribute.ShardedCenters(CLASSES, dim)
                    counting, _ = True, sent.assign(0)
                    loss, _ = step_of(centers)(*parts)
                    shares = strategy.experimental_local_results(loss)
                    np.testing.assert_allclose(sum(map(float, shares)), expected, rtol=1e-5)
                    counting = False
                    microseconds = 1e6 * median(step_of(centers), *parts)
                    memory = CLASSES * dim * FLOAT_BYTES
                    memory //= replicas if table == "sharded" else 1
                    yield case | {
                        "table": table,
                        "step_us": microseconds,
                        "sent_bytes": int(sent),
                        "table_bytes": memory,
                    }


def paper(options):
    """Yields the rows of the calculated table, one for each number of GPUs."""
    table = options.classes * options.dim * FLOAT_BYTES
    for gpus in options.gpus:
        batch = gpus * options.batch
        row = options.dim * options.feature_bytes
        gather = sent_by_gather(gpus, options.batch, row + LABEL_BYTES)
        back = sent_by_sum(gpus, batch, options.dim * FLOAT_BYTES)
        # A ring over several machines is as fast as its slowest link.
        inside = gpus <= options.gpus_per_machine
        link = (options.link_inside if inside else options.link_outside) * 1e9
        # Each owner reads all features, writes a residual for each of them, and reads and writes
        # the rows of its share of the batch.
        passes = batch * (row + 2 * options.dim * FLOAT_BYTES)
        passes += 2 * options.batch * options.dim * FLOAT_BYTES
        # A ring of R replicas takes R - 1 hops for an all-gather and 2 (R - 1) for an all-reduce.
        hops = 3 * (gpus - 1) * options.hop_us * 1e-6
        network, memory = (gather + back) / link, passes / (options.memory * 1e9)
        step = network + memory + hops
        yield {
            "GPUs": gpus,
            "table a GPU, GB": table / gpus / 1e9,
            "batch": batch,
            "gathered, MB": gather / 1e6,
            "residuals back, MB": back / 1e6,
            "buffers a GPU, MB": batch * (row + options.dim * FLOAT_BYTES + LABEL_BYTES) / 1e6,
            "network, ms": network * 1e3,
            "memory, ms": memory * 1e3,
            "hops, ms": hops * 1e3,
            "step, ms": step * 1e3,
            "of the whole step, %": 100 * step / (step + options.backbone_ms * 1e-3),
            "million samples/s": batch / (step + options.backbone_ms * 1e-3) / 1e6,
        }


def wrapped(text):
    """Breaks a paragraph into the lines that the guide has."""
    return textwrap.fill(text, 100, break_on_hyphens=False)


def assumptions(options):
    """Returns the assumptions of the calculation, in words."""
    table = options.classes * options.dim * FLOAT_BYTES / 1e9
    return wrapped(
        f"{options.classes:,} labels × {options.dim}: one copy is {table:g} GB. Assumptions: "
        f"{options.batch} samples per GPU; features of {options.feature_bytes} bytes; "
        f"{options.gpus_per_machine} GPUs per machine; {options.link_inside:g} GB/s per GPU and "
        f"direction inside a machine, {options.link_outside:g} GB/s between machines; "
        f"{options.memory:g} GB/s of memory bandwidth; {options.hop_us:g} µs from one GPU to the "
        f"next; {options.backbone_ms:g} ms for the rest of a step."
    )


def limit(options):
    """Returns the limit of the scaling, in words."""

    def row_of(gpus):
        return next(paper(argparse.Namespace(**vars(options) | {"gpus": [gpus]})))

    gpus = options.gpus_per_machine
    while row_of(gpus)["step, ms"] < options.backbone_ms:
        gpus *= 2
    row = row_of(gpus)
    most = row["batch"] / row["step, ms"] / 1e3
    return wrapped(
        f"At {gpus:,} GPUs the center loss takes {row['step, ms']:.0f} ms, more than the other "
        f"{options.backbone_ms:g} ms of a step. No number of GPUs processes more than {most:.2g} "
        "million samples a second, because every replica processes the whole batch."
    )


def markdown(rows):
    """Formats dicts with the same keys as a table in Markdown."""
    rows = list(rows)
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(map(_cell, row.values())) + " |")
    return "\n".join(lines)


def _cell(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{value:,}"


def measured(cases):
    """Yields the rows of the measured table."""
    pairs = {}
    for case in cases:
        key = tuple(case[name] for name in ("replicas", "batch", "dim", "labels"))
        pairs.setdefault(key, {})[case["table"]] = case
    for (replicas, batch, dim, labels), of in pairs.items():
        yield {
            "replicas": replicas,
            "batch per replica": batch,
            "D": dim,
            "labels": Text(labels),
            "empty step, µs": of["mirrored"]["empty_us"],
            "mirrored, µs": of["mirrored"]["step_us"],
            "sharded, µs": of["sharded"]["step_us"],
            "mirrored sends, kB": of["mirrored"]["sent_bytes"] / 1e3,
            "sharded sends, kB": of["sharded"]["sent_bytes"] / 1e3,
            "mirrored table, MB": of["mirrored"]["table_bytes"] / 1e6,
            "sharded table, MB": of["sharded"]["table_bytes"] / 1e6,
        }


class Text(str):
    """A cell with text, which formats as it is."""

    def __format__(self, spec):
        return str(self)


def main():
    """Measures or calculates, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=list(REPLICAS))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--paper", action="store_true", help="calculate instead of measuring")
    parser.add_argument("--classes", type=int, default=100_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--batch", type=int, default=256, help="samples per GPU")
    parser.add_argument("--feature-bytes", type=int, default=2, help="2: bfloat16")
    parser.add_argument("--gpus-per-machine", type=int, default=8)
    parser.add_argument("--link-inside", type=float, default=300, help="GB/s per GPU and direction")
    parser.add_argument("--link-outside", type=float, default=40, help="GB/s per GPU and direction")
    parser.add_argument("--memory", type=float, default=2500, help="GB/s of a GPU's memory")
    parser.add_argument("--hop-us", type=float, default=3, help="µs from one GPU to the next")
    parser.add_argument("--backbone-ms", type=float, default=100, help="ms for the rest of a step")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(list(measure(options.one))))
    elif options.paper:
        print(assumptions(options), markdown(paper(options)), limit(options), sep="\n\n")
    else:
        from bench import machine

        others = machine.Others()
        cases = []
        for replicas in options.replicas:
            command = [sys.executable, "-m", "bench.distribute", "--one", str(replicas)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            cases += json.loads(done.stdout.splitlines()[-1])
        about = machine.describe() | {"cores_busy_meanwhile": round(others(), 2)}
        options.output.write_text(json.dumps({"machine": about, "cases": cases}, indent=1) + "\n")
        print(markdown(measured(cases)))


if __name__ == "__main__":
    main()
