"""Trains, measures and compares the two runs of a task; all tasks share this module.

A task is a module with `load(seed, quick) -> Task` and `draw(task, runs) -> {file: figure}`.

The two runs of a task differ in one layer, the center loss. Both start from the same weights and
train on the same batches in the same order. The comparison uses data that neither run was trained
on. The weight lambda and the step size alpha of the center loss were chosen on the validation data
(`--tune` repeats the choice, `--sweep` shows how much lambda matters); the test data was not used
for it.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# Set before the import of TensorFlow, whose messages about missing GPUs would break the progress
# bars.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import matplotlib
import numpy as np
import sklearn
import tensorflow as tf
from matplotlib.figure import Figure
from scipy.spatial.distance import pdist
from sklearn.metrics import roc_curve
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize
from tqdm import tqdm

import tf_center_loss_op as tcl

GRID = [(0.0, 0.0)] + [(w, a) for w in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3) for a in (0.5, 1.0)]
# The weights of the table in docs/choosing.md: from what faces take to what two features take.
SWEEP = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 6.4, 64.0)
SWEEP_SEEDS = 3
COLORS = {"softmax": "#4c6a92", "center": "#d1602b"}


@dataclass(frozen=True)
class Split:
    """Samples `[N, ...]` and their labels `[N]`."""

    inputs: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Task:
    """Data, network and schedule, which both runs share, and lambda and alpha."""

    title: str
    notes: list[str]  # describe the data and their split; printed above the table
    num_classes: int
    train: Split
    validation: Split
    test: Split
    network: Callable[[], keras.Model]  # a new embedding network, inputs -> features
    weight: float
    alpha: float
    epochs: int
    batch_size: int
    learning_rate: float
    fars: tuple[float, ...]  # the false accept rates to report; --tune compares at the last one
    unseen: Split | None = None  # test samples of labels that training never saw
    augment: Callable | None = None  # (inputs, seed) -> inputs, stateless
    cosine: bool = True  # whether features are scaled to length 1 before they are compared
    extra: dict = field(default_factory=dict)  # data for the task's own `draw`


@dataclass
class Run:
    """One trained network and its measurements."""

    title: str
    color: str
    network: keras.Model
    head: keras.layers.Dense
    centers: np.ndarray | None
    loss: float
    seconds: float
    step_ms: float
    features: dict[str, np.ndarray] = field(default_factory=dict)  # by the name of the split
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)


# ---------------------------------------------------------------------------------- training


class Progress(keras.callbacks.Callback):
    """Shows one bar per run if the output is a terminal, and records the time of each step."""

    def __init__(self, title, steps):
        super().__init__()
        self.bar = tqdm(total=steps, desc=title, unit="step", disable=None, leave=False)
        self.times = []

    def on_train_batch_end(self, batch, logs=None):
        self.times.append(time.perf_counter())
        self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
        self.bar.update()

    def on_train_end(self, logs=None):
        self.bar.close()

    def step_ms(self):
        """Returns the median wall time of a step without the first tenth (tracing, cold caches)."""
        steps = np.diff(self.times)
        return float(np.median(steps[len(steps) // 10 :]) * 1e3)


def batches(task: Task, seed: int) -> tuple[tf.data.Dataset, int]:
    """Returns all batches of a training, ((inputs, labels), labels), and their number per epoch."""
    inputs, labels = tf.constant(task.train.inputs), tf.constant(task.train.labels, tf.int32)
    steps = max(1, len(labels) // task.batch_size)
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(len(labels))[: steps * task.batch_size] for _ in range(task.epochs)]
    rows = np.concatenate(rows).reshape(task.epochs * steps, -1)

    def batch(rows, step):
        x, y = tf.gather(inputs, rows), tf.gather(labels, rows)
        # The augmentation is stateless and depends on the number of the step, so that a batch does
        # not depend on the thread that makes it.
        return (task.augment(x, (seed, step)) if task.augment else x, y), y

    dataset = tf.data.Dataset.from_tensor_slices((rows, np.arange(len(rows), dtype=np.int32)))
    return dataset.map(batch).prefetch(2), steps


def train(task: Task, weight: float, alpha: float, seed: int) -> Run:
    """Trains with softmax alone (if `weight` is 0) or with softmax + weight · center loss."""
    title = f"softmax + {weight:g} · center loss" if weight else "softmax alone"
    keras.utils.set_random_seed(seed)
    network = task.network()
    # Created before the center loss, so that both runs draw the same random numbers for it.
    head = keras.layers.Dense(task.num_classes)
    head.build(network.output_shape)

    image, label = keras.Input(network.input_shape[1:]), keras.Input([], dtype="int32")
    features, center = network(image), None
    if weight:
        center = tcl.CenterLoss(task.num_classes, loss_weight=weight, alpha=alpha)
        features = center(features, label)
    model = keras.Model([image, label], head(features))

    dataset, steps = batches(task, seed)
    schedule = keras.optimizers.schedules.CosineDecay(task.learning_rate, steps * task.epochs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(schedule), loss)
    progress = Progress(title, steps * task.epochs)
    start = time.perf_counter()
    history = model.fit(
        dataset,
        epochs=task.epochs,
        steps_per_epoch=steps,
        shuffle=False,
        verbose=0,
        callbacks=[progress],
    )
    run = Run(
        title=title,
        color=COLORS["center" if weight else "softmax"],
        network=network,
        head=head,
        centers=center.centers.numpy() if center else None,
        loss=history.history["loss"][-1],
        seconds=time.perf_counter() - start,
        step_ms=progress.step_ms(),
    )
    print(f"   {title}: {steps * task.epochs} steps in {run.seconds:.1f} s", flush=True)
    return run


# ------------------------------------------------------------------------------ measurements


def measure(task: Task, run: Run, name: str) -> dict[str, float]:
    """Returns all measurements that the table shows for the split of this name.

    Stores the features `[N, D]` in the form in which they are compared. The comparison uses
    Euclidean distance. If the task compares by cosine, features are scaled to length 1 first; the
    distance then orders the pairs as the cosine does.
    """
    split = getattr(task, name)
    logits = {}
    for part in {"train", name} - set(run.features):
        raw = run.network.predict(getattr(task, part).inputs, batch_size=512, verbose=0)
        run.features[part] = normalize(raw) if task.cosine else raw
        logits[part] = run.head(raw).numpy()
    result = {}
    if name != "unseen":  # neither the head nor the training data has these labels
        found = task.train.labels[nearest(task, run, name, 1)[:, 0]]
        result["accuracy"] = float((logits[name].argmax(1) == split.labels).mean())
        result["nearest"] = float((found == split.labels).mean())
    return result | verification(run.features[name], split.labels, task.fars)


def nearest(task: Task, run: Run, name: str, count: int) -> np.ndarray:
    """Returns the rows of the `count` nearest training samples of each sample, nearest first."""
    index = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(run.features["train"])
    return index.kneighbors(run.features[name], return_distance=False)


def pairs(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distance of each pair of samples, and whether the pair has the same label."""
    i, j = np.triu_indices(len(labels), 1)  # the order of pdist
    return pdist(features), labels[i] == labels[j]


