"""The targets on a GPU, and the plot. A measurement is as in `bench.report`."""

import os

import numpy as np

from bench.gpu.keys import ATOMIC, COMPILED, COPY, FUSED_OP, KERNEL, TUTORIAL_OPS
from bench.report import Figure, gross, pyplot, ratio, title

# Targets in µs per step for the fused kernel: float32, uniform labels, CUDA graph, on an H200.
ASKED = {
    (64, 200): 5.5,
    (256, 512): 4.5,
    (1024, 512): 6.5,
    (4096, 512): 14,
    (8192, 512): 24,
    (16384, 512): 42,
    (65536, 512): 150,
}
SKEW = 1.6  # target for skewed labels, as a multiple of the time of uniform labels
HALF = 1.05  # target for float16, as a multiple of the time of bfloat16

# Lines of the left panel. PyTorch and CuPy called from Python are not drawn: their time is that of
# the host.
LINES = {
    KERNEL: "tab:blue",
    ATOMIC: "tab:cyan",
    "compiled table graph": "tab:orange",
    "compiled pairs graph": "tab:red",
    "table graph": "tab:purple",
}
BARS = {KERNEL: "fused kernel", ATOMIC: "fused kernel, atomics"}


def figures(cases):
    """Returns the targets that these measurements can be compared with."""
    found = {_sizes(m): m for m in cases if KERNEL in m["implementations"]}
    return [*_times(found), *_skew(found), *_half(found), *_tensorflow(cases)]


def best_compiled(m):
    """Returns the key of the fastest program of torch.compile, called or in a graph, or None."""
    keys = [key + how for key in COMPILED for how in ("", " graph")]
    keys = [key for key in keys if key in m["implementations"]]
    return min(keys, key=lambda key: np.median(gross(m, key)), default=None)


def _times(found):
    for (batch, dim), asked in ASKED.items():
        m = found.get((batch, dim, "uniform", "float32"))
        if not m:
            continue
        beside = []
        if best := best_compiled(m):
            beside.append(f"torch.compile, best: {microseconds(m, best):.1f}")
        if COPY in m["implementations"]:
            share = 100 * ratio(gross(m, COPY), gross(m, KERNEL))
            beside.append(f"{share:.0f} % of a copy's speed")
        value = microseconds(m, KERNEL)
        yield Figure("µs a step", m["name"], value, at_most=asked, beside="; ".join(beside))


def _skew(found):
    for (batch, dim, labels, dtype), m in found.items():
        base = found.get((batch, dim, "uniform", dtype))
        if labels != "uniform" and base:
            times = _quotient(m, base)
            yield Figure("time / of uniform labels", m["name"], times, at_most=SKEW)


def _half(found):
    for (batch, dim, labels, dtype), m in found.items():
        base = found.get((batch, dim, labels, "bfloat16"))
        if dtype == "float16" and base:
            yield Figure("time / of bfloat16", m["name"], _quotient(m, base), at_most=HALF)


def _tensorflow(cases):
    for m in cases:
        if {TUTORIAL_OPS, FUSED_OP} <= m["implementations"].keys():
            times = ratio(gross(m, TUTORIAL_OPS), gross(m, FUSED_OP))
            what = "tutorial's ops / fused op, the device's time"
            yield Figure(what, m["name"], times, at_least=10)


def microseconds(m, key):
    """Returns the median in µs per step."""
    return float(1e6 * np.median(gross(m, key)))


def covered(spans):
    """Returns the length of the union of (begin, end) spans."""
    total, reached = 0, -np.inf
    for begin, end in sorted(spans):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _quotient(m, base):
    # The cases were measured one after the other, so their rounds cannot be paired.
    return microseconds(m, KERNEL) / microseconds(base, KERNEL)


def _sizes(m):
    return m["batch"], m["dim"], m["labels"], m["dtype"]


def draw(results, path):
    """Draws the time against the batch and, for each batch, the effect of labels and types."""
    plt = pyplot()
    cases = [m for m in results["cases"] if m["dim"] == 512]
    uniform = [m for m in cases if m["labels"] == "uniform" and m["dtype"] == "float32"]
    uniform.sort(key=lambda m: m["batch"])
    others = [m for m in cases if m not in uniform and KERNEL in m["implementations"]]
    batches = sorted({m["batch"] for m in others})
    both = uniform and batches
    figure = plt.figure(figsize=(13 if both else 7, 7.5), layout="constrained")
    left = right = figure
    if both:
        left, right = figure.subfigures(1, 2, width_ratios=[1.1, 1])
    if uniform:
        _lines(left.subplots(), uniform, results["conditions"])
    if batches:
        shown = [[m for m in cases if m["batch"] == batch] for batch in batches]
        heights = {"height_ratios": list(map(len, shown))}
        panels = right.subplots(len(batches), 1, squeeze=False, gridspec_kw=heights)[:, 0]
        for panel, batch, some in zip(panels, batches, shown, strict=True):
            _bars(panel, sorted((m for m in some if KERNEL in m["implementations"]), key=_rank))
            panel.set_title(f"batch {batch:,}", loc="left", fontsize=10)
        panels[-1].set_xlabel("µs per step (median, CUDA graph)")
        names, labels = panels[0].get_legend_handles_labels()
        right.legend(names, labels, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    # The file is replaced as a whole, so that an interrupted run leaves the previous plot.
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=100, format="png")
    plt.close(figure)
    os.replace(partial, path)


def _lines(panel, uniform, conditions):
    for key, color in LINES.items():
        shown = [m for m in uniform if key in m["implementations"]]
        if not shown:
            continue
        times = [microseconds(m, key) for m in shown]
        name = title(shown[0]["implementations"][key])
        panel.plot([m["batch"] for m in shown], times, "o-", color=color, label=name)
    speed = conditions["copy_gb_per_s"] * 1e9
    panel.plot(
        [m["batch"] for m in uniform],
        [1e6 * m["bytes"] / speed for m in uniform],
        "k--",
        label="the same bytes at copy speed",
    )
    panel.set(xscale="log", yscale="log", xlabel="batch (512 features, a million labels)")
    panel.set(
        ylabel="µs per step (median, CUDA graph)",
        title=f"{conditions['gpu']}, float32, uniform labels",
    )
    batches = [m["batch"] for m in uniform]
    panel.set_xticks(batches, [f"{batch:,}" for batch in batches])
    low, high = panel.get_ylim()
    ticks = [step * 10**k for k in range(-2, 6) for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    panel.set_yticks(ticks, [f"{tick:,g}" for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(frameon=False)


def _bars(panel, shown):
    for offset, key in ((-0.2, KERNEL), (0.2, ATOMIC)):
        times = {
            k: microseconds(m, key) for k, m in enumerate(shown) if key in m["implementations"]
        }
        places = [k + offset for k in times]
        bars = panel.barh(places, times.values(), 0.4, label=BARS[key], color=LINES[key])
        panel.bar_label(bars, [_short(time) for time in times.values()], padding=3, fontsize=7.5)
    panel.set_yticks(range(len(shown)), [_label(m) for m in shown], fontsize=9)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.1 * panel.get_xlim()[1])
    panel.spines[["top", "right"]].set_visible(False)


def _short(microseconds):
    return f"{microseconds:.1f}" if microseconds < 99.95 else f"{microseconds:,.0f}"


def _label(m):
    return m["labels"] if m["dtype"] == "float32" else m["dtype"]


def _rank(m):
    labels = ("uniform", "power-law", "ten labels", "one label")
    return m["dtype"] != "float32", labels.index(m["labels"]), m["dtype"]
