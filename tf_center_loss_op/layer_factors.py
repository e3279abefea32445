"""The factors loss_weight and alpha of the layer: numbers, variables, schedules."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from tf_center_loss_op._core import arguments, private_apis, variables

NAMES = ("loss_weight", "alpha")


def checked(name: str, value: Any) -> float | tf.Variable | LearningRateSchedule:
    """The factor as `call` uses it: a number >= 0, a scalar variable or a schedule."""
    if isinstance(value, dict):
        value = _from_config(name, value)
    if isinstance(value, LearningRateSchedule):
        return value
    # Keras would track a keras.Variable as a weight of the layer.
    value = variables.unwrap(value)
    if isinstance(value, tf.Variable):
        if not (value.dtype.is_floating and value.shape.is_compatible_with([])):
            raise ValueError(
                f"{name}: expected a scalar floating-point variable, "
                f"got {value.dtype.name} {value.shape}"
            )
        return value
    return arguments.number(name, value)


def config(value: float | tf.Variable | LearningRateSchedule) -> Any:
    """What `checked` makes the factor of again; a variable with its present value."""
    if isinstance(value, LearningRateSchedule):
        return keras.saving.serialize_keras_object(value)
    if isinstance(value, tf.Variable):
        return {
            "variable": float(value),
            "dtype": value.dtype.name,
            "name": value.name.split(":")[0],
            "trainable": value.trainable,
        }
    return value


def _from_config(name: str, value: dict[str, Any]) -> Any:
    if "variable" not in value:
        return keras.saving.deserialize_keras_object(value)
    with tf.init_scope():
        return tf.Variable(
            arguments.number(name, value["variable"]),
            dtype=value.get("dtype", "float32"),
            name=value.get("name", name),
            trainable=value.get("trainable", False),
        )


class CompiledReaders:
    """The functions that were traced with the present value of a factor, and still exist.

    A function keeps the number, variable or schedule that it was traced with, so another one would
    have no effect on it.
    """

    def __init__(self) -> None:
        self._graphs: dict[str, weakref.WeakSet[tf.Graph]] = {}  # by the name of the factor
        for name in NAMES:
            self._graphs[name] = weakref.WeakSet()

    def add_current(self, name: str) -> None:
        """Adds the functions that are being traced."""
        if tf.executing_eagerly():
            return
        graph = tf.compat.v1.get_default_graph()
        # The body of a loop or a function in a function may be forgotten before its caller is.
        while graph.building_function:
            self._graphs[name].add(graph)
            graph = private_apis.outer_graph(graph)

    def require_none(self, name: str, old: Any) -> None:
        """Raises ValueError where a compiled function would go on with the old value."""
        graphs = self._graphs[name]
        if graphs:
            gc.collect()  # A function and its graph refer to each other.
        if not graphs:
            return
        if isinstance(old, tf.Variable):
            kept, remedy = "a variable", f"assign to it, layer.{name}.assign(value)"
        else:
            number = isinstance(old, float)
            kept, start = (str(old), old) if number else (f"a {type(old).__name__}", "...")
            remedy = (
                "a variable can change between calls, "
                f"CenterLoss({name}=keras.Variable({start}, trainable=False))"
            )
        raise ValueError(
            f"{name}: expected to be set before a function is compiled that calls the layer, got "
            f"another value for compiled functions that keep {kept}: {remedy}"
        )