def verification(features: np.ndarray, labels: np.ndarray, fars) -> dict[str, float]:
    """Returns true accept rates over all pairs, and the distances within and between labels."""
    distance, same = pairs(features, labels)
    far, tar, _ = roc_curve(same, -distance)
    # A rate that corresponds to fewer than thirty false accepts is noise.
    fars = [f for f in fars if f * np.count_nonzero(~same) >= 30]
    result = {f"tar@{f:g}": float(np.interp(f, far, tar)) for f in fars}
    present, row = np.unique(labels, return_inverse=True)
    means = np.stack([features[row == k].mean(0) for k in range(len(present))])
    between = NearestNeighbors(n_neighbors=1).fit(means).kneighbors()[0]
    result["intra"] = float(np.linalg.norm(features - means[row], axis=1).mean())
    result["inter"] = float(between.mean())
    result["ratio"] = result["intra"] / result["inter"]
    return result


# -------------------------------------------------------------------------------- the report

ROWS = {  # name of the measurement: text, factor, unit, digits, whether a larger value is better
    "accuracy": ("accuracy of the softmax head", 100, "%", 1, True),
    "nearest": ("accuracy by the nearest training sample", 100, "%", 1, True),
    "tar": ("true accept rate at false accept rate {}", 100, "%", 1, True),
    "intra": ("intra-class distance (to the mean of the class)", 1, "", 3, False),
    "inter": ("inter-class distance (to the nearest other mean)", 1, "", 3, True),
    "ratio": ("intra-class / inter-class", 1, "", 3, False),
    "loss": ("training loss, last epoch", 1, "", 3, None),
    "step_ms": ("time per step, median", 1, " ms", 1, None),
    "seconds": ("training time", 1, " s", 1, None),
}


