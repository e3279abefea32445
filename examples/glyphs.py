"""Many labels: which Unicode character does a small image show?

The networks are trained on the DejaVu fonts that matplotlib ships, and on other fonts of the system
if it has any. Lambda and alpha were chosen on DejaVu Serif Italic. The test uses STIX, a family of
another design that training never saw. One character in five is excluded from training: only the
features can tell whether two of its images show the same character.
"""

import unicodedata
from pathlib import Path

import keras
import matplotlib
import numpy as np
import tensorflow as tf
from fontTools.ttLib import TTFont, TTLibError
from matplotlib.figure import Figure
from matplotlib.font_manager import findSystemFonts
from PIL import Image, ImageDraw, ImageFont
from scipy.sparse.csgraph import connected_components

from examples import common
from examples.common import Run, Split, Task

SIZE, EM = 32, 22  # sizes of an image and of the font, in pixels
STYLES = ("", "-Bold", "-Oblique", "-BoldOblique")
TRAIN = [f"DejaVu{family}{style}" for family in ("Sans", "SansMono") for style in STYLES]
TRAIN += ["DejaVuSerif", "DejaVuSerif-Bold"]
VALIDATION = ["DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"]
TEST = ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"]
HELD_OUT = (
    "DejaVu",
    "STIX",
    "XITS",
    "Last Resort",
)  # training excludes system fonts of these families
MAX_SYSTEM_FONTS = 8

# ------------------------------------------------------------------------------------ images


def characters(path: str | Path) -> set[int]:
    """Returns the code points for which the font has a glyph."""
    with TTFont(path, lazy=True) as font:
        return set(font.getBestCmap() or ())


def drawable(code: int) -> bool:
    """Returns whether a character is visible alone: it is no mark, control code or space."""
    return unicodedata.category(chr(code))[0] not in "MCZ"


def render(path: str | Path, codes: list[int]) -> np.ndarray:
    """Returns images `[N, SIZE, SIZE]`, all on one baseline and horizontally centered."""
    font = ImageFont.truetype(str(path), EM)
    pictures = np.zeros((len(codes), SIZE, SIZE), np.uint8)
    for picture, code in zip(pictures, codes, strict=True):
        left, _, right, _ = font.getbbox(chr(code), anchor="ls")
        image = Image.new("L", (SIZE, SIZE))
        where = (SIZE - left - right) / 2, SIZE * 0.72
        ImageDraw.Draw(image).text(where, chr(code), font=font, fill=255, anchor="ls")
        picture[:] = image
    return pictures


def system_fonts(codes: list[int]) -> list[Path]:
    """Returns more fonts for training, one per family, fonts with the most of `codes` first."""
    found = {}
    for path in sorted(findSystemFonts())[:300]:
        try:
            with TTFont(path, lazy=True, fontNumber=0) as font:
                family = font["name"].getBestFamilyName() or ""
                outlines = "glyf" in font or "CFF " in font  # no bitmaps, no emoji
                has = len(set(font.getBestCmap() or ()).intersection(codes))
        except (TTLibError, OSError, KeyError):
            continue  # unreadable fonts are not used
        if outlines and has >= len(codes) // 5 and not family.startswith(HELD_OUT):
            found[family] = max(found.get(family, (0, "")), (has, path))
    return [Path(path) for _, path in sorted(found.values(), reverse=True)][:MAX_SYSTEM_FONTS]


def labels_of(pictures: np.ndarray) -> np.ndarray:
    """Returns a label for each character of `pictures` `[characters, fonts, SIZE, SIZE]`.

    Characters whose images are equal in half of the fonts or more (Latin A, Greek Alpha, Cyrillic
    A) cannot be distinguished and get the same label.
    """
    characters, fonts = pictures.shape[:2]
    alike = np.zeros((characters, characters), np.int32)
    for font in range(fonts):
        flat = pictures[:, font].reshape(characters, -1)
        _, group = np.unique(flat, axis=0, return_inverse=True)
        alike += group[:, None] == group
    return connected_components(2 * alike >= fonts, directed=False)[1]


def split(paths, label_of: dict[int, int]) -> Split:
    """Returns the distinct images of each label in these fonts."""
    pictures, labels = [], []
    for path in paths:
        has = characters(path)
        codes = [code for code in label_of if code in has]
        pictures.append(render(path, codes))
        labels.extend(label_of[code] for code in codes)
    pictures, labels = np.concatenate(pictures), np.array(labels)
    flat = pictures.reshape(len(labels), -1)
    # Some glyphs, such as a box, are equal in regular and bold. A pair of equal images tells
    # nothing about the network, so duplicates are removed.
    _, kept = np.unique(np.column_stack([flat, labels]), axis=0, return_index=True)
    kept = np.sort(kept[flat[kept].any(axis=1)])  # some fonts have empty glyphs
    return Split(pictures[kept, :, :, None], labels[kept])


def augment(images, seed):
    """Rotates, shears, scales, shifts and thickens each image a little."""

    def uniform(which, low, high):
        return tf.random.stateless_uniform(
            [tf.shape(images)[0]], (seed[0] + which, seed[1]), low, high
        )

    angle, scale = uniform(0, -0.12, 0.12), uniform(1, 0.85, 1.15)
    shear, stretch = uniform(2, -0.25, 0.25), uniform(3, 0.9, 1.1)
    a, b = tf.cos(angle) * scale, (shear - tf.sin(angle)) * scale
    c, d = tf.sin(angle) * scale, tf.cos(angle) * scale * stretch
    middle, zero = (SIZE - 1) / 2, tf.zeros_like(a)
    x = middle * (1 - a - b) + uniform(4, -2.0, 2.0)
    y = middle * (1 - c - d) + uniform(5, -1.5, 1.5)
    turned = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(images, tf.float32),
        transforms=tf.stack([a, b, x, c, d, y, zero, zero], axis=1),
        output_shape=[SIZE, SIZE],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    gamma = tf.exp(uniform(6, -0.5, 0.5))[:, None, None, None]
    return 255 * (turned / 255) ** gamma


