"""From times to the table, the summary and the plots.

A measurement is a dict, as it stands in the JSON file: the case's name and sizes, "bytes" that a
step must move, "surroundings", and "implementations": key -> {"what", "how", "seconds": a step's,
one a round, "extra_memory": bytes}.
"""

from typing import NamedTuple

import numpy as np
from rich.table import Table

EMPTY = "empty loop"
EMPTIES = (EMPTY, "empty launch", "empty call")
LOOPS = ("fused loop", "tutorial loop", "tuned loop", "graph loop")
QUANTILES = (0.1, 0.5, 0.9)
COLORS = {
    "fused op": "tab:blue",
    "tutorial's ops": "tab:orange",
    "tuned TensorFlow ops": "tab:brown",
    'impl="graph"': "tab:red",
    "PyTorch by hand": "tab:purple",
    "bare kernel": "tab:green",
    "rows moved by hand": "tab:olive",
    "copy of the same bytes": "tab:gray",
    EMPTY: "lightgray",
}


def gross(measurement, key):
    """Seconds a step, one a round."""
    return np.array(measurement["implementations"][key]["seconds"])


def net(measurement, key):
    """The same, in a `tf.while_loop` less the empty loop of the same round."""
    seconds = gross(measurement, key)
    return seconds - gross(measurement, EMPTY) if key in LOOPS else seconds


def ratio(above, below):
    """Median of the ratios within a round."""
    return float(np.median(above / below))


def table(measurement):
    """A row an implementation."""
    around = measurement["surroundings"]
    out = Table(
        title=f"{measurement['name']}: a step must move {measurement['bytes'] / 1e6:.3g} MB; "
        f"rotating over {measurement['batches']} batches",
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
        if "copy" in measurement["implementations"] and key not in EMPTIES:
            share = f"{100 * ratio(gross(measurement, 'copy'), net(measurement, key)):.0f}"
        out.add_row(
            implementation["what"],
            implementation["how"],
            f"{1e6 * np.median(gross(measurement, key)):.1f}",
            middle if key in LOOPS else "",
            low,
            high,
            f"{bandwidth:.2f}" if key not in EMPTIES else "",
            share,
            "" if key in ("copy", *EMPTIES) else _megabytes(implementation["extra_memory"]),
        )
    return out


def _megabytes(size):
    return "" if size is None else f"{size / 1e6:.2f}"


def sweep_table(sweep):
    """A row a number of labels."""
    keys = [key for key in sweep[0]["implementations"] if key not in EMPTIES]
    around = sweep[0]["surroundings"]
    out = Table(
        title=f"Cost against the number of labels, B = {sweep[0]['batch']}, D = {sweep[0]['dim']}: "
        "median µs a step, loops net",
        caption=f"load average {around['load']:.1f}; other processes kept "
        f"{around['cores_of_others']:.2f} cores busy",
    )
    out.add_column("labels", justify="right")
    for key in keys:
        implementation = sweep[0]["implementations"][key]
        out.add_column(f"{implementation['what']}, {implementation['how']}", justify="right")
    out.add_column("fused op: extra MB", justify="right")
    for measurement in sweep:
        extra = measurement["implementations"]["fused loop"]["extra_memory"]
        out.add_row(
            f"{measurement['classes']:,}",
            *(f"{1e6 * np.median(net(measurement, key)):.1f}" for key in keys),
            f"{extra / 1e6:.2f}",
        )
    return out


class Figure(NamedTuple):
    """A figure to reach, and what came out."""

    what: str
    where: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self):
        if self.at_least is not None:
            return self.value >= self.at_least
        return self.value <= self.at_most


def figures(cases, sweep):
    """The figures to reach that these measurements can tell."""
    return [*_case_figures(cases), *_sweep_figures({m["classes"]: m for m in sweep})]


def summary(figures):
    """A row a figure."""
    out = Table(title="Figures to reach (medians of the ratios within a round)")
    for name in ("what", "where", "target", "measured", "met"):
        out.add_column(name, justify="right" if name in ("target", "measured") else "left")
    for figure in figures:
        least = figure.at_least is not None
        target = f"≥ {figure.at_least:g}" if least else f"≤ {figure.at_most:g}"
        met = "[green]yes[/]" if figure.met else "[red]no[/]"
        out.add_row(figure.what, figure.where, target, f"{figure.value:.2f}", met)
    return out


