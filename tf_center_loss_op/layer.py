"""The Keras layer."""

from __future__ import annotations

import keras
import tensorflow as tf

from tf_center_loss_op import _arguments, _native
from tf_center_loss_op.functional import weighted_center_loss


@keras.saving.register_keras_serializable(package="tf_center_loss_op")
class CenterLoss(keras.layers.Layer):
    """Adds ``weight`` times the center loss of its inputs; passes the features on unchanged.

    Equals, in ``call``:

        self.add_loss(weight * tcl.center_loss(features, labels, self.centers, ...))
        return features

    The centers move in training only, once for each forward pass; evaluation and prediction leave
    them as they are. They are a non-trainable weight: no optimizer touches them, and they are
    saved and restored with the model.

    Args:
      num_classes: C, the number of classes.
      weight: lambda, the factor of the loss (equation 5 of the paper), >= 0.
      alpha: step size of the centers, a number >= 0.
      rule: the rule of the step, see `center_loss`.
      reduction: ``"mean"`` (default) or ``"sum"`` over the batch, or ``"none"``.
      centers_initializer: a Keras initializer, or its name, for the centers ``[C, D]``.
      ignore_label: samples with this label are left out.
      impl: ``"auto"``, ``"native"`` or ``"graph"``, see `center_loss`.
      **layer_kwargs: ``name``, ``dtype`` and the like, of `keras.layers.Layer`.

    Call arguments:
      features: float ``[..., D]``; or the pair ``[features, labels]``.
      labels: class ids int32 or int64 ``[...]``, or one-hot rows ``[..., C]``. To predict without
        labels, make a model that ends at the features.
      sample_weight: numbers in the labels' shape.
      training: whether the centers move.

    Attributes:
      centers: float32 ``[C, D]``.

    Raises:
      TypeError, ValueError: as `center_loss`, at construction or in the call.

    Determinism: as `center_loss`.

    >>> import keras
    >>> import tf_center_loss_op as tcl
    >>> image = keras.Input([64])
    >>> label = keras.Input([], dtype="int32")
    >>> embedding = keras.layers.Dense(8)(image)
    >>> embedding = tcl.CenterLoss(10, weight=0.01)(embedding, label)
    >>> model = keras.Model([image, label], keras.layers.Dense(10)(embedding))

    Source: Wen et al., ECCV 2016, equations 2 to 5.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        weight: float = 1.0,
        alpha: float = 0.5,
        rule: str = "paper",
        reduction: str = "mean",
        centers_initializer: str | keras.initializers.Initializer = "zeros",
        ignore_label: int | None = None,
        impl: str = "auto",
        **layer_kwargs: object,
    ):
        # No autocast: the features pass unchanged, and sample weights keep their precision.
        super().__init__(autocast=False, **layer_kwargs)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes: expected an int >= 1, got {num_classes!r}")
        _arguments.one_of("rule", rule, _arguments.RULES)
        _arguments.one_of("reduction", reduction, _arguments.REDUCTIONS)
        _arguments.one_of("impl", impl, _arguments.IMPLEMENTATIONS)
        self.num_classes = num_classes
        self.weight = _arguments.number("weight", weight)
        self.alpha = _arguments.number("alpha", alpha)
        self.rule = rule
        self.reduction = reduction
        self.centers_initializer = keras.initializers.get(centers_initializer)
        self.ignore_label = ignore_label
        self.impl = impl
        self.supports_jit = _native.build_info()["xla"]

    def build(self, features_shape, labels_shape=None, sample_weight_shape=None):
        """Creates the centers."""
        if features_shape and isinstance(features_shape[0], (tuple, list)):
            features_shape = features_shape[0]
        if not features_shape or features_shape[-1] is None:
            raise ValueError(
                f"features: expected shape [..., D] with D known, got {tuple(features_shape)}"
            )
        # autocast=False also here: under a 16-bit policy every access would copy the table.
        self.centers = self.add_weight(
            name="centers",
            shape=(self.num_classes, features_shape[-1]),
            initializer=self.centers_initializer,
            dtype="float32",
            trainable=False,
            autocast=False,
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
        self.add_loss(self._loss(features, labels, sample_weight, training))
        return features

    def compute_output_spec(self, features, labels=None, sample_weight=None, training=None):
        """The features' own shape and type."""
        features = features[0] if isinstance(features, (tuple, list)) else features
        return keras.KerasTensor(features.shape, dtype=features.dtype)

    def get_config(self):
        """The constructor's arguments."""
        return super().get_config() | {
            "num_classes": self.num_classes,
            "weight": self.weight,
            "alpha": self.alpha,
            "rule": self.rule,
            "reduction": self.reduction,
            "centers_initializer": keras.initializers.serialize(self.centers_initializer),
            "ignore_label": self.ignore_label,
            "impl": self.impl,
        }

    def _loss(self, features, labels, sample_weight, training):
        features = tf.convert_to_tensor(features)
        # The centers of a layer are float32 whatever the features are.
        if features.dtype == tf.float64:
            features = tf.cast(features, tf.float32)
        return weighted_center_loss(
            features,
            labels,
            self.centers,
            weight=self.weight,
            alpha=self.alpha,
            rule=self.rule,
            reduction=self.reduction,
            sample_weight=sample_weight,
            ignore_label=self.ignore_label,
            update_centers=bool(training),
            impl=self.impl,
        )
