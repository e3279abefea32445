"""Few labels: handwritten digits with two features, which can be plotted directly.

The plot reproduces figures 2 and 3 of the paper (Wen et al., ECCV 2016): softmax alone spreads each
class along a ray; softmax + center loss concentrates each class around its center.
"""

import keras
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from examples import common
from examples.common import Run, Split, Task


def network() -> keras.Model:
    """Returns a network with two convolutions and 2 features, with PReLU as in the paper."""
    return keras.Sequential(
        [
            keras.Input([8, 8, 1]),
            keras.layers.Rescaling(1 / 16),
            keras.layers.Conv2D(32, 3, padding="same"),
            keras.layers.PReLU(shared_axes=[1, 2]),
            keras.layers.MaxPool2D(),
            keras.layers.Conv2D(64, 3, padding="same"),
            keras.layers.PReLU(shared_axes=[1, 2]),
            keras.layers.MaxPool2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )


def load(seed: int, quick: bool) -> Task:
    """Loads scikit-learn's digits: 60 % for training, 20 % for validation, 20 % for testing."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32)
    options = {"random_state": seed}
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, **options)
    train, validation = train_test_split(rest, test_size=0.25, stratify=labels[rest], **options)
    train, validation, test = (Split(images[i], labels[i]) for i in (train, validation, test))
    return Task(
        title="handwritten digits with 2 features",
        notes=[
            f"scikit-learn's digits: {len(train.labels)} training images, "
            f"{len(validation.labels)} validation images, {len(test.labels)} test images",
            "verification: each pair of test images, same digit or not",
        ],
        num_classes=10,
        train=train,
        validation=validation,
        test=test,
        network=network,
        weight=0.1,
        alpha=0.5,
        epochs=4 if quick else 60,
        batch_size=64,
        learning_rate=3e-3,
        fars=(1e-1, 1e-2, 1e-3),
        cosine=False,
    )


def draw(task: Task, runs: list[Run]) -> dict[str, Figure]:
    """Draws the features of training and test data, with the centers."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    colors = matplotlib.colormaps["tab10"].colors
    for axis, run in zip(figure.subplots(1, 2), runs, strict=True):
        trained, tested = run.features["train"], run.features["test"]
        means = np.stack([trained[task.train.labels == k].mean(0) for k in range(10)])
        for k, color in enumerate(colors):
            axis.scatter(*trained[task.train.labels == k].T, s=5, color=color, alpha=0.25, lw=0)
            axis.scatter(*tested[task.test.labels == k].T, s=12, color=color, lw=0)
        for k, point in enumerate(means if run.centers is None else run.centers):
            axis.text(
                *point,
                str(k),
                ha="center",
                va="center",
                fontsize=10,
                weight="bold",
                bbox={"boxstyle": "circle,pad=0.15", "fc": "white", "ec": "black", "lw": 1.2},
            )
        accuracy = run.metrics["test data"]["accuracy"]
        axis.set_title(f"{run.title}\ntest accuracy {100 * accuracy:.1f} %")
        axis.set_xlabel("circles: " + ("class means" if run.centers is None else "the centers"))
        axis.set_aspect("equal", adjustable="datalim")
        axis.grid(alpha=0.2)
    figure.suptitle("Handwritten digits, two features: training data (pale) and test data")
    return {"digits_features.png": figure}


if __name__ == "__main__":
    from examples import digits

    common.main({"digits": digits})
