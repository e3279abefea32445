"""The HLO that XLA gets for a GPU is, word for word, the form "hlo" that test_xla.py runs.

TensorFlow lowers no variable for a device that is not there, so a process of its own gives the CPU
the kernels of XLA_GPU_JIT. What XLA's compiler for GPUs makes of the HLO only a GPU can show.
"""

import ctypes
import json
import re
from pathlib import Path

import pytest
import tensorflow as tf

import problems
import tf_center_loss_op as tcl
from child import run_python
from naming import described
from pairwise import all_pairs

# Above 64 samples labels are grouped by sorting, not by a matrix.
BATCHES = [64, 65]
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
    # Nothing moves, but the table is to be among the results.
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
    """The program, the same however many functions TensorFlow has traced before."""
    compiled = tf.function(function, jit_compile=True)
    text = compiled.experimental_get_compiler_ir(*arguments)(stage="hlo_no_metadata")
    text = text.replace(re.match(r"HloModule (\w+)", text)[1], "program")
    return re.sub(r"(while_body|while_cond)_\d+", r"\1", text)


def lowered(program, batch, rule, reduction, alpha, **given):
    shape = problems.Shape((batch,), DIM, CLASSES, "uniform", "several samples of a class")
    problem = problems.make(shape, **given)
    centers = tf.Variable(problem.centers)
    step_options = {"rule": rule, "ignore_label": problem.ignore_label, "impl": "native"}
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


def compile_for_the_cpu_as_for_a_gpu():
    """From here on, in a process that has not used XLA."""

    class String(ctypes.Structure):  # of libstdc++
        _fields_ = [
            ("data", ctypes.c_void_p),
            ("size", ctypes.c_size_t),
            ("rest", ctypes.c_byte * 16),
        ]

    library = ctypes.CDLL(str(Path(tf.__file__).parent / "libtensorflow_cc.so.2"))
    # XlaOpRegistry::GetCompilationDevice(const std::string&, const DeviceRegistration**), which
    # begins with the name of the set of kernels.
    find = library[
        "_ZN10tensorflow13XlaOpRegistry20GetCompilationDeviceERKNSt7__cxx1112basic_stringIcSt11char"
        "_traitsIcESaIcEEEPPKNS0_18DeviceRegistrationE"
    ]
    find.restype = ctypes.c_bool
    name, found = ctypes.create_string_buffer(b"CPU"), ctypes.POINTER(String)()
    assert find(ctypes.byref(String(ctypes.addressof(name), 3)), ctypes.byref(found))
    kernels = found.contents
    assert ctypes.string_at(kernels.data, kernels.size) == b"XLA_CPU_JIT"
    ctypes.memmove(kernels.data, b"XLA_GPU_JIT", kernels.size)


@pytest.mark.native
def test_a_gpu_gets_the_hlo_that_is_tested_on_the_cpu(native_library, tmp_path, monkeypatch):
    for_gpu = json.loads(
        run_python(
            """
            import json
            import test_xla_gpu

            test_xla_gpu.compile_for_the_cpu_as_for_a_gpu()
            print(json.dumps(test_xla_gpu.all_programs()))
            """,
            tmp_path,
        )
    )
    monkeypatch.setenv("TF_CENTER_LOSS_XLA_HLO", "1")
    assert for_gpu == all_programs()
    for name, program in for_gpu.items():
        assert "custom-call" not in program, name
        # The table's result goes out in the buffer in which it comes in.
        table = re.search(r"input_output_alias=\{ \{\d*\}: \((\d+), \{\}, may-alias\) \}", program)
        assert re.search(rf"\[{CLASSES},{DIM}\]\S* parameter\({table[1]}\)", program), name
