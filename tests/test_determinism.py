"""The same inputs give the same bits with any number of threads and any instruction set."""

import numpy as np
import pytest
import tensorflow as tf

import problems
import tf_center_loss_op as tcl
from child import run_program

RULES = ["paper", "mean", "sum", "batch_mean", "paper_batch_mean", "tutorial"]
DTYPES = list(problems.DTYPES)


def bits(array):
    """The bytes of an array: NaN equals NaN, and 0 differs from -0."""
    return np.ascontiguousarray(array).tobytes()


def step_bits(kernels, problem, **options):
    """Bits of loss, residual (in the features' dtype) and moved centers of the bare kernel."""
    centers = problem.centers.copy()
    loss, residual = kernels.center_loss_step(
        problem.features,
        problem.ids,
        centers,
        sample_weight=problem.sample_weight,
        ignore_class=problem.ignore_class,
        alpha=0.3,
        **options,
    )
    return bits(loss), bits(residual.astype(problem.features.dtype)), bits(centers)


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", problems.SHAPES, ids=str)
def test_threads_and_instruction_sets_do_not_change_bits(kernels, shape, dtype):
    shape = shape._replace(leading=(int(np.prod(shape.leading)),))
    problem = problems.make(shape, dtype, weights=True, ignore="outside")
    for reduction in ("mean", "none"):
        expected = step_bits(kernels, problem, reduction=reduction, threads=1, isa="baseline")
        for isa in kernels.isas():
            for threads in (1, 2, 5, 8):
                assert (
                    step_bits(kernels, problem, reduction=reduction, threads=threads, isa=isa)
                    == expected
                ), f"{isa}, {threads} threads"


@pytest.mark.native
@pytest.mark.parametrize("rule", RULES)
def test_threads_and_instruction_sets_do_not_change_bits_of_any_rule(kernels, rule):
    for shape in (s for s in problems.SHAPES if s.labels in ("equal", "mixed")):
        problem = problems.make(shape)
        expected = step_bits(kernels, problem, rule=rule, threads=1, isa="baseline")
        for isa in kernels.isas():
            assert step_bits(kernels, problem, rule=rule, threads=5, isa=isa) == expected


@pytest.mark.native
def test_instruction_sets_are_named(kernels):
    assert "baseline" in kernels.isas()
    assert set(kernels.isas()) <= {"baseline", "avx2", "avx512"}


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", problems.SHAPES, ids=str)
def test_the_op_gives_the_bits_of_the_kernel(kernels, shape, dtype):
    shape = shape._replace(leading=(int(np.prod(shape.leading)),))
    problem = problems.make(shape, dtype, weights=True, ignore="class")
    for reduction in ("mean", "sum", "none"):
        features, centers = tf.constant(problem.features), tf.Variable(problem.centers)
        with tf.GradientTape() as tape:
            tape.watch(features)
            loss = tcl.center_loss(
                features,
                problem.labels,
                centers,
                alpha=0.3,
                reduction=reduction,
                sample_weight=problem.sample_weight,
                ignore_class=problem.ignore_class,
                impl="native",
            )
        gradient = tape.gradient(loss, features)
        op = bits(loss), bits(gradient), bits(centers.numpy())
        assert op == step_bits(kernels, problem, reduction=reduction)


@pytest.mark.parametrize("shape", problems.SHAPES, ids=str)
def test_a_step_repeats_its_bits(impl, shape):
    problem = problems.make(shape, weights=True)
    seen = set()
    for _ in range(4):
        features, centers = tf.constant(problem.features), tf.Variable(problem.centers)
        with tf.GradientTape() as tape:
            tape.watch(features)
            loss = tcl.center_loss(
                features, problem.labels, centers, sample_weight=problem.sample_weight, impl=impl
            )
        seen.add((bits(loss), bits(tape.gradient(loss, features)), bits(centers.numpy())))
    assert len(seen) == 1


def test_tensorflows_threads_do_not_change_bits(implementations, tmp_path):
    digests = {
        run_program("digests_with_threads", threads, determinism, *implementations, cwd=tmp_path)
        for threads, determinism in ((1, "free"), (2, "strict"), (5, "free"))
    }
    assert len(digests) == 1
