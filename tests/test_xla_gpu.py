"""XLA's program for a GPU equals the CPU's, except for the target and the workspace of the call.

It runs with the emulator here. tests/gpu/test_gpu_xla.py compiles it for a GPU.
"""

import json
import re

import pytest
import tensorflow as tf

import problems
import tf_center_loss_op as tcl
from child import TESTS, run_program, run_pytest
from naming import described
from pairwise import all_pairs

BATCHES = [1, 64]
CLASSES, DIM = 7, 3


def loss_and_gradient(loss, update, features, centers):
    with tf.GradientTape() as tape:
        tape.watch(features)
        value = loss()
    return value, tape.gradient(value, features)


def descent(loss, update, features, centers):
    with tf.GradientTape() as tape:
        tape.watch(features)
        value = loss(update_centers=False)
    d_features, d_centers = tape.gradient(value, [features, centers])
    centers.scatter_sub(d_centers)
    return value, d_features


def step_alone(loss, update, features, centers):
    update()


def second_order(loss, update, features, centers):
    with tf.GradientTape() as outer:
        outer.watch(features)
        with tf.GradientTape() as inner:
            inner.watch(features)
            value = loss(update_centers=False) ** 2
        gradients = inner.gradient(value, [features, centers])
        total = sum(
            tf.reduce_sum(tf.cast(tf.convert_to_tensor(g), centers.dtype) ** 3) for g in gradients
        )
    # No center moves; the step makes the table one of the results.
    update()
    return [tf.convert_to_tensor(g) for g in outer.gradient(total, [features, centers])]


def loop_after_a_read(loss, update, features, centers):
    total = tf.cast(tf.reduce_sum(centers * centers), centers.dtype)
    for _ in tf.range(3):
        total += tf.reduce_sum(loss())
    return total


FACTORS = {
    "program": [loss_and_gradient, descent, step_alone, second_order, loop_after_a_read],
    "batch": BATCHES,
    "rule": ["paper", "mean", "sum", "batch_mean", "paper_batch_mean", "tutorial"],
    "reduction": ["mean", "sum", "none"],
    "dtype": list(problems.DTYPES),
    "labels": ["int32", "int64"],
    "ignore": [None, "class", "outside"],
    "weights": [False, True],
    "alpha": ["known", "given"],
}


def hlo(function, *arguments):
    """The program, without the counters of traced functions in its names."""
    compiled = tf.function(function, jit_compile=True)
    text = compiled.experimental_get_compiler_ir(*arguments)(stage="hlo_no_metadata")
    text = text.replace(re.match(r"HloModule (\w+)", text)[1], "program")
    return re.sub(r"(while_body|while_cond)_\d+", r"\1", text)


def lowered(program, batch, rule, reduction, alpha, **given):
    shape = problems.Shape((batch,), DIM, CLASSES, "uniform", "several samples of a class")
    problem = problems.make(shape, **given)
    centers = tf.Variable(problem.centers)
    step_options = {"rule": rule, "ignore_class": problem.ignore_class, "impl": "native"}
    loss_options = {"reduction": reduction, "sample_weight": problem.sample_weight}

    def compute(features, labels, step_size):
        options = step_options | {"alpha": 0.3 if alpha == "known" else step_size}

        def loss(**more):
            return tcl.center_loss(features, labels, centers, **options, **loss_options, **more)

        def update():
            tcl.update_centers(features, labels, centers, **options)

        return program(loss, update, features, centers)

    step_size = tf.constant(0.3, centers.dtype)
    return hlo(compute, tf.constant(problem.features), tf.constant(problem.labels), step_size)


def lowered_from_a_residual(batch):
    def compute(features, labels):
        loss, _, update = tcl.compat.v1.center_loss(features, labels, alpha=0.3)
        with tf.control_dependencies([update]):
            return tf.identity(loss)

    with tf.compat.v1.variable_scope(None, "from_a_residual"):
        return hlo(compute, tf.ones([batch, DIM]), tf.one_hot(tf.range(batch) % CLASSES, CLASSES))


def all_programs():
    rows = all_pairs(FACTORS)
    programs = {"-".join(map(described, row.values())): lowered(**row) for row in rows}
    return programs | {f"from-residual-{b}": lowered_from_a_residual(b) for b in BATCHES}


def with_calls_of_the_cpu(program):
    """A GPU's program with the CPU's target in its calls, and without their workspaces."""
    program = program.replace('"tf_center_loss_op.cuda"', '"tf_center_loss_op.cpu"')
    return re.sub(r", u8\[\d+\]\{0\}\)", ")", program)


@pytest.mark.native
def test_a_gpu_gets_the_program_of_the_cpu(native_library, tmp_path):
    for_gpu = json.loads(run_program("lower_for_a_gpu", cwd=tmp_path, paths=[TESTS / "gpu"]))
    for_cpu = all_programs()
    assert for_gpu.keys() == for_cpu.keys()
    for name, program in for_gpu.items():
        assert '"tf_center_loss_op.cuda"' in program, name
        assert with_calls_of_the_cpu(program) == for_cpu[name], name
        # The table's result has the buffer of the argument.
        table = re.search(r"input_output_alias=\{ \{\d*\}: \((\d+), \{\}, may-alias\) \}", program)
        assert re.search(rf"\[{CLASSES},{DIM}\]\S* parameter\({table[1]}\)", program), name
        moving = re.findall(r"custom-call\(.*moves = true", program)
        assert all("output_to_operand_aliasing={{0}: (0, {})}" in call for call in moving), name


@pytest.mark.native
def test_the_tests_of_a_gpu_hold_with_the_emulator(native_library):
    out = run_pytest(TESTS / "gpu" / "test_gpu_xla.py", "--stand-in", timeout=1800)
    assert re.search(r"\n\d+ passed in", out), out
