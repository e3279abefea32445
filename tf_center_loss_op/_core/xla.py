"""What a step must know when XLA compiles the graph around it."""

from __future__ import annotations

import tensorflow as tf

from tf_center_loss_op._core import private_apis

_STEPS = ("TclCenterLossStep", "TclUpdateCenters")


def in_xla() -> bool:
    """Whether XLA will compile the graph that is being traced (``jit_compile=True``)."""
    if tf.executing_eagerly():
        return False
    return private_apis.will_compile_with_xla(tf.compat.v1.get_default_graph())


def reads_before_step(centers: tf.Variable) -> list[tf.Tensor]:
    """Tensors that depend on earlier reads of the table; a step takes them as inputs.

    The step depends on the results of earlier reads, so XLA need not copy the table: XLA orders ops
    by their data alone. For each read, the first derived tensor that is smaller than the table
    is returned. Reads are found in this graph and, for a step in a loop or a branch, in the
    graphs around it. Outside XLA the list is empty: tf.function keeps the order of a variable's
    accesses.
    """
    graph = tf.compat.v1.get_default_graph()
    if not (in_xla() and isinstance(centers, tf.Variable)):
        return []
    found = []
    # A graph of TensorFlow 1 has no program order, so no read in it comes before the step.
    while graph.building_function:
        with graph.as_default():
            # stop_gradient: a loop would keep a gradient for each of its inputs.
            found += [tf.stop_gradient(tensor) for tensor in _derived_from_reads(graph, centers)]
        if not private_apis.is_loop_or_branch(graph):
            break  # Another function may be called from several places.
        graph = private_apis.outer_graph(graph)
    return found


def _derived_from_reads(graph: tf.Graph, centers: tf.Variable) -> list[tf.Tensor]:
    handle, size = graph.capture(centers.handle), centers.shape.num_elements()
    large, small = {handle.ref()}, []
    for op in graph.get_operations():
        if large.isdisjoint(tensor.ref() for tensor in op.inputs):
            continue
        if op.type in _STEPS and op.inputs[0] is handle:
            small = []  # That step depends on them already, and this step on that one.
            continue
        for tensor in op.outputs:
            if not (tensor.dtype.is_floating or tensor.dtype.is_integer or tensor.dtype.is_bool):
                continue
            elements = tensor.shape.num_elements()
            if elements is not None and size is not None and elements >= size:
                large.add(tensor.ref())
            else:
                small.append(tensor)
    return small
