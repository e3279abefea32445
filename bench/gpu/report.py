"""The figures to reach on a GPU, and the plot. A measurement is as in `bench.report`."""

import numpy as np

from bench.gpu.keys import ATOMIC, COMPILED, EMPTY, KERNEL
from bench.report import Figure, gross, net, pyplot, ratio

PARTS = ("kernel graph", "atomic graph", "table graph", "compiled table graph", "unique", "cupy")


def figures(cases, copy_speed):
    """The figures to reach that these measurements can tell."""
    cases = [m for m in cases if KERNEL in m["implementations"]]
    return [*_speed(cases, copy_speed), *_others(cases), *_skew(cases)]


def _speed(cases, copy_speed):
    for m in cases:
        if m["labels"] == "uniform" and m["batch"] * m["dim"] * 4 >= 16e6:
            share = 100 * m["bytes"] / np.median(gross(m, KERNEL)) / copy_speed
            yield Figure("% of the copy speed", m["name"], float(share), at_least=80)
    for m in cases:
        if EMPTY in m["implementations"] and _sizes(m) == (256, 512, "uniform", "float32"):
            above = 1e6 * np.median(gross(m, KERNEL) - gross(m, EMPTY))
            yield Figure("µs above an empty launch", m["name"], float(above), at_most=2)


def _others(cases):
    for m in cases:
        if "tutorial loop" in m["implementations"]:
            times = ratio(net(m, "tutorial loop"), net(m, "fused loop"))
            yield Figure("pure TensorFlow / fused op, net", m["name"], times, at_least=10)
    for m in cases:
        if m["batch"] > 4096:
            continue
        for how, own in ((" graph", KERNEL), ("", "kernel")):
            keys = [k + how for k in COMPILED if k + how in m["implementations"]]
            if keys and own in m["implementations"]:
                best = min(keys, key=lambda key: np.median(gross(m, key)))
                times = ratio(gross(m, best), gross(m, own))
                what = f"torch.compile / fused kernel,{how or ' call'}"
                yield Figure(what, m["name"], times, at_least=2)


def _skew(cases):
    uniform = {_sizes(m): m for m in cases if m["labels"] == "uniform"}
    for m in cases:
        batch, dim, labels, dtype = _sizes(m)
        base = uniform.get((batch, dim, "uniform", dtype))
        if labels != "uniform" and base:
            # Measured one after the other, so the rounds are not the same.
            times = np.median(gross(m, KERNEL)) / np.median(gross(base, KERNEL))
            yield Figure("time / of uniform labels", m["name"], float(times), at_most=2)


def _sizes(m):
    return m["batch"], m["dim"], m["labels"], m["dtype"]


def draw(results, path):
    """Time against the batch, and what uneven labels do."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 6), layout="constrained")
    cases = [m for m in results["cases"] if m["dtype"] == "float32" and m["dim"] == 512]
    uniform = [m for m in cases if m["labels"] == "uniform"]
    for key in PARTS:
        shown = [m for m in uniform if key in m["implementations"]]
        if not shown:
            continue
        one = shown[0]["implementations"][key]
        times = [1e6 * np.median(gross(m, key)) for m in shown]
        left.plot([m["batch"] for m in shown], times, "o-", label=f"{one['what']}, {one['how']}")
    speed = results["conditions"]["copy_gb_per_s"] * 1e9
    left.plot(
        [m["batch"] for m in uniform],
        [1e6 * m["bytes"] / speed for m in uniform],
        "k--",
        label="the same bytes at copy speed",
    )
    left.set(xscale="log", yscale="log", xlabel="B (D = 512, a million labels)")
    left.set(ylabel="µs a step, median", title=results["conditions"]["gpu"])
    left.grid(which="both", alpha=0.3)
    left.legend()

    for offset, key, color in ((0.2, KERNEL, "tab:blue"), (-0.2, ATOMIC, "tab:cyan")):
        times = {k: gross(m, key) for k, m in enumerate(cases) if key in m["implementations"]}
        places = [offset - k for k in times]
        medians = [1e6 * np.median(seconds) for seconds in times.values()]
        right.barh(places, medians, 0.4, label=key.removesuffix(" graph"), color=color)
    right.set_yticks([-k for k in range(len(cases))], [m["name"] for m in cases])
    right.set(xscale="log", xlabel="µs a step, median, CUDA graph", title="labels")
    right.grid(axis="x", alpha=0.3)
    right.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