# -------------------------------------------------------------------------------------- task


def network() -> keras.Model:
    """Returns a network with three convolutions and 128 features."""
    layers = [keras.Input([SIZE, SIZE, 1]), keras.layers.Rescaling(1 / 255)]
    for filters, stride in ((24, 2), (64, 1), (128, 1)):
        layers += [
            keras.layers.Conv2D(filters, 3, stride, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.MaxPool2D() if filters < 128 else keras.layers.Flatten(),
        ]
    layers += [keras.layers.Dense(128, use_bias=False)]
    return keras.Sequential(layers + [keras.layers.BatchNormalization(momentum=0.9)])


def load(seed: int, quick: bool) -> Task:
    """Renders the images and splits them."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    shipped, validation, test = (
        [folder / f"{name}.ttf" for name in names] for names in (TRAIN, VALIDATION, TEST)
    )
    codes = sorted(set.intersection(*map(characters, shipped)))
    codes = [code for code in codes if drawable(code)]
    pictures = np.stack([render(path, codes) for path in shipped], axis=1)
    labels = labels_of(pictures)
    _, first = np.unique(labels, return_index=True)
    codes = [codes[i] for i in first if pictures[i].any(axis=(1, 2)).all()]

    rng = np.random.default_rng(seed)
    rng.shuffle(codes)
    if quick:
        # The test fonts also have these letters and digits, so that few characters suffice.
        codes = [code for code in codes if code < 0x250][:150]
    cut = len(codes) * 4 // 5
    seen = {code: label for label, code in enumerate(sorted(codes[:cut]))}
    unseen = {code: label for label, code in enumerate(sorted(codes[cut:]))}
    system = [] if quick else system_fonts(list(seen))
    data = {"train": split(shipped + system, seen), "validation": split(validation, seen)}
    data |= {"test": split(test, seen), "unseen": split(test, unseen)}
    return Task(
        title="recognise characters in a font never seen",
        notes=[
            f"{len(data['train'].labels)} training images: {len(seen)} characters in "
            f"{len(shipped)} DejaVu fonts and {len(system)} other fonts of the system",
            f"validation: {len(data['validation'].labels)} images, DejaVu Serif Italic and Bold "
            f"Italic; test: {len(data['test'].labels)} images, the STIX family",
            f"labels never seen: {len(unseen)} further characters, "
            f"{len(data['unseen'].labels)} images, STIX",
            "verification: each pair of test images, same character or not",
        ],
        num_classes=len(seen),
        network=network,
        augment=augment,
        weight=0.003,
        alpha=0.5,
        epochs=2 if quick else 12,
        batch_size=64 if quick else 256,
        learning_rate=5e-3,
        fars=(1e-2, 1e-3, 1e-4),
        **data,
    )


def draw(task: Task, runs: list[Run]) -> dict[str, Figure]:
    """Draws the verification curves, and the nearest training images of test images."""
    return {
        "glyphs_verification.png": common.draw_verification(
            task, runs, f"Characters in a font never seen (STIX), {task.num_classes} labels trained"
        ),
        "glyphs_neighbours.png": draw_neighbours(task, runs),
    }


def draw_neighbours(task: Task, runs: list[Run], rows: int = 12, count: int = 6) -> Figure:
    """Draws the nearest training images of test images on which the two networks disagree."""
    found = [common.nearest(task, run, "test", count) for run in runs]
    right = [task.train.labels[near[:, 0]] == task.test.labels for near in found]
    disagree = np.flatnonzero(right[0] != right[1])
    chosen = np.sort(np.random.default_rng(0).permutation(disagree)[:rows])

    height = 0.6 * max(len(chosen), 1)
    figure = Figure(figsize=(9.6, height + 1.2))
    figure.suptitle(
        f"{len(chosen)} of the {len(disagree)} test images (STIX) on which the networks disagree, "
        f"drawn at random\nnearest image correct: softmax alone {right[0][disagree].sum()}, with "
        f"center loss {right[1][disagree].sum()}; framed: the same character",
        fontsize=11,
    )
    axes = figure.subplots(
        max(len(chosen), 1),
        2 * count + 3,
        squeeze=False,
        width_ratios=[1, 0.6] + [1] * count + [0.6] + [1] * count,
        gridspec_kw={"left": 0.01, "right": 0.99, "bottom": 0.01, "top": height / (height + 1.2)},
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for line, query in zip(axes, chosen, strict=False):
        line[0].imshow(255 - task.test.inputs[query, :, :, 0], cmap="gray", vmin=0, vmax=255)
        for run, neighbours, offset in zip(runs, found, (2, count + 3), strict=True):
            for axis, row in zip(line[offset:], neighbours[query], strict=False):
                axis.imshow(255 - task.train.inputs[row, :, :, 0], cmap="gray", vmin=0, vmax=255)
                if task.train.labels[row] == task.test.labels[query]:
                    axis.spines[:].set(visible=True, color=run.color, linewidth=2)
    axes[0][0].set_title("test", fontsize=10)
    for run, offset in zip(runs, (2, count + 3), strict=True):
        axes[0][offset].set_title(f"nearest: {run.title}", fontsize=10, loc="left", color=run.color)
    return figure


if __name__ == "__main__":
    from examples import glyphs

    common.main({"glyphs": glyphs})
