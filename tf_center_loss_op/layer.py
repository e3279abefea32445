"""The Keras layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule

from tf_center_loss_op import layer_factors, layer_inputs
from tf_center_loss_op._core import arguments, native, private_apis, variables
from tf_center_loss_op._core.keras_backend import require_keras_on_tensorflow
from tf_center_loss_op.distribute.exchange import loss_for_keras
from tf_center_loss_op.distribute.sharded import ShardedCenters
from tf_center_loss_op.distribute.strategies import require_supported_strategy
from tf_center_loss_op.functional import loss_and_squared_distance, update_centers
from tf_center_loss_op.layer_deferred import Batch, DeferredBatches
from tf_center_loss_op.tables import h5
from tf_center_loss_op.tables.memory import in_place


@keras.saving.register_keras_serializable(package="tf_center_loss_op")
class CenterLoss(private_apis.LossesByReplica, private_apis.SavedState, keras.layers.Layer):
    """Adds ``loss_weight`` times the center loss of its inputs; returns the features unchanged.

    Equals, in ``call``:

        self.add_loss(loss_weight * tcl.center_loss(features, labels, self.centers, ...))
        return features

    The centers move in training only, once for each forward pass; evaluation, prediction and a
    frozen layer (``trainable=False`` on it or on a model around it) leave them as they are. They
    are a non-trainable weight: no optimizer touches them, and they are saved and restored with
    the model. The progress bar shows the mean distance of the samples to
    the centers of their classes beside the loss, as ``<layer's name>_distance``.

    Args:
      num_classes: C, the number of classes, an int (also of NumPy).
      loss_weight: lambda, the factor of the loss (equation 5 of the paper), >= 0: a number, a
        scalar variable, or a schedule from `keras.optimizers.schedules` over the training calls of
        this layer (a warm-up, for example).
      alpha: step size of the centers, >= 0: likewise.
      rule: the rule of the step, see `center_loss`.
      reduction: ``"mean"`` (default) or ``"sum"`` over the batch, or ``"none"``.
      centers_initializer: a Keras initializer, or its name, for the centers ``[C, D]``. Zeros and
        `tables.RandomNormal` are made in place, without a second copy of a large table.
      ignore_class: samples with this label have loss 0 and move nothing.
      impl: ``"auto"``, ``"native"`` or ``"graph"``, see `center_loss`.
      deferred_update: False: the centers move in each training call. True: they move when
        `apply_deferred_update` is called, once for all training calls since; for gradient
        accumulation, gradient checkpointing and steps after the optimizer's
        (`training.UpdateCentersAfterStep`).
      distance_metric: whether to track the mean distance, which the op returns beside the loss.
      sharded: whether the rows of the table are split over the replicas of a strategy
        (`distribute.ShardedCenters`); otherwise every replica has a copy of it. The parts that this
        process holds are in ``layer.weights``.
      **layer_kwargs: ``name``, ``dtype`` and the like, of `keras.layers.Layer`.

    Call arguments:
      features: float ``[..., D]``; or all inputs, ``[features, labels]``,
        ``[features, labels, sample_weight]`` or a dict with these names.
      labels: class ids int32 or int64 ``[...]``, or one-hot rows ``[..., C]``. Prediction without
        labels needs a model that ends at the features.
      sample_weight: numbers in the labels' shape.
      training: whether the centers move.
      mask: bool ``[...]``, False for samples to leave out: they have loss 0, count nowhere and move
        nothing. By default Keras's mask of the features, ``Embedding(mask_zero=True)`` for example,
        which also passes on to the next layer.

    Attributes:
      centers: float32 ``[C, D]``; `ShardedCenters` with ``sharded=True``.
      loss_weight, alpha: may be set as long as no compiled function has read them. Such a function
        would keep its number, so setting another one is an error then; make the layer with
        ``alpha=keras.Variable(0.5, trainable=False)`` and assign to ``layer.alpha``. A variable is
        saved with the model and its weights, but is no weight of the layer.
      distance: the `keras.metrics.Mean` of the distances, or None. Samples that are ignored or
        not finite are left out.

    Raises:
      TypeError, ValueError: as `center_loss`, at construction or in the call; of a functional
        model when it is built.
      RuntimeError: at construction, where Keras runs on another backend than TensorFlow or
        ``TF_USE_LEGACY_KERAS=1`` is set.

    Determinism: as `center_loss`.

    >>> import keras
    >>> import tf_center_loss_op as tcl
    >>> image = keras.Input([64])
    >>> label = keras.Input([], dtype="int32")
    >>> embedding = keras.layers.Dense(8)(image)
    >>> embedding = tcl.CenterLoss(10, loss_weight=0.01)(embedding, label)
    >>> model = keras.Model([image, label], keras.layers.Dense(10)(embedding))

    Source: Wen et al., ECCV 2016, equations 2 to 5.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        loss_weight: float | tf.Variable | keras.Variable | LearningRateSchedule = 1.0,
        alpha: float | tf.Variable | keras.Variable | LearningRateSchedule = 0.5,
        rule: str = "paper",
        reduction: str = "mean",
        centers_initializer: str | keras.initializers.Initializer = "zeros",
        ignore_class: int | None = None,
        impl: str = "auto",
        deferred_update: bool = False,
        distance_metric: bool = True,
        sharded: bool = False,
        **layer_kwargs: object,
    ):
        require_keras_on_tensorflow("CenterLoss")
        # No autocast: the features pass unchanged, and sample weights keep their precision.
        super().__init__(autocast=False, **layer_kwargs)
        require_supported_strategy()
        arguments.one_of("rule", rule, arguments.RULES)
        arguments.one_of("reduction", reduction, arguments.REDUCTIONS)
        arguments.one_of("impl", impl, arguments.IMPLEMENTATIONS)
        for name, flag in (
            ("deferred_update", deferred_update),
            ("distance_metric", distance_metric),
            ("sharded", sharded),
        ):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: expected True or False, got {flag!r}")
        self._compiled = layer_factors.CompiledReaders()
        self.num_classes = arguments.positive("num_classes", num_classes)
        self.loss_weight = loss_weight
        self.alpha = alpha
        self.rule = rule
        self.reduction = reduction
        self.centers_initializer = keras.initializers.get(centers_initializer)
        self.ignore_class = arguments.class_to_ignore(ignore_class)
        self.impl = impl
        self.deferred_update = deferred_update
        self.sharded = sharded
        self.distance = keras.metrics.Mean(f"{self.name}_distance") if distance_metric else None
        self.steps = None
        self.supports_jit = native.supports_jit()
        self._deferred = DeferredBatches()

    def __setattr__(self, name: str, value: Any) -> None:
        """Checks loss_weight and alpha whenever they are set."""
        if name in layer_factors.NAMES:
            value = layer_factors.checked(name, value)
            old = getattr(self, name, None)
            if old is value or (type(old) is type(value) is float and old == value):
                return
            if isinstance(value, LearningRateSchedule) and self.built and self.steps is None:
                raise ValueError(
                    f"{name}: expected a number or variable in a layer that was built without a "
                    f"schedule and does not count its steps, got {type(value).__name__}"
                )
            if old is not None and tf.executing_eagerly():
                self.forget_losses_of_functions()
            self._compiled.require_none(name, old)
        super().__setattr__(name, value)

    def build(
        self, features_shape: Any, labels_shape: Any = None, sample_weight_shape: Any = None
    ) -> None:
        """Creates the centers."""
        features_shape = layer_inputs.features_shape_of(features_shape)
        if not features_shape or features_shape[-1] is None:
            raise ValueError(
                f"features: expected shape [..., D] with D known, got {tuple(features_shape)}"
            )
        if self.sharded:
            self.centers = ShardedCenters(
                self.num_classes, features_shape[-1], initializer=self.centers_initializer
            )
        else:
            # Without autocast=False every access would copy the table under a 16-bit policy.
            self.centers = self.add_weight(
                name="centers",
                shape=(self.num_classes, features_shape[-1]),
                initializer=in_place(self.centers_initializer),
                dtype="float32",
                trainable=False,
                autocast=False,
            )
        if any(
            isinstance(factor, LearningRateSchedule) for factor in (self.loss_weight, self.alpha)
        ):
            self.steps = self.add_weight(
                name="steps", shape=(), initializer="zeros", dtype="int64", trainable=False
            )

    def call(
        self,
        features: Any,
        labels: Any = None,
        sample_weight: Any = None,
        training: Any = None,
        mask: Any = None,
    ) -> Any:
        """Adds the loss and returns the features."""
        inputs = layer_inputs.inputs_of(features, labels, sample_weight)
        layer_inputs.require_labels(inputs)
        mask = layer_inputs.mask_of(inputs, mask)
        if private_apis.on_placeholders():
            inputs = layer_inputs.with_placeholders(inputs)
        # As in BatchNormalization, a frozen layer keeps its weights in training, too.
        moves = bool(training) and self.trainable
        self.add_loss(self._loss(inputs, mask, moves))
        return inputs.features

    def compute_mask(self, features: Any, previous_mask: Any) -> Any:
        """The mask of the features, which pass unchanged."""
        return layer_inputs.features_mask_of(previous_mask)

    def apply_deferred_update(self) -> None:
        """Moves the centers once, by all training calls since the last time.

        The batches of several calls count as one: n_j and N are over all of them. Call it where the
        training calls were made: in the same `tf.function`, or in eager mode.

        Raises:
          RuntimeError: the layer has ``deferred_update=False``, or no training call came before.
        """
        if not self.deferred_update:
            raise RuntimeError(
                "apply_deferred_update: expected a layer with deferred_update=True, got "
                "deferred_update=False: its centers moved in the forward pass already"
            )
        if not self.trainable:
            self._deferred.forget()  # The layer was frozen after training calls.
            return
        batches = self._deferred.take()
        features, labels, ignored = zip(*batches, strict=True)
        self._compiled.add_current("alpha")
        update_centers(
            tf.concat(layer_inputs.of_one_type(features, tf.float32), axis=0),
            tf.concat(layer_inputs.of_one_type(labels, tf.int64), axis=0),
            self.centers,
            alpha=self.factor_now(self.alpha),
            rule=self.rule,
            ignore_class=next((label for label in ignored if label is not None), None),
            impl=self.impl,
        )

    def rematerialized_call(
        self, layer_call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Callable[..., Any]:
        """The call itself, also in a `keras.RematScope`: running it twice would save no memory."""
        return layer_call

    def compute_output_spec(
        self,
        features: Any,
        labels: Any = None,
        sample_weight: Any = None,
        training: Any = None,
        mask: Any = None,
    ) -> keras.KerasTensor:
        """The shape and type of the features; raises for inputs that `call` would refuse."""
        inputs = layer_inputs.inputs_of(features, labels, sample_weight)
        layer_inputs.require_labels(inputs)
        layer_inputs.check_symbolic(inputs, self.num_classes, self.centers.shape[1])
        return keras.KerasTensor(inputs.features.shape, dtype=inputs.features.dtype)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().get_config() | {
            "num_classes": self.num_classes,
            "loss_weight": layer_factors.config(self.loss_weight),
            "alpha": layer_factors.config(self.alpha),
            "rule": self.rule,
            "reduction": self.reduction,
            "centers_initializer": keras.initializers.serialize(self.centers_initializer),
            "ignore_class": self.ignore_class,
            "impl": self.impl,
            "deferred_update": self.deferred_update,
            "distance_metric": self.distance is not None,
            "sharded": self.sharded,
        }

    @property
    def variables(self) -> list[keras.Variable]:
        """As of any layer, with this process's parts of a sharded table."""
        return [*super().variables, *self._parts()]

    @property
    def weights(self) -> list[keras.Variable]:
        """As of any layer, with this process's parts of a sharded table."""
        return [*super().weights, *self._parts()]

    def factor_variables(self) -> dict[str, tf.Variable]:
        """Those of loss_weight and alpha that are variables, by name. They are no weights."""
        factors = {name: getattr(self, name) for name in layer_factors.NAMES}
        return {name: f for name, f in factors.items() if isinstance(f, tf.Variable)}

    def save_own_variables(self, store: Any) -> None:
        """Writes the centers block by block, where the store is one HDF5 file."""
        group = h5.h5_group(store)
        if group is None or not self.built or self.sharded:
            super().save_own_variables(store)
        else:
            h5.write_h5(group, "0", self.centers)
            if self.steps is not None:
                store["1"] = self.steps
        for name, variable in self.factor_variables().items():
            store[name] = tf.convert_to_tensor(variable).numpy()

    def load_own_variables(self, store: Any) -> None:
        """Reads the centers block by block, where the store is one HDF5 file.

        Raises:
          ValueError: the file holds a table of another shape, another number of classes or another
            type. The centers are unchanged.
        """
        group = h5.h5_group(store)
        names = [name for name in store.keys() if name not in layer_factors.NAMES]
        if group is None or not self.built or self.sharded:
            super().load_own_variables({name: store[name] for name in names})
        else:
            private_apis.check_before_loading(self, dict.fromkeys(names))
            h5.read_h5(group, "0", self.centers)
            if self.steps is not None:
                self.steps.assign(store["1"])
        for name, variable in self.factor_variables().items():
            if name in store.keys():
                variable.assign(np.asarray(store[name]))

    def state_for_saved_model(self) -> dict[str, Any]:
        """The variables that the call uses beside the weights."""
        metric = self.distance.variables if self.distance is not None else []
        named = {f"distance_{k}": variable for k, variable in enumerate(metric)}
        return named | {f"centers_{k}": part for k, part in enumerate(self._parts())}

    def _parts(self) -> list[keras.Variable]:
        return self.centers.weights if self.sharded and self.built else []

    def _loss(self, inputs: layer_inputs.Inputs, mask: Any, training: bool) -> tf.Tensor:
        moves_now = training and not self.deferred_update
        self._compiled.add_current("loss_weight")
        if moves_now:
            self._compiled.add_current("alpha")
        result = loss_and_squared_distance(
            layer_inputs.as_float32(inputs.features),
            inputs.labels,
            self.centers,
            loss_weight=self.factor_now(self.loss_weight),
            alpha=self.factor_now(self.alpha),
            rule=self.rule,
            reduction=self.reduction,
            sample_weight=inputs.sample_weight,
            ignore_class=self.ignore_class,
            update_centers=moves_now,
            impl=self.impl,
            mask=mask,
        )
        if training and self.deferred_update:
            arguments.require_no_recomputation()
            features = tf.stop_gradient(result.features)
            self._deferred.add(self.name, Batch(features, result.labels, result.ignore_class))
        if training and self.steps is not None:
            variables.own_copy(self.steps).assign_add(1)
        if self.distance is not None:
            squared = result.squared_distance
            counts = tf.math.is_finite(squared)
            if result.ignore_class is not None:
                counts &= tf.not_equal(tf.cast(result.labels, tf.int64), result.ignore_class)
            self.distance.update_state(tf.sqrt(tf.where(counts, squared, 0)), counts)
        loss = loss_for_keras(result.loss)
        # Keras adds it to losses of the type floatx.
        return tf.cast(loss, tf.float64) if keras.config.floatx() == "float64" else loss

    def factor_now(self, factor: Any) -> Any:
        """The value of loss_weight or alpha at this step."""
        return factor(self.steps) if isinstance(factor, LearningRateSchedule) else factor
