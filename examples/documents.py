"""Documents, as in the tutorial: which module does a docstring come from?

The documents are the docstrings of the standard library and of packages that these examples need
anyway. Each document becomes a vector of 200 numbers (TF-IDF, then a truncated SVD, both fitted on
the training documents only). One module in five is excluded from training.
"""

import ast
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from examples import common
from examples.common import Run, Split, Task

PACKAGES = ("keras", "matplotlib", "numpy", "scipy", "sklearn")
LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}
WORDS, DOCUMENTS, FEATURES = 10, 8, 200  # least words per document, least documents per module

# ----------------------------------------------------------------------------------- reading


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Yields the docstrings of a module, its classes, their methods, and its functions."""
    if text := ast.get_docstring(tree):
        yield text
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from docstrings(node)


def read(folder: Path, prefix: str = "", files: str = "**/*.py") -> Iterator[tuple[str, str]]:
    """Yields (module, docstring) for the Python files below `folder`, without importing them."""
    for path in sorted(folder.glob(files)):
        parts = path.relative_to(folder).with_suffix("").parts
        if LEFT_OUT.isdisjoint(parts):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            module = prefix + ".".join(parts).removesuffix(".__init__")
            yield from ((module, text) for text in docstrings(tree))


def corpus(quick: bool) -> tuple[list[str], list[str], np.ndarray]:
    """Returns the modules, the documents, and the index of each document's module."""
    library = Path(sysconfig.get_path("stdlib"))
    found = list(read(library, files="*.py" if quick else "**/*.py"))
    for package in () if quick else PACKAGES:
        found += read(Path(find_spec(package).origin).parent, f"{package}.")
    of = {}  # a text that occurs in several modules counts for the first
    for module, text in found:
        if len(text.split()) >= WORDS:
            of.setdefault(text, module)
    modules, index, size = np.unique(list(of.values()), return_inverse=True, return_counts=True)
    enough = size >= DOCUMENTS
    texts = [text for text, i in zip(of, index, strict=True) if enough[i]]
    new = np.cumsum(enough) - 1
    return list(modules[enough]), texts, new[index[enough[index]]]


# -------------------------------------------------------------------------------------- task


def network() -> keras.Model:
    """Returns a network with one hidden layer and 200 features."""
    return keras.Sequential(
        [
            keras.Input([FEATURES]),
            keras.layers.Dense(512, activation="relu"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(200),
        ]
    )


def load(seed: int, quick: bool) -> Task:
    """Reads the documents, excludes a fifth of the modules, and splits the other documents."""
    modules, texts, module = corpus(quick)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(modules))
    cut = len(modules) * 4 // 5
    seen, unseen = np.sort(order[:cut]), np.sort(order[cut:])
    label = np.empty(len(modules), np.int64)
    label[seen], label[unseen] = np.arange(len(seen)), np.arange(len(unseen))

    rows = {"train": [], "validation": [], "test": []}
    for k in seen:
        mine = rng.permutation(np.flatnonzero(module == k))
        fifth = len(mine) // 5 + 1
        rows["test"].extend(mine[:fifth])
        rows["validation"].extend(mine[fifth : 2 * fifth])
        rows["train"].extend(mine[2 * fifth :])
    rows["unseen"] = np.flatnonzero(np.isin(module, unseen))

    tfidf = TfidfVectorizer(sublinear_tf=True, min_df=2, token_pattern=r"[A-Za-z]{2,}")
    svd = TruncatedSVD(FEATURES, n_iter=3, random_state=seed)
    svd.fit(tfidf.fit_transform([texts[i] for i in rows["train"]]))
    data = {}
    for name, chosen in rows.items():
        vectors = normalize(svd.transform(tfidf.transform([texts[i] for i in chosen])))
        vectors *= FEATURES**0.5  # numbers near 1 suit the network's initial weights
        data[name] = Split(vectors.astype(np.float32), label[module[chosen]])
    size = {name: len(data[name].labels) for name in data}
    return Task(
        title="which module does a docstring come from?",
        notes=[
            "docstrings of the standard library" + ("" if quick else f", {', '.join(PACKAGES)}"),
            f"{size['train']} training, {size['validation']} validation and {size['test']} test "
            f"documents of {len(seen)} modules",
            f"labels never seen: {len(unseen)} further modules, {size['unseen']} documents",
            "verification: each pair of test documents, same module or not",
        ],
        num_classes=len(seen),
        network=network,
        weight=0.1,
        alpha=0.5,
        epochs=4 if quick else 15,
        batch_size=128,
        learning_rate=1e-3,
        fars=(1e-1, 1e-2, 1e-3),
        extra={"modules": [modules[k] for k in seen]},
        **data,
    )


def draw(task: Task, runs: list[Run]) -> dict[str, Figure]:
    """Draws the verification curves, and the similarity of the documents of twelve modules."""
    return {
        "documents_verification.png": common.draw_verification(
            task, runs, f"Docstrings, {task.num_classes} modules trained"
        ),
        "documents_similarity.png": draw_similarity(task, runs),
    }


def draw_similarity(task: Task, runs: list[Run], count: int = 12, each: int = 12) -> Figure:
    """Draws the cosine of each pair of test documents, for the modules with the most documents."""
    size = np.bincount(task.test.labels, minlength=task.num_classes)
    chosen = np.sort(np.argsort(-size, kind="stable")[:count])
    rows = [np.flatnonzero(task.test.labels == k)[:each] for k in chosen]
    ends = np.cumsum([len(r) for r in rows])
    middles = ends - [len(r) / 2 for r in rows] - 0.5
    figure = Figure(figsize=(13, 6.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, run in zip(axes, runs, strict=True):
        features = run.features["test"][np.concatenate(rows)]
        image = axis.imshow(features @ features.T, cmap="magma", vmin=0, vmax=1)
        names = [task.extra["modules"][k] for k in chosen]
        axis.set_yticks(middles, names, fontsize=9)
        axis.set_xticks(middles, names, fontsize=9, rotation=45, ha="right")
        axis.set_title(run.title)
    label = "cosine of the features (negative values shown as 0)"
    figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    figure.suptitle(
        f"Test documents of the {len(chosen)} modules with the most documents, up to {each} each; "
        "ideal: bright blocks on the diagonal only"
    )
    return figure


if __name__ == "__main__":
    from examples import documents

    common.main({"documents": documents})