def table(task: Task, runs: list[Run]) -> str:
    """Returns the measurements side by side; `+` and `-` after the change mean better and worse."""
    width, lines = 50, []
    lines.append(" " * width + f"{'softmax':>12}{'+ center loss':>16}{'change':>12}")
    for section in runs[0].metrics:
        lines.append(section)
        for name in runs[0].metrics[section]:
            kind, _, at = name.partition("@")
            text, factor, unit, digits, more = ROWS[kind]
            a, b = (factor * run.metrics[section][name] for run in runs)
            change = round(b - a, digits)
            mark = " " if more is None or not change else "+" if (change > 0) == more else "-"
            lines.append(
                f"  {text.format(at):<{width - 2}}{a:>{12 - len(unit)}.{digits}f}{unit}"
                f"{b:>{16 - len(unit)}.{digits}f}{unit}{change:>+{12}.{digits}f} {mark}"
            )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ plots


def draw_verification(task: Task, runs: list[Run], title: str) -> Figure:
    """Draws the true accept rate against the false accept rate, and the distances of the pairs."""
    titles = {"test": "labels that were trained", "unseen": "labels never seen in training"}
    figure = Figure(figsize=(10.5, 8), layout="constrained")
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(2, 2)
    for name, (curve, histogram) in zip(titles, axes.T, strict=True):
        for run in runs:
            distance, same = pairs(run.features[name], getattr(task, name).labels)
            far, tar, _ = roc_curve(same, -distance)
            curve.plot(far, tar, color=run.color, lw=2, label=run.title)
            bins = np.linspace(0, 2, 81)
            for chosen, style in ((same, "-"), (~same, ":")):
                histogram.hist(
                    distance[chosen],
                    bins,
                    density=True,
                    histtype="step",
                    color=run.color,
                    ls=style,
                    lw=1.8,
                )
        few = 30 / (~same).sum()  # a rate of fewer than thirty false accepts is noise
        curve.set(xscale="log", xlim=(few, 1), ylim=(0, 1.01), title=titles[name])
        curve.set(xlabel="false accept rate", ylabel="true accept rate")
        curve.grid(alpha=0.3)
        curve.legend(loc="lower right", frameon=False)
        histogram.set(xlabel="distance of two features of length 1", ylabel="density of the pairs")
        histogram.set(
            title=f"{same.sum():,} pairs with the same label (solid), {(~same).sum():,} with "
            "different labels (dotted)"
        )
        histogram.grid(alpha=0.3)
    return figure


# ----------------------------------------------------------------------------- the program


def run_task(name: str, module, options) -> dict:
    """Loads a task, trains twice, prints and draws; returns the entry for results.json."""
    start = time.perf_counter()
    task = module.load(options.seed, options.quick)
    loaded = time.perf_counter() - start
    info = tcl.build_info()
    native = info["native"] and os.environ.get("TF_CENTER_LOSS_IMPL", "native") == "native"
    print(f"\n== {name}: {task.title}")
    for note in task.notes:
        print(f"   {note}")
    print(
        f"   features compared by {'cosine' if task.cosine else 'Euclidean distance'}; "
        f"{task.num_classes} labels, {task.epochs} epochs of "
        f"{max(1, len(task.train.labels) // task.batch_size)} steps with {task.batch_size} samples"
    )
    print(
        f"   lambda = {task.weight:g} and alpha = {task.alpha:g}, chosen on the validation data; "
        f"center loss: {'fused C++ op' if native else 'plain TensorFlow ops'}"
    )
    if options.tune:
        return tune(task, options.seed)
    if options.sweep:
        return sweep(lambda seed: module.load(seed, options.quick), options.seed)

    runs = [train(task, weight, task.alpha, options.seed) for weight in (0.0, task.weight)]
    for run in runs:
        run.metrics["test data"] = measure(task, run, "test")
        if task.unseen:
            run.metrics["test data of labels that training never saw"] = measure(
                task, run, "unseen"
            )
        run.metrics["training"] = {k: getattr(run, k) for k in ("loss", "step_ms", "seconds")}
    print(table(task, runs))
    pictures = []
    for file, figure in module.draw(task, runs).items():
        figure.savefig(options.output / file, dpi=150, facecolor="white")
        pictures.append(file)
    print(f"   plots: {', '.join(str(options.output / file) for file in pictures)}")
    config = {k: getattr(task, k) for k in ("weight", "alpha", "epochs", "batch_size")}
    return {
        "config": config
        | {"learning_rate": task.learning_rate, "cosine": task.cosine, "seed": options.seed}
        | {"quick": options.quick, "num_classes": task.num_classes, "notes": task.notes}
        | {k: len(getattr(task, k).labels) for k in ("train", "validation", "test")},
        "results": {run.title: run.metrics for run in runs},
        "implementation": {"native": native, "reason": info["reason"]},
        "pictures": pictures,
        "seconds": {"load": loaded, "all": time.perf_counter() - start},
    }


