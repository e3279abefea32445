"""Makes the tables, the summary and the plots from the measured times.

A measurement is a dict, as in the JSON file. It holds the case's name and sizes, "bytes" that a
step must move, "surroundings", and "implementations": key -> {"what", "how", "seconds" per step,
one number per round, "extra_memory" in bytes}.
"""

from typing import NamedTuple

import numpy as np
from rich.table import Table

from bench.cases import NEIGHBORS, SCATTERED

EMPTIES = ("empty loop", "empty launch")  # implementations that compute nothing
EMPTY_OF = {"tf.while_loop": "empty loop", "XLA loop": "empty xla"}  # how -> key to subtract
PLAIN_XLA = ("graph xla", "matrix xla", "table xla", "sorting xla")
QUANTILES = (0.1, 0.5, 0.9)
COLORS = {
    "fused op": "tab:blue",
    "tutorial's ops": "tab:orange",
    "tuned TensorFlow ops": "tab:brown",
    'impl="graph"': "tab:red",
    "hand-written PyTorch": "tab:purple",
    "bare kernel": "tab:green",
    "hand-written row loop": "tab:olive",
    "copy of the same bytes": "tab:gray",
    "TensorFlow ops, all-pairs counts": "tab:pink",
    "TensorFlow ops, count array": "tab:cyan",
    "TensorFlow ops, sorted counts": "darkcyan",
    "training, fused op": "navy",
    'training, impl="graph"': "darkred",
    "training, no center loss": "silver",
    "empty loop": "lightgray",
}
# Result files from before 2026-11-28 hold other names of some implementations.
RENAMED = {
    "rows moved by hand": "hand-written row loop",
    "PyTorch by hand": "hand-written PyTorch",
    "counts by matrix": "TensorFlow ops, all-pairs counts",
    "counts by table": "TensorFlow ops, count array",
    "counts by sorting": "TensorFlow ops, sorted counts",
    "PyTorch, counts kept": "hand-written PyTorch, count array",
    "torch.compile, table": "torch.compile, count array",
    "torch.compile, pairs": "torch.compile, all-pairs counts",
}
LABELS = {
    "uniform": "labels from the whole table",
    SCATTERED: "10,000 scattered labels",
    NEIGHBORS: "10,000 adjacent labels",
}


def title(implementation):
    """Returns the name of an implementation for tables and plots."""
    return RENAMED.get(implementation["what"], implementation["what"])


def gross(measurement, key):
    """Returns the seconds per step of each round."""
    return np.array(measurement["implementations"][key]["seconds"])


def is_loop(measurement, key):
    """Returns whether the row is a loop of steps, from which an empty loop is subtracted."""
    implementation = measurement["implementations"][key]
    return implementation["how"] in EMPTY_OF and implementation["what"] not in EMPTIES


def net(measurement, key):
    """Returns the seconds per step; for a loop, minus those of the empty loop in the same round."""
    seconds = gross(measurement, key)
    if not is_loop(measurement, key):
        return seconds
    return seconds - gross(measurement, EMPTY_OF[measurement["implementations"][key]["how"]])


def ratio(above, below):
    """Returns the median of the ratios within a round.

    If the rounds are not the same, returns the ratio of the medians.
    """
    if len(above) != len(below):
        return float(np.median(above) / np.median(below))
    return float(np.median(above / below))


def table(measurement):
    """Returns the table of a case, with one row per implementation."""
    around = measurement["surroundings"]
    out = Table(
        title=f"{measurement['name']}: a step must move {measurement['bytes'] / 1e6:.3g} MB; "
        f"{measurement['batches']} batches in rotation",
        caption=f"load average {around['load']:.1f}; other processes kept "
        f"{around['cores_of_others']:.2f} cores busy",
    )
    out.add_column("implementation")
    out.add_column("how")
    for name in ("µs", "net µs", "10 %", "90 %", "GB/s", "% of copy", "extra MB"):
        out.add_column(name, justify="right")
    for key, implementation in measurement["implementations"].items():
        low, middle, high = (
            f"{q:.1f}" for q in 1e6 * np.quantile(net(measurement, key), QUANTILES)
        )
        bandwidth = measurement["bytes"] / np.median(net(measurement, key)) / 1e9
        share = ""
        step = implementation["what"] not in EMPTIES and not key.startswith("training")
        # A compiled program keeps its memory for the next call, so that 0 would be shown.
        gives_back = step and key != "copy" and "XLA" not in implementation["how"]
        if "copy" in measurement["implementations"] and step:
            share = f"{100 * ratio(gross(measurement, 'copy'), net(measurement, key)):.0f}"
        out.add_row(
            title(implementation),
            implementation["how"],
            f"{1e6 * np.median(gross(measurement, key)):.1f}",
            middle if is_loop(measurement, key) else "",
            low,
            high,
            f"{bandwidth:.2f}" if step else "",
            share,
            _megabytes(implementation["extra_memory"]) if gives_back else "",
        )
    return out


