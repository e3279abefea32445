"""The Keras layer."""

from __future__ import annotations

import collections

import keras
import tensorflow as tf
from keras.optimizers.schedules import LearningRateSchedule
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from tf_center_loss_op import _arguments, _native, distribute, tables
from tf_center_loss_op.functional import loss_and_squared_distance, update_centers

UPDATES = ("forward", "manual")

# Training calls in eager mode that a layer with deferred_update=True keeps for its update_centers().
MOST_PENDING = 1024


@keras.saving.register_keras_serializable(package="tf_center_loss_op")
class CenterLoss(keras.layers.Layer):
    """Adds ``loss_weight`` times the center loss of its inputs; passes the features on unchanged.

    Equals, in ``call``:

        self.add_loss(loss_weight * tcl.center_loss(features, labels, self.centers, ...))
        return features

    The centers move in training only, once for each forward pass; evaluation and prediction leave
    them as they are. They are a non-trainable loss_weight: no optimizer touches them, and they are
    saved and restored with the model. The progress bar shows the mean distance of the samples to
    the centers of their classes beside the loss, as ``<layer's name>_distance``.

    Args:
      num_classes: C, the number of classes.
      loss_weight: lambda, the factor of the loss (equation 5 of the paper), >= 0: a number, a scalar
        variable, or a schedule from `keras.optimizers.schedules` over the training calls of this
        layer (a warm-up, for example).
      alpha: step size of the centers, >= 0: likewise.
      rule: the rule of the step, see `center_loss`.
      reduction: ``"mean"`` (default) or ``"sum"`` over the batch, or ``"none"``.
      centers_initializer: a Keras initializer, or its name, for the centers ``[C, D]``. Zeros and
        `RandomCenters` are made in place, without a second copy of a large table.
      ignore_class: samples with this label are left out.
      impl: ``"auto"``, ``"native"`` or ``"graph"``, see `center_loss`.
      update: when the centers move. ``"forward"``: in each training call. ``"manual"``: when
        `update_centers` is called, once for all training calls since; for gradient accumulation,
        gradient checkpointing and steps after the optimizer's (`UpdateCentersAfterStep`).
      distance_metric: whether to track the mean distance; the op computes it on its way.
      sharded: whether the table is split over the replicas of a strategy (`ShardedCenters`) instead
        of every replica having all of it.
      **layer_kwargs: ``name``, ``dtype`` and the like, of `keras.layers.Layer`.

    Call arguments:
      features: float ``[..., D]``; or the pair ``[features, labels]``.
      labels: class ids int32 or int64 ``[...]``, or one-hot rows ``[..., C]``. To predict without
        labels, make a model that ends at the features.
      sample_weight: numbers in the labels' shape.
      training: whether the centers move.

    Attributes:
      centers: float32 ``[C, D]``; `ShardedCenters` with ``sharded=True``.
      loss_weight, alpha: may be set between calls; a compiled function keeps a number it was traced
        with, but reads a variable anew.
      distance: the `keras.metrics.Mean` of the distances, or None. Samples that are ignored or
        not finite are left out.

    Raises:
      TypeError, ValueError: as `center_loss`, at construction or in the call.

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
        update: str = "forward",
        distance_metric: bool = True,
        sharded: bool = False,
        **layer_kwargs: object,
    ):
        # No autocast: the features pass unchanged, and sample weights keep their precision.
        super().__init__(autocast=False, **layer_kwargs)
        distribute.require_supported_strategy()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes: expected an int >= 1, got {num_classes!r}")
        _arguments.one_of("rule", rule, _arguments.RULES)
        _arguments.one_of("reduction", reduction, _arguments.REDUCTIONS)
        _arguments.one_of("impl", impl, _arguments.IMPLEMENTATIONS)
        _arguments.one_of("update", update, UPDATES)
        if not isinstance(distance_metric, bool):
            raise TypeError(f"distance_metric: expected True or False, got {distance_metric!r}")
        if not isinstance(sharded, bool):
            raise TypeError(f"sharded: expected True or False, got {sharded!r}")
        self.num_classes = num_classes
        self.loss_weight = loss_weight
        self.alpha = alpha
        self.rule = rule
        self.reduction = reduction
        self.centers_initializer = keras.initializers.get(centers_initializer)
        self.ignore_class = ignore_class
        self.impl = impl
        self.update = update
        self.sharded = sharded
        self.distance = keras.metrics.Mean(f"{self.name}_distance") if distance_metric else None
        self.steps = None
        self.supports_jit = _native.supports_jit()
        self._pending = _Pending()

    def __setattr__(self, name, value):
        """Checks loss_weight and alpha whenever they are set."""
        if name in ("loss_weight", "alpha"):
            value = _factor(name, value)
            if isinstance(value, LearningRateSchedule) and self.built and self.steps is None:
                raise ValueError(
                    f"{name}: expected a number or variable in a layer that was built without a "
                    f"schedule and does not count its steps, got {type(value).__name__}"
                )
        super().__setattr__(name, value)

    def build(self, features_shape, labels_shape=None, sample_weight_shape=None):
        """Creates the centers."""
        if features_shape and isinstance(features_shape[0], (tuple, list)):
            features_shape = features_shape[0]
        if not features_shape or features_shape[-1] is None:
            raise ValueError(
                f"features: expected shape [..., D] with D known, got {tuple(features_shape)}"
            )
        if self.sharded:
            self.centers = distribute.ShardedCenters(
                self.num_classes, features_shape[-1], initializer=self.centers_initializer
            )
        else:
            # autocast=False also here: under a 16-bit policy every access would copy the table.
            self.centers = self.add_weight(
                name="centers",
                shape=(self.num_classes, features_shape[-1]),
                initializer=tables.in_place(self.centers_initializer),
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

    def call(self, features, labels=None, sample_weight=None, training=None):
        """Adds the loss and returns the features."""
        if isinstance(features, (tuple, list)):
            features, labels = features
        if labels is None:
            raise ValueError(
                "labels: expected layer(features, labels) or layer([features, labels]), got None; "
                "to predict without labels, make a model that ends at the features"
            )
        if in_symbolic_scope():
            # Keras builds a subclassed model that it loads by calling it on shapes, all of floats.
            labels = tf.convert_to_tensor(labels)
            labels = tf.cast(labels, tf.int32) if labels.dtype.is_floating else labels
        self.add_loss(self._loss(features, labels, sample_weight, bool(training)))
        return features

    def update_centers(self):
        """Moves the centers, once, by the training calls since the last time (deferred_update=True).

        The batches of several calls count as one: n_j and N are over all of them. Call it where
        those calls were made: in the same `tf.function`, or in eager mode.

        Raises:
          RuntimeError: the layer updates in its forward pass, or no training call came before.
        """
        if self.update != "manual":
            raise RuntimeError(
                "update_centers: expected a layer with deferred_update=True, got "
                f"update={self.update!r}, whose centers moved in the forward pass already"
            )
        batches = self._pending.take()
        if not batches:
            raise RuntimeError(
                "update_centers: expected a training call of the layer before it, in the same "
                "tf.function or in eager mode, got none"
            )
        features, labels = (tf.concat(parts, axis=0) for parts in zip(*batches, strict=True))
        update_centers(
            features,
            labels,
            self.centers,
            alpha=self._now(self.alpha),
            rule=self.rule,
            ignore_class=self.ignore_class,
            impl=self.impl,
        )

    @property
    def _losses(self):
        """What `add_loss` has added on this replica.

        Keras has one list for all. Where another layer suspends a replica in the forward pass
        (``BatchNormalization(synchronized=True)``), the next would clear it, or find in it what is
        not its own.
        """
        return self._losses_of[distribute.replica()]

    @_losses.setter
    def _losses(self, losses):
        self.__dict__["_losses_of"] = collections.defaultdict(list, {distribute.replica(): losses})

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """As it is, in a `keras.RematScope` too: there is nothing to save by running it twice."""
        return layer_call

    def compute_output_spec(self, features, labels=None, sample_weight=None, training=None):
        """The features' own shape and type."""
        features = features[0] if isinstance(features, (tuple, list)) else features
        return keras.KerasTensor(features.shape, dtype=features.dtype)

    def get_config(self):
        """The constructor's arguments."""
        return super().get_config() | {
            "num_classes": self.num_classes,
            "loss_weight": _factor_config(self.loss_weight),
            "alpha": _factor_config(self.alpha),
            "rule": self.rule,
            "reduction": self.reduction,
            "centers_initializer": keras.initializers.serialize(self.centers_initializer),
            "ignore_class": self.ignore_class,
            "impl": self.impl,
            "update": self.update,
            "distance_metric": self.distance is not None,
            "sharded": self.sharded,
        }

    def save_own_variables(self, store):
        """Writes the centers block by block, where the store is one HDF5 file."""
        group = tables.h5_group(store)
        if group is None or not self.built or self.sharded:
            super().save_own_variables(store)
            return
        tables.write_h5(group, "0", self.centers)
        if self.steps is not None:
            store["1"] = self.steps

    def load_own_variables(self, store):
        """Reads the centers block by block, where the store is one HDF5 file.

        Raises:
          ValueError: the file holds a table of another shape, another number of classes or another
            type. The centers are unchanged.
        """
        group = tables.h5_group(store)
        if group is None or not self.built or self.sharded:
            super().load_own_variables(store)
            return
        self._check_load_own_variables(store)
        tables.read_h5(group, "0", self.centers)
        if self.steps is not None:
            self.steps.assign(store["1"])

    def _loss(self, features, labels, sample_weight, training):
        features = tf.convert_to_tensor(features)
        # The centers of a layer are float32 whatever the features are.
        if features.dtype == tf.float64:
            features = tf.cast(features, tf.float32)
        result = loss_and_squared_distance(
            features,
            labels,
            self.centers,
            loss_weight=self._now(self.loss_weight),
            alpha=self._now(self.alpha),
            rule=self.rule,
            reduction=self.reduction,
            sample_weight=sample_weight,
            ignore_class=self.ignore_class,
            update_centers=training and self.update == "forward",
            impl=self.impl,
        )
        if training and self.update == "manual":
            _arguments.require_no_recomputation()
            self._pending.add(tf.stop_gradient(result.features), result.labels)
        if training and self.steps is not None:
            distribute.own_copy(self.steps).assign_add(1)
        if self.distance is not None:
            squared = result.squared_distance
            counts = tf.math.is_finite(squared)
            if self.ignore_class is not None:
                counts &= tf.not_equal(result.labels, self.ignore_class)
            self.distance.update_state(tf.sqrt(tf.where(counts, squared, 0)), counts)
        loss = distribute.loss_for_keras(result.loss)
        # Keras adds it to losses of this type.
        return tf.cast(loss, tf.float64) if keras.config.floatx() == "float64" else loss

    def _now(self, factor):
        """The factor's number at this step."""
        return factor(self.steps) if isinstance(factor, LearningRateSchedule) else factor