def tune(task: Task, seed: int) -> dict:
    """Trains over a grid of lambda and alpha, and prints the validation results."""
    scores = []
    for weight, alpha in GRID:
        run = train(task, weight, alpha, seed)
        result = measure(task, run, "validation")
        scores.append({"weight": weight, "alpha": alpha, **result})
        tars = ", ".join(f"{k} {100 * v:.1f} %" for k, v in result.items() if "tar" in k)
        print(
            f"   lambda {weight:<5g} alpha {alpha:<3g}: accuracy {100 * result['accuracy']:.1f} %, "
            f"nearest {100 * result['nearest']:.1f} %, {tars}, ratio {result['ratio']:.3f}",
            flush=True,
        )
    lowest = [name for name in result if "tar" in name][-1]
    best = max(scores[1:], key=lambda score: score[lowest])
    print(f"   best {lowest}: lambda {best['weight']:g}, alpha {best['alpha']:g}")
    return {"validation": scores}


def sweep(task_of: Callable[[int], Task], first_seed: int) -> dict:
    """Trains with each lambda of SWEEP and several seeds, and prints the validation results.

    A seed changes the split of the data, the start and the order of the batches. Each cell of the
    table is the mean over the seeds, with the smallest and the largest value.
    """
    seeds = range(first_seed, first_seed + SWEEP_SEEDS)
    tasks = [task_of(seed) for seed in seeds]
    found = {}
    for weight in SWEEP:
        runs = []
        for task, seed in zip(tasks, seeds, strict=True):
            run = train(task, weight, task.alpha, seed)
            runs.append(measure(task, run, "validation"))
        found[weight] = {name: [result[name] for result in runs] for name in runs[0]}
    lowest = [name for name in runs[0] if "tar" in name][-1]
    print(f"   validation data, seeds {seeds.start} to {seeds.stop - 1}, alpha {tasks[0].alpha:g}:")
    print(f"| lambda | accuracy, % | {lowest}, % | intra-class / inter-class |")
    print("|---|---|---|---|")
    for weight, result in found.items():
        cells = [
            f"{factor * np.mean(values):.{digits}f} ({factor * min(values):.{digits}f} to "
            f"{factor * max(values):.{digits}f})"
            for factor, digits, values in (
                (100, 1, result["accuracy"]),
                (100, 1, result[lowest]),
                (1, 3, result["ratio"]),
            )
        ]
        print(f"| {weight:g} | {' | '.join(cells)} |")
    return {"sweep": {f"{weight:g}": result for weight, result in found.items()}}


def versions() -> dict[str, str]:
    """Returns the versions of the libraries and of Python, and the number of CPUs."""
    libraries = {"tensorflow": tf, "keras": keras, "numpy": np, "scikit-learn": sklearn}
    libraries["matplotlib"] = matplotlib
    found = {name: library.__version__ for name, library in libraries.items()}
    return found | {"python": platform.python_version(), "cpus": os.cpu_count()}


def main(tasks: dict) -> None:
    """Runs the command line of `python -m examples` and of each task alone."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "tasks", nargs="*", metavar="task", help=f"one of {', '.join(tasks)} (default: all)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output"), help="folder for plots and results"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="take a few seconds per task")
    parser.add_argument("--tune", action="store_true", help="choose lambda and alpha, no plots")
    parser.add_argument(
        "--sweep", action="store_true", help=f"{SWEEP_SEEDS} seeds of many lambdas, no plots"
    )
    options = parser.parse_args()
    if unknown := set(options.tasks) - set(tasks):
        names = ", ".join(sorted(unknown))
        parser.error(f"task: expected any of {', '.join(tasks)}, got {names}")
    options.output.mkdir(parents=True, exist_ok=True)
    tf.config.experimental.enable_op_determinism()
    tf.get_logger().setLevel("ERROR")  # retracing for the last batch of each split is expected

    start = time.perf_counter()
    file = options.output / "results.json"
    # A task that runs alone replaces its own entry and keeps those of the other tasks.
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in options.tasks or tasks:
        outcome = run_task(name, tasks[name], options)
        results[name] = outcome | {"versions": versions()}
        file.write_text(json.dumps(results, indent=2))
    print(f"\nDone in {time.perf_counter() - start:.0f} s; all numbers in {file}")
