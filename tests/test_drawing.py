"""The plot of embeddings: positions, colors, labels of the axes."""

import numpy as np
import pytest
import tensorflow as tf

import tf_center_loss_op as tcl
from child import run_program

N, C = 60, 3


def problem(dim, classes=C):
    rng = np.random.default_rng(0)
    labels = np.arange(N) % classes
    centers = rng.normal(size=(classes + 1, dim)).astype("f")
    features = centers[labels] + rng.normal(size=(N, dim)).astype("f") / 10
    return features, labels, centers


def drawn(figure):
    """Points by class, and the centers, as passed to matplotlib."""
    *points, centers = figure.axes[0].collections
    return [np.asarray(part.get_offsets()) for part in points], np.asarray(centers.get_offsets())


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else None


@pytest.mark.parametrize("source", [np.asarray, tf.constant, tf.Variable])
def test_two_dimensions_are_drawn_as_they_are(source, tmp_path):
    features, labels, centers = problem(2)
    figure = tcl.plots.embeddings(source(features), source(labels), source(centers), title="title")
    points, crosses = drawn(figure)
    for j in range(C):
        np.testing.assert_array_equal(points[j], features[labels == j])
    np.testing.assert_array_equal(crosses, centers[:C])  # the fourth class has no sample
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("dimension 1", "dimension 2")
    assert axes.get_title() == "title" and axes.get_aspect() == 1
    assert legend(figure) == ["0", "1", "2", "centers"]
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_more_dimensions_are_projected_on_the_principal_components():
    features, labels, centers = problem(7)
    figure = tcl.plots.embeddings(features, labels, centers)
    points, crosses = drawn(figure)
    x = features.astype("d") - features.mean(0, dtype="d")
    values, vectors = np.linalg.eigh(x.T @ x)
    for i in range(2):
        component = vectors[:, -1 - i]
        expected = x @ component
        found = np.zeros(N)
        for j in range(C):
            found[labels == j] = points[j][:, i]
        sign = np.sign(found @ expected)
        np.testing.assert_allclose(found, sign * expected, atol=1e-5)
        centered = centers[:C] - features.mean(0, dtype="d")
        np.testing.assert_allclose(crosses[:, i], sign * centered @ component, atol=1e-5)
    share = 100 * values[-1] / values.sum()
    assert figure.axes[0].get_xlabel() == f"principal component 1 ({share:.0f} % of the variance)"


def test_names_and_no_centers():
    features, labels, centers = problem(2)
    figure = tcl.plots.embeddings(features, labels, centers, class_names=["a", "b", "c"])
    assert legend(figure) == ["a", "b", "c", "centers"]
    names = np.array(["x", "y", "z"])[labels]
    assert legend(tcl.plots.embeddings(features, names)) == ["x", "y", "z"]


def test_many_classes_have_no_legend():
    features, labels, centers = problem(2, classes=21)
    assert legend(tcl.plots.embeddings(features, labels, centers)) is None
    assert len(legend(tcl.plots.embeddings(features, labels % 20, centers))) == 21


def test_at_most_max_samples_are_drawn():
    features, labels, centers = problem(2)
    points, _ = drawn(tcl.plots.embeddings(features, labels, centers, max_samples=10))
    assert sum(map(len, points)) == 10


@pytest.mark.parametrize("dim", [1, 2, 3, 9])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_plot_of_at_most_two_samples_is_drawn(count, dim, tmp_path):
    features, labels, centers = problem(dim)
    figure = tcl.plots.embeddings(features[:count], labels[:count], centers)
    figure.savefig(tmp_path / "picture.png")


def test_samples_without_variance_are_drawn(tmp_path):
    figure = tcl.plots.embeddings(np.ones([4, 5]), [0, 1, 0, 1], np.zeros([2, 5]))
    figure.savefig(tmp_path / "picture.png")
    assert "0 % of the variance" in figure.axes[0].get_xlabel()


def test_wrong_arguments_are_refused():
    # The checks are those of export_projector.
    with pytest.raises(ValueError, match=r"labels: expected shape \(60,\)"):
        tcl.plots.embeddings(problem(2)[0], [1])


def test_the_error_without_matplotlib_says_what_to_install(tmp_path):
    # Everything else works without matplotlib, and the error says what to install.
    out = run_program("plot_without_matplotlib", cwd=tmp_path)
    assert out == "plots.embeddings needs matplotlib: pip install matplotlib\n"
