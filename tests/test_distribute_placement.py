"""A table in the memory of another device: the op runs beside it, only the batch travels."""

import pytest

from child import run_python


@pytest.mark.native
def test_the_op_runs_beside_the_table(native_library, tmp_path):
    # Two logical CPU devices: the first stands for the GPU with the model, the second for the host.
    run_python(
        """
        import numpy as np
        import tensorflow as tf
        from tensorflow.python.eager import context

        cpu = tf.config.list_physical_devices("CPU")[0]
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
        import keras
        import oracle
        import tf_center_loss_op as tcl

        B, C, D = 16, 5003, 8
        inputs, label = keras.Input([D]), keras.Input([], dtype="int32")
        dense = keras.layers.Dense(D)
        embedded = dense(inputs)
        layer = tcl.CenterLoss(C, name="centers")
        with tf.device("CPU:1"):
            embedded = layer([embedded, label])
        model = keras.Model([inputs, label], keras.layers.Dense(3)(embedded))
        assert layer.centers.value.device.endswith("CPU:1")
        assert dense.kernel.value.device.endswith("CPU:0")

        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(B, D)).astype("f"), rng.integers(0, C, B).astype("i")
        @tf.function
        def step(x, y):
            with tf.device("CPU:0"):
                with tf.GradientTape() as tape:
                    model([x, y], training=True)
                    loss = tf.add_n(model.losses)
                return tape.gradient(loss, dense.kernel.value)
        step(x, y)
        context.enable_run_metadata()
        gradient = step(x, y)
        metadata = context.export_run_metadata()
        context.disable_run_metadata()

        ran = {node.timeline_label.split(" = ")[-1].split("(")[0]: stats.device
               for stats in metadata.step_stats.dev_stats for node in stats.node_stats}
        beside = [device for op, device in ran.items() if op.startswith("TclCenterLossStep")]
        assert beside and all(device.endswith("CPU:1") for device in beside), ran
        products = [device for op, device in ran.items() if op.startswith("MatMul")]
        assert products and all(device.endswith("CPU:0") for device in products), ran

        # What goes from one device to the other: no tensor is of the table's size.
        sizes = [output.tensor_description.shape.dim
                 for stats in metadata.step_stats.dev_stats for node in stats.node_stats
                 for output in node.output]
        elements = [int(np.prod([d.size for d in dims])) for dims in sizes]
        assert max(elements) < C * D, max(elements)
        assert B * D in elements
        """,
        tmp_path,
    )
