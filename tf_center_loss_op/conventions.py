"""The center losses of known codebases, in terms of this package's arguments.

They differ in the name of the step size, in whether the loss is a sum or a mean, and in whether the
number of samples n_j enters the step. So "alpha = 0.5" does not mean the same in all of them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class Convention:
    """One codebase's center loss.

    Its loss is ``loss_factor(D)`` times ``center_loss(..., rule=rule, reduction=reduction,
    alpha=alpha(step))``, where ``step`` is the codebase's own step size, called ``step_name``
    there, and D the feature size. Its centers take the same step as in that call. ``note`` names
    what else differs.
    """

    source: str
    rule: str
    reduction: str
    step_name: str
    alpha: Callable[[float], float] = lambda step: step
    loss_factor: Callable[[int], float] = lambda dim: 1.0
    note: str = ""


CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {
        "paper": Convention(
            source="Wen et al., ECCV 2016, equations 2 to 4",
            rule="paper",
            reduction="sum",
            step_name="alpha",
        ),
        "caffe-face": Convention(
            source="ydwen/caffe-face, center_loss_layer",
            rule="paper",
            reduction="mean",
            step_name="base_lr * lr_mult",
            note="loss_weight does not enter the step. This holds for a solver without momentum "
            "and weight decay; their own solvers have momentum 0.9, and decay_mult 2 for faces.",
        ),
        "authors-2019": Convention(
            source="Wen et al., IJCV 2019, the authors' code (ydwen/centerloss)",
            rule="mean",
            reduction="mean",
            step_name="base_lr * lr_mult",
            note="There is no alpha, and loss_weight does not enter the step. This holds for a "
            "solver without momentum and weight decay; their own solvers have base_lr 0.1, "
            "momentum 0.9 and decay_mult 1.",
        ),
        "EncodeTS": Convention(
            source="EncodeTS/TensorFlow_Center_Loss, get_center_loss",
            rule="paper",
            reduction="sum",
            step_name="alpha",
        ),
        "tutorial": Convention(
            source="the TensorFlow 1 tutorial; also compat.v1.center_loss",
            rule="tutorial",
            reduction="sum",
            step_name="alpha",
            note="Its default alpha = 0 never moves a center, and neither does alpha = 1.",
        ),
        "facenet": Convention(
            source="davidsandberg/facenet, center_loss",
            rule="sum",
            reduction="mean",
            step_name="alfa",
            alpha=lambda alfa: 1.0 - alfa,
            loss_factor=lambda dim: 2.0 / dim,
            note="No count in the step: a center overshoots where its label stands more than "
            "1 / (1 - alfa) times in a batch, and diverges beyond twice that (40 for alfa = 0.95).",
        ),
        "pytorch-center-loss": Convention(
            source="KaiyangZhou/pytorch-center-loss, CenterLoss",
            rule="batch_mean",
            reduction="mean",
            step_name="lr",
            alpha=lambda lr: 2.0 * lr,
            loss_factor=lambda dim: 2.0,
            note="The centers move by plain SGD on the loss, with its weight divided out of the "
            "gradient. Where the weight lambda is left in (one optimizer for the model and the "
            "centers), alpha is 2 lr lambda. Without the clamp at 1e-12, which adds "
            "(C - 1) * 1e-12 to the loss.",
        ),
        "MNIST_center_loss_pytorch": Convention(
            source="jxgu1016/MNIST_center_loss_pytorch, CenterLoss",
            rule="paper_batch_mean",
            reduction="mean",
            step_name="lr",
            note="The centers move by plain SGD.",
        ),
        "louis-she": Convention(
            source="louis-she/center-loss.pytorch, loss.py",
            rule="paper",
            reduction="mean",
            step_name="alpha",
            loss_factor=lambda dim: 2.0 / dim,
        ),
        "paddle": Convention(
            source="PaddlePaddle, fluid.layers.center_loss (still in the documents of 2.2)",
            rule="paper",
            reduction="none",
            step_name="alpha",
            note="Its labels have the shape [N, 1], and so has its loss.",
        ),
        "mxnet": Convention(
            source="the MXNet center loss operator (pangyupo/mxnet_center_loss)",
            rule="paper",
            reduction="mean",
            step_name="alpha",
            note="Its gradient is scale * d_i / N, that of the mean, since 2016-11-22; before, it "
            "was scale * d_i, that of the sum.",
        ),
    }
)