class UpdateCentersAfterStep:
    """Mixin for a `keras.Model`: its centers move after each step of the optimizer.

    Equals, for each `CenterLoss` layer with ``deferred_update=True`` in the model:

        logs = super().train_step(data)
        layer.apply_deferred_update()

    The residuals are those of the forward pass, x_i - c_{y_i}: no sample is embedded anew.

    >>> import keras
    >>> import tf_center_loss_op as tcl
    >>> class Model(tcl.training.UpdateCentersAfterStep, keras.Model):
    ...     pass
    """

    def train_step(self, *args, **kwargs):
        """The model's own step, then the centers'."""
        logs = super().train_step(*args, **kwargs)
        for layer in self._flatten_layers(include_self=False):
            if isinstance(layer, CenterLoss) and layer.update == "manual":
                layer.apply_deferred_update()
        return logs


class _Pending:
    """The training calls of each replica whose centers have not moved yet.

    A class, because Keras would track a list as part of the layer's state.
    """

    def __init__(self):
        self._batches_of = {}  # by replica: they are traced in turns

    def add(self, features, labels):
        batches = self._batches()
        if len(batches) >= MOST_PENDING:
            raise RuntimeError(
                f"update: expected update_centers() at least once in {MOST_PENDING} training "
                "calls of a layer with deferred_update=True, got none"
            )
        batches.append((features, labels))

    def take(self):
        taken = self._batches()
        self._batches_of[distribute.replica()] = []
        return taken

    def _batches(self):
        # Others are left over from a trace that never called update_centers().
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        k = distribute.replica()
        batches = self._batches_of.get(k, [])
        self._batches_of[k] = [b for b in batches if getattr(b[0], "graph", None) is graph]
        return self._batches_of[k]


def _factor(name, value):
    """A number, scalar variable or schedule >= 0, as it is used in `call`."""
    if isinstance(value, dict):
        value = keras.saving.deserialize_keras_object(value)
    if isinstance(value, LearningRateSchedule):
        return value
    # Unwrapped, or Keras would take it for a weight of the layer.
    value = _arguments.unwrap(value)
    if isinstance(value, tf.Variable):
        if not (value.dtype.is_floating and value.shape.is_compatible_with([])):
            raise ValueError(
                f"{name}: expected a scalar floating-point variable, "
                f"got {value.dtype.name} {value.shape}"
            )
        return value
    return _arguments.number(name, value)


def _factor_config(value):
    if isinstance(value, LearningRateSchedule):
        return keras.saving.serialize_keras_object(value)
    return float(value)