def _megabytes(size):
    return "" if size is None else f"{size / 1e6:.2f}"


def sweep_table(sweep):
    """Returns the table of the label sweep, with one row per number of labels."""
    keys = [key for key, row in sweep[0]["implementations"].items() if row["what"] not in EMPTIES]
    around = sweep[0]["surroundings"]
    out = Table(
        title=f"Cost against the number of labels, B = {sweep[0]['batch']}, D = {sweep[0]['dim']}: "
        "median µs per step, loops minus the empty loop",
        caption=f"load average {around['load']:.1f}; other processes kept "
        f"{around['cores_of_others']:.2f} cores busy",
    )
    out.add_column("labels", no_wrap=True)
    for key in keys:
        implementation = sweep[0]["implementations"][key]
        out.add_column(f"{title(implementation)}, {implementation['how']}", justify="right")
    out.add_column("fused op: extra MB", justify="right")
    for measurement in sweep:
        extra = measurement["implementations"]["fused loop"]["extra_memory"]
        out.add_row(
            f"{measurement['classes']:,}{_drawn(measurement)}",
            *(f"{1e6 * np.median(net(measurement, key)):.1f}" for key in keys),
            f"{extra / 1e6:.2f}",
        )
    return out


def _drawn(measurement):
    return "" if measurement["labels"] == "uniform" else f": {LABELS[measurement['labels']]}"


class Figure(NamedTuple):
    """A target of the benchmark, and the measured value."""

    what: str
    where: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    beside: str = ""  # other numbers for comparison

    @property
    def met(self):
        if self.at_least is not None:
            return self.value >= self.at_least
        return self.value <= self.at_most


def figures(cases, sweep):
    """Returns the targets that these measurements can be compared with."""
    return [*_case_figures(cases), *_sweep_figures({(m["classes"], m["labels"]): m for m in sweep})]


def summary(figures):
    """Returns the table of the targets."""
    out = Table(title="Targets (medians; ratios are medians of the ratios within a round)")
    for name in ("what", "where", "target", "measured", "met"):
        out.add_column(name, justify="right" if name in ("target", "measured") else "left")
    beside = any(figure.beside for figure in figures)
    if beside:
        out.add_column("for comparison")
    for figure in figures:
        least = figure.at_least is not None
        target = f"≥ {figure.at_least:g}" if least else f"≤ {figure.at_most:g}"
        met = "[green]yes[/]" if figure.met else "[red]no[/]"
        row = figure.what, figure.where, target, f"{figure.value:.2f}", met
        out.add_row(*row, *([figure.beside] if beside else []))
    return out


def _case_figures(cases):
    def compare(what, above, below, of=net, where=lambda m: True, **bound):
        for m in cases:
            if where(m) and {above, below} <= m["implementations"].keys():
                yield Figure(what, m["name"], ratio(of(m, above), of(m, below)), **bound)

    def large(m):
        return m["batch"] >= 1024

    for batch, bound in ((64, 8), (4096, 4)):
        yield from compare(
            "tutorial's ops / fused op, net",
            "tutorial loop",
            "fused loop",
            where=lambda m, batch=batch: m["batch"] == batch,
            at_least=bound,
        )
    yield from compare(
        "tuned TensorFlow ops / fused op, net", "tuned loop", "fused loop", at_least=1
    )
    yield from compare(
        "fused op, net / bare kernel", "fused loop", "kernel", where=large, at_most=1.25
    )
    yield from compare(
        "bare kernel / hand-written row loop", "kernel", "rows", where=large, at_most=1.2
    )
    # Nothing is subtracted, because PyTorch's loop is a Python loop.
    yield from compare(
        "hand-written PyTorch / fused op, including its loop",
        "torch",
        "fused loop",
        of=gross,
        at_least=1,
    )
    for m in cases:
        if {"fused xla", *PLAIN_XLA} <= m["implementations"].keys():
            best = min(PLAIN_XLA, key=lambda key: np.median(net(m, key)))
            times = ratio(net(m, best), net(m, "fused xla"))
            what = f"XLA: {title(m['implementations'][best])} / fused op, net"
            yield Figure(what, m["name"], times, at_least=2)
    yield from compare(
        "training step with the op, compiled by XLA / not compiled",
        "training native xla",
        "training native",
        at_most=1,
    )