def _case_figures(cases):
    for m in cases:
        bound = {64: 8, 4096: 4}.get(m["batch"])
        if bound:
            times = ratio(net(m, "tutorial loop"), net(m, "fused loop"))
            yield Figure("tutorial's ops / fused op, net", m["name"], times, at_least=bound)
    for m in cases:
        times = ratio(net(m, "tuned loop"), net(m, "fused loop"))
        yield Figure("tuned TensorFlow ops / fused op, net", m["name"], times, at_least=1)
    large = [m for m in cases if m["batch"] >= 1024]
    for m in large:
        times = ratio(net(m, "fused loop"), net(m, "kernel"))
        yield Figure("fused op, net / bare kernel", m["name"], times, at_most=1.25)
    for m in large:
        times = ratio(net(m, "kernel"), net(m, "rows"))
        yield Figure("bare kernel / rows moved by hand", m["name"], times, at_most=1.2)
    for m in cases:
        if "torch" in m["implementations"]:
            # Nothing is subtracted: PyTorch's loop is Python's.
            times = ratio(gross(m, "torch"), gross(m, "fused loop"))
            yield Figure("PyTorch / fused op, loop included", m["name"], times, at_least=1)


def _sweep_figures(sweep):
    few, many = 10**4, 10**7
    if not {few, many} <= sweep.keys():
        return
    where = "10⁷ labels / 10⁴ labels"
    # Rows of a larger table lie in fewer caches and on more pages, whoever reads them: what the op
    # itself must not do is grow beyond the loop that only moves them.
    growth = {key: net(sweep[many], key) / net(sweep[few], key) for key in ("fused loop", "rows")}
    times = ratio(growth["fused loop"], growth["rows"])
    yield Figure("growth of the fused op, net / of rows moved by hand", where, times, at_most=1.25)
    extra = [sweep[c]["implementations"]["fused loop"]["extra_memory"] for c in (few, many)]
    yield Figure(
        "growth of the fused op's extra memory, MB", where, (extra[1] - extra[0]) / 1e6, at_most=1
    )


def pyplot():
    """Matplotlib, which a machine that only measures need not have."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw_cases(cases, path):
    """A panel a case: medians and quantiles of each implementation."""
    plt = pyplot()
    columns = min(len(cases), 2)
    rows = -(-len(cases) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(7.5 * columns, 4.2 * rows), squeeze=False, layout="constrained"
    )
    for panel, m in zip(panels.flat, cases, strict=False):
        keys = [key for key in m["implementations"] if key not in EMPTIES][::-1]
        low, middle, high = 1e6 * np.quantile([net(m, key) for key in keys], QUANTILES, axis=1)
        shown = [m["implementations"][key] for key in keys]
        names = [f"{i['what']}, {i['how']}" for i in shown]
        panel.barh(names, middle, color=[COLORS[i["what"]] for i in shown])
        whiskers = np.maximum(0, [middle - low, high - middle])
        panel.errorbar(middle, names, xerr=whiskers, fmt="none", ecolor="black", elinewidth=1)
        for name, value in zip(names, middle, strict=True):
            panel.annotate(
                f"{value:.3g}", (value, name), (4, 4), textcoords="offset points", fontsize=8
            )
        panel.set(
            xscale="log", title=m["name"], xlabel="µs a step; tf.while_loop net of an empty loop"
        )
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    for panel in panels.flat[len(cases) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_sweep(sweep, path):
    """Cost against the number of labels."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(8, 5), layout="constrained")
    classes = [m["classes"] for m in sweep]
    for key, implementation in sweep[0]["implementations"].items():
        if key in EMPTIES:
            continue
        low, middle, high = 1e6 * np.quantile([net(m, key) for m in sweep], QUANTILES, axis=1)
        color = COLORS[implementation["what"]]
        name = f"{implementation['what']}, {implementation['how']}"
        panel.plot(classes, middle, "o-", color=color, label=name)
        panel.fill_between(classes, low, high, color=color, alpha=0.2)
    panel.set(
        xscale="log",
        yscale="log",
        xlabel="labels (rows of the table)",
        ylabel="µs a step, median, 10 % to 90 %",
        title=f"B = {sweep[0]['batch']}, D = {sweep[0]['dim']}; tf.while_loop net of an empty loop",
    )
    panel.grid(which="both", alpha=0.3)
    panel.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
