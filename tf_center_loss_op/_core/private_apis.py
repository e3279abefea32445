"""Every private name of TensorFlow and Keras that the package uses, and why it is needed.

No other file of the package uses one (tests/test_private_apis.py). A name that an installed version
lacks ends with an ImportError that says which name, which version and what for.
"""

from __future__ import annotations

import collections
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import h5py
import keras
import tensorflow as tf


class PrivateName(NamedTuple):
    """A name that TensorFlow or Keras may remove without notice."""

    module: str
    name: str
    why: str
    since: str  # the oldest version that was seen to have it


NAMES: list[PrivateName] = []  # in the order in which they are imported below


def _tensorflow(path: str, why: str, since: str = "TensorFlow 2.16") -> Any:
    return _imported(f"tensorflow.python.{path}", why, since)


def _keras(path: str, why: str, since: str) -> Any:
    return _imported(f"keras.src.{path}", why, since)


def _imported(path: str, why: str, since: str) -> Any:
    module, name = path.rsplit(".", 1)
    NAMES.append(PrivateName(module, name, why, since))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(_missing(f"{module}.{name}", why, since)) from error


def _attribute(owner: object, name: str, why: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError as error:
        kind = owner if isinstance(owner, type) else type(owner)
        raise ImportError(_missing(f"{kind.__module__}.{kind.__name__}.{name}", why)) from error


def _missing(name: str, why: str, since: str = "") -> str:
    has_it = f" ({since} has it)" if since else ""
    return (
        f"tf_center_loss_op needs the private name {name} {why}. TensorFlow {tf.__version__} with "
        f"Keras {keras.__version__} lacks it{has_it}: install versions that this release names"
    )


# ------------------------------------------------------------------------------- TensorFlow

ResourceVariable = _tensorflow(
    "ops.resource_variable_ops.ResourceVariable",
    "to make a variable in the scope of a strategy, where tf.Variable makes one on every replica",
)
ShardedVariable = _tensorflow(
    "distribute.sharded_variable.ShardedVariable",
    "to recognize a variable that a partitioner has split over several servers",
)
PartitionedVariable = _tensorflow(
    "ops.variables.PartitionedVariable",
    "to say what to use in place of a variable of TensorFlow 1 that a partitioner has split",
)
is_op_determinism_enabled: Callable[[], bool] = _tensorflow(
    "framework.config.is_op_determinism_enabled",
    "to refuse float atomics under tf.config.experimental.enable_op_determinism()",
)
variable_accessed: Callable[[tf.Variable], None] = _tensorflow(
    "ops.resource_variable_ops.variable_accessed",
    "to put a variable on the gradient tape that an op reads through its handle, as tf.gather does",
)
variable_shape: Callable[[tf.Tensor], tf.Tensor] = _tensorflow(
    "ops.resource_variable_ops.variable_shape",
    "to get the shape of a variable without the op VariableShape, which has no forward mode",
)
_graph_or_parents_in_xla_context = _tensorflow(
    "ops.control_flow_util.GraphOrParentsInXlaContext",
    "to know whether XLA will compile the graph that is being traced",
)
_op_is_stateful = _tensorflow(
    "framework.auto_control_deps.op_is_stateful",
    "to know which ops tf.function runs in program order",
)
stop_recording: Callable[[], AbstractContextManager] = _tensorflow(
    "eager.record.stop_recording",
    "to keep a function without gradients off the tapes, which would trace it again",
)
_tape_set_is_stopped = _tensorflow(
    "pywrap_tfe.TFE_Py_TapeSetIsStopped",
    "to refuse a step of the centers that tf.recompute_grad would run twice",
)
Trackable = _tensorflow(
    "trackable.base.Trackable",
    "to store the shards of a table in a tf.train.Checkpoint as one tensor",
)
VARIABLE_VALUE_KEY: str = _tensorflow(
    "trackable.base.VARIABLE_VALUE_KEY",
    "to store the shards of a table under the key of a variable",
)
ResourceVariableSaveable = _tensorflow(
    "training.saving.saveable_object_util.ResourceVariableSaveable",
    "to store a shard of a table as a slice of the whole",
)
_LOOPS_AND_BRANCHES = tuple(
    _tensorflow(
        f"ops.control_flow_v2_func_graphs.{name}", "to find the graph around a loop or branch"
    )
    for name in ("WhileBodyFuncGraph", "WhileCondFuncGraph", "CondBranchFuncGraph")
)
_forward_mode_rules: dict[str, Callable] = _tensorflow(
    "eager.forwardprop._SPECIAL_CASES",
    "to differentiate in forward mode an op that takes the handle of a variable",
)
_pack_tangents = _tensorflow(
    "eager.forwardprop_util.pack_tangents",
    "to know whether a forward accumulator differentiates a call",
)
# The attribute that tf.function gives to an op that `run_independently` was called for.
_INDEPENDENT = "_independent_side_effects"


def in_forward_mode(tensors: list[tf.Tensor]) -> bool:
    """Whether a `tf.autodiff.ForwardAccumulator` has a tangent of one of these tensors."""
    return bool(_pack_tangents(tensors).tangents)


def register_forward_mode(
    op_name: str, rule: Callable[[tuple, list, list, list], list[tf.Tensor | None]]
) -> None:
    """Sets rule(attributes, inputs, outputs, tangents of inputs) -> tangents of outputs."""
    _forward_mode_rules[op_name] = rule


def will_compile_with_xla(graph: tf.Graph) -> bool:
    """Whether XLA will compile the graph (``jit_compile=True``)."""
    return _graph_or_parents_in_xla_context(graph)


def is_loop_or_branch(graph: tf.Graph) -> bool:
    """Whether the graph is the body of a loop or a branch of the graph around it."""
    return isinstance(graph, _LOOPS_AND_BRANCHES)


def outer_graph(graph: tf.Graph) -> tf.Graph:
    """The graph around a loop or branch."""
    return _attribute(graph, "outer_graph", "to find the graph around a loop or branch")


def inside_recompute_grad() -> bool:
    """Whether tf.recompute_grad runs the code now: nothing else stops every tape."""
    return _tape_set_is_stopped()


def runs_in_program_order(op: tf.Operation) -> bool:
    """Whether tf.function runs the op in program order.

    It does so for stateful ops without a resource: an Assert, a print, a py_function. It orders an
    op with a resource only among the ops with that resource.
    """
    if not _op_is_stateful(op) or any(tensor.dtype == tf.resource for tensor in op.inputs):
        return False
    try:
        return not op.get_attr(_INDEPENDENT)
    except ValueError:
        return True  # The attribute has not been set.


def run_out_of_program_order(graph: tf.Graph, ops: list[tf.Operation]) -> None:
    """Takes those of these ops that tf.function runs in program order out of that order."""
    manager = _attribute(
        graph,
        "experimental_acd_manager",
        "to let the replicas of one process exchange their batches without waiting for each other",
    )
    if manager is None:
        return  # A graph of TensorFlow 1 has no program order.
    for op in ops:
        if runs_in_program_order(op):
            manager.run_independently(op)


def running_replica() -> int:
    """The index of the running replica among those of its process."""
    context = tf.distribute.get_replica_context()
    if context is None:
        return 0
    return _attribute(
        context, "_replica_id", "to find the copy of a variable that belongs to a replica"
    )


class CollectiveLauncher:
    """What TensorFlow's own strategies pass to a collective op of one replica."""

    _WHY = "to run collective ops as the strategies of TensorFlow do"

    def __init__(self, launcher: object):
        def get(name: str) -> Any:
            return _attribute(launcher, name, self._WHY)

        self.device: str = get("_device")
        self.group_size: tf.Tensor = get("_group_size")
        self.group_key: tf.Tensor = get("_group_key")
        self.new_ordering_token: Callable[[], tf.Tensor] = get("_get_ordering_token")
        options = get("_options")
        self.communication_hint: str = options.implementation.value
        self.timeout_seconds: float = options.timeout_seconds or 0


def collective_launchers(strategy: tf.distribute.Strategy) -> list | None:
    """The launchers of this process's replicas; None where the strategy uses no collective ops."""
    extended = strategy.extended
    ops = getattr(extended, "_collective_ops", None)
    if ops is None:
        ops = _attribute(extended, "_cross_device_ops", CollectiveLauncher._WHY)
    return getattr(ops, "_launchers", None)


# ------------------------------------------------------------------------------------ Keras

in_stateless_scope: Callable[[], bool] = _keras(
    "backend.common.stateless_scope.in_stateless_scope",
    "to know that variables have no buffers now, because Keras asks for shapes only",
    "Keras 3.5",
)
in_symbolic_scope: Callable[[], bool] = _keras(
    "backend.common.symbolic_scope.in_symbolic_scope",
    "to know that Keras builds a model on placeholders, which are all of type float",
    "Keras 3.5",
)
KerasSaveable = _keras(
    "saving.keras_saveable.KerasSaveable",
    "to store a sharded table in the weights file of a model",
    "Keras 3.5",
)
get_keras_mask = _keras(
    "backend.get_keras_mask",
    "to leave masked values out of the loss of the global batch",
    "Keras 3.6",
)
reduce_weighted_values = _keras(
    "losses.loss.reduce_weighted_values",
    "to apply masks and sample weights to a loss as Keras does",
    "Keras 3.5",
)
LossFunctionWrapper = _keras(
    "losses.losses.LossFunctionWrapper",
    "to make a loss of a function as Model.compile does",
    "Keras 3.5",
)
get_object_name = _keras(
    "utils.naming.get_object_name",
    "to name the loss of a function as Keras does",
    "Keras 3.5",
)


def on_placeholders() -> bool:
    """Whether Keras calls a subclassed model on placeholders, of whose types it knows nothing.

    It does so to build a loaded model, and for the signature "serving_default" that
    tf.saved_model.save asks for (`_default_save_signature` of a model).
    """
    if in_symbolic_scope():
        return True
    graph = tf.compat.v1.get_default_graph()
    return graph.building_function and graph.name == "serving_default"


class LossesByReplica:
    """Mixin of a layer that keeps the losses of `add_loss` apart for the replicas of a process.

    Keras has one list, `_losses`, for all. Where another layer suspends a replica in the forward
    pass (``BatchNormalization(synchronized=True)``), the next replica would clear that list, or
    find the other's losses in it.
    """

    @property
    def _losses(self) -> list[Any]:
        return self._losses_of[running_replica()]

    @_losses.setter
    def _losses(self, losses: list[Any]) -> None:
        # Through __dict__, because a Keras layer would track lists in an attribute.
        self.__dict__["_losses_of"] = collections.defaultdict(list, {running_replica(): losses})

    def forget_losses_of_functions(self) -> None:
        """Forgets losses that calls inside a tf.function added: they keep its graph alive."""
        for losses in self._losses_of.values():
            losses[:] = [loss for loss in losses if not tf.is_symbolic_tensor(loss)]


class SavedState:
    """Mixin of a layer: what its calls use beside its weights goes into a SavedModel.

    TensorFlow refuses to save a function that uses a variable of no saved object. A checkpoint
    holds none of these.
    """

    def state_for_saved_model(self) -> dict[str, Any]:
        """Variables by name."""
        raise NotImplementedError

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> dict[str, Any]:
        """Called by tf.saved_model.save and tf.train.Checkpoint."""
        children = super()._trackable_children(save_type, **kwargs)
        if save_type == "savedmodel":
            # The parts of a sharded table are variables like others there.
            whole = {k: v for k, v in children.items() if not isinstance(v, StoredInShards)}
            return whole | self.state_for_saved_model()
        return children


class WeightOnVariable(keras.Variable):
    """A keras.Variable around a variable that exists, of any device.

    Keras makes a variable of its own, which under a strategy has a copy on each replica.
    """

    def __init__(self, variable: tf.Variable, name: str):
        self._given = variable
        super().__init__(
            "zeros", variable.shape, variable.dtype.name, trainable=False, autocast=False, name=name
        )

    def _initialize_with_initializer(self, initializer: object) -> None:
        """Called by Keras to make the variable."""
        self._initialize(self._given)


class StoredInShards(Trackable, KerasSaveable):
    """Base of a table whose shards a checkpoint stores as slices of one tensor."""

    def checkpoint_slices(self, name: str) -> list[Any]:
        """A saveable for each shard."""
        raise NotImplementedError

    def _gather_saveables_for_checkpoint(self) -> dict[str, Callable[..., list[Any]]]:
        """Called by tf.train.Checkpoint."""
        return {VARIABLE_VALUE_KEY: lambda name="centers": self.checkpoint_slices(name)}

    def _obj_type(self) -> str:
        """Called by Keras, which must not look for layers in it. A "Loss" is a kind without any."""
        return "Loss"


def variable_of(variable: keras.Variable) -> tf.Variable | None:
    """The tf.Variable inside a keras.Variable, None if it has not been made yet.

    The public `value` is a 16-bit copy of the whole table under an autocasting policy.
    """
    return _attribute(variable, "_value", "to get a variable without a copy of it")


def layers_of(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """All layers of a model, also those inside other layers."""
    flatten = _attribute(model, "_flatten_layers", "to find CenterLoss layers inside other layers")
    return list(flatten(include_self=False))


def build_on_batch(model: keras.Model, batch: object) -> None:
    """Makes the variables of model and metrics that depend on the shapes of a batch."""
    build = _attribute(
        model, "_symbolic_build", "to make the metrics of a resumed epoch before its first step"
    )
    build(data_batch=batch)


def start_at_epoch(model: keras.Model, epoch: int) -> None:
    """Lets `fit` begin with this epoch, as `keras.callbacks.BackupAndRestore` does."""
    _attribute(model, "_initial_epoch", "to resume fit at an epoch")
    model._initial_epoch = epoch


def h5_entry_group(store: object) -> h5py.Group | None:
    """The HDF5 group behind a store of Keras's, None for other stores and before Keras 3.10."""
    return getattr(store, "_h5_entry_group", None)


def check_before_loading(layer: keras.layers.Layer, store: object) -> None:
    """Keras's own check of a layer whose weights are about to be loaded, since Keras 3.12."""
    check = getattr(layer, "_check_load_own_variables", None)
    if check is not None:
        check(store)