def _sweep_figures(sweep):
    few = sweep.get((10**4, "uniform"))
    for what, key, many in (
        ("the fused op, net", "fused loop", 10**7),
        ("the fused op under XLA, net", "fused xla", 10**6),
    ):
        where = f"{many:,} labels / {10**4:,} labels"
        # Rows of a larger table miss the caches and the TLB more often, in any implementation. The
        # op's time must not grow more than that of the loop that only moves these rows.
        if few and (whole := sweep.get((many, "uniform"))):
            growth = {k: net(whole, k) / net(few, k) for k in (key, "rows")}
            value = ratio(growth[key], growth["rows"])
            what_grows = f"growth of {what} / growth of the hand-written row loop"
            yield Figure(what_grows, where, value, at_most=1.25)
        for labels in SCATTERED, NEIGHBORS:
            if few and (part := sweep.get((many, labels))):
                value = ratio(net(part, key), net(few, key))
                yield Figure(f"growth of {what}, {LABELS[labels]}", where, value, at_most=1.15)
    if few and (whole := sweep.get((10**7, "uniform"))):
        extra = [m["implementations"]["fused loop"]["extra_memory"] for m in (few, whole)]
        yield Figure(
            "growth of the fused op's extra memory, MB",
            f"{10**7:,} labels / {10**4:,} labels",
            (extra[1] - extra[0]) / 1e6,
            at_most=1,
        )


def pyplot():
    """Imports Matplotlib, which a machine that only measures need not have installed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_cases(cases, path):
    """Draws one panel per case: medians and quantiles of each implementation."""
    plt = pyplot()
    columns = min(len(cases), 2)
    rows = -(-len(cases) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(7.5 * columns, 4.2 * rows), squeeze=False, layout="constrained"
    )
    for panel, m in zip(panels.flat, cases, strict=False):
        keys = [k for k, row in m["implementations"].items() if row["what"] not in EMPTIES][::-1]
        low, middle, high = 1e6 * np.quantile([net(m, key) for key in keys], QUANTILES, axis=1)
        shown = [m["implementations"][key] for key in keys]
        names = [f"{title(i)}, {i['how']}" for i in shown]
        panel.barh(names, middle, color=[COLORS.get(title(i), "black") for i in shown])
        whiskers = np.maximum(0, [middle - low, high - middle])
        panel.errorbar(middle, names, xerr=whiskers, fmt="none", ecolor="black", elinewidth=1)
        for name, value in zip(names, middle, strict=True):
            panel.annotate(
                f"{value:.3g}", (value, name), (4, 4), textcoords="offset points", fontsize=8
            )
        panel.set(xscale="log", title=m["name"], xlabel="µs per step; loops minus the empty loop")
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    for panel in panels.flat[len(cases) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_sweep(sweep, path):
    """Draws the cost against the number of labels."""
    plt = pyplot()
    kinds = list(dict.fromkeys(m["labels"] for m in sweep))
    figure, panels = plt.subplots(
        1, len(kinds), figsize=(7 * len(kinds), 5), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, kind in zip(panels.flat, kinds, strict=True):
        shown = [m for m in sweep if m["labels"] == kind]
        classes = [m["classes"] for m in shown]
        for key, implementation in sweep[0]["implementations"].items():
            if implementation["what"] in EMPTIES:
                continue
            low, middle, high = 1e6 * np.quantile([net(m, key) for m in shown], QUANTILES, axis=1)
            color = COLORS[title(implementation)]
            name = f"{title(implementation)}, {implementation['how']}"
            style = "o--" if "XLA" in implementation["how"] else "o-"
            panel.plot(classes, middle, style, color=color, label=name)
            panel.fill_between(classes, low, high, color=color, alpha=0.2)
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="labels (rows of the table)",
            ylabel="µs per step: median, 10 % to 90 %",
            title=f"{LABELS[kind]}; B = {sweep[0]['batch']}, D = {sweep[0]['dim']}\n"
            "times of loops are without the empty loop",
        )
        panel.grid(which="both", alpha=0.3)
    panels.flat[0].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
