"""Figures: complete, legible, unclipped, byte-stable, and drawn without pyplot."""

import io
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from merge_lab import figures as shared
from merge_lab import viz
from merge_lab.merger import Merger
from merge_lab.merger_config import MergerConfig
from merge_lab.tinylm import save_tiny, tiny_experts, tiny_tokenizer

long_names = [
    "an expert with quite a long name",
    "another expert, longer still in name",
    "c",
]


def alphas(n_layers=4, n_components=2, signed=False):
    random = np.random.default_rng(0)
    kinds = ["input_layernorm", "q_proj", "k_proj", "down_proj"]
    modules = [("embed_tokens", None)]
    modules += [(kind, layer) for layer in range(n_layers) for kind in kinds]
    modules += [("norm", None), ("lm_head", None)]
    rows = [
        dict(
            module=kind if layer is None else f"layers.{layer}.{kind}",
            layer=layer,
            kind=kind,
            parameter="weight",
            component=component,
            mean=random.uniform(-1 if signed else 0, 1),
            std=random.uniform(0, 0.2),
            min=random.uniform(0, 0.4),
            max=random.uniform(0.6, 1),
        )
        for kind, layer in modules
        for component in range(n_components)
    ]
    return pd.DataFrame(rows)


def history(steps=40, n=3):
    random = np.random.default_rng(1)
    frame = pd.DataFrame({"step": np.arange(1, steps + 1)})
    for i in range(n):
        frame[f"loss_source_{i}"] = random.uniform(0.01, 3, steps)
        frame.loc[frame.index % n != i, f"loss_source_{i}"] = np.nan
        frame[f"alpha_mean_{i}"] = random.uniform(0.3, 0.6, steps)
        frame[f"alpha_min_{i}"], frame[f"alpha_max_{i}"] = 0.1, 0.9
    frame["loss"] = random.uniform(0.01, 3, steps)
    return frame


def scores(value=None):
    random = np.random.default_rng(2)
    rows = [
        (model, task, random.random() if value is None else value, random.random() * 9)
        for model in long_names
        for task in ("rewrite", "summarize", "extract")
    ]
    return pd.DataFrame(rows, columns=["model", "task", "exact_match", "loss"])


def memory():
    parts = ["component 0", "component 1", "activations", "logits", "optimizer"]
    rows = [
        (name, part, i + 0.5) for name in long_names for i, part in enumerate(parts)
    ]
    return pd.DataFrame(rows, columns=["setup", "part", "GiB"]).set_index("setup")


def trials():
    random = np.random.default_rng(3)
    rows = [
        (group, f"setting {x}", x, random.random())
        for group in long_names
        for x in (1.0, 2.0, 5.0)
        for _ in range(3)
    ]
    return pd.DataFrame(rows, columns=["group", "label", "cost", "quality"])


def square(count):
    return pd.DataFrame(np.random.default_rng(4).random((count, count)))


coefficients = pd.DataFrame({"component": [0, 0, 1, 1], "alpha": [0.1, 0.4, 0.9, 0.6]})
confused = pd.DataFrame([[0.6, 0.3, 0.1]], index=["rewrite"], columns=long_names)
better = ("lower", "higher")

figures = {
    "alpha_heatmap": lambda: viz.alpha_heatmap(alphas(), names=long_names),
    "alpha_heatmap_wide": lambda: viz.alpha_heatmap(alphas(48, 5)),
    "alpha_heatmap_signed": lambda: viz.alpha_heatmap(alphas(signed=True), 1),
    "alpha_heatmap_std": lambda: viz.alpha_heatmap(alphas(), value="std"),
    "alpha_histogram": lambda: viz.alpha_histogram(coefficients, long_names),
    "alpha_trajectories": lambda: viz.alpha_trajectories(history(), long_names),
    "loss_curves": lambda: viz.loss_curves(history(), long_names),
    "task_matrix": lambda: viz.task_matrix(scores()),
    "task_matrix_loss": lambda: viz.task_matrix(scores(), "loss"),
    "task_matrix_flat": lambda: viz.task_matrix(scores(0.0)),
    "confusion_matrix": lambda: viz.confusion_matrix(confused),
    "memory_breakdown": lambda: viz.memory_breakdown(memory()),
    "pareto": lambda: viz.pareto(trials(), "cost", "quality", "group", better=better),
    "pareto_labels": lambda: viz.pareto(
        trials(), "cost", "quality", "group", "label", log_x=True
    ),
    "pareto_plain": lambda: viz.pareto(trials(), "cost", "quality"),
    "similarity_small": lambda: viz.similarity_heatmap(square(4), [(0, 1)]),
    "similarity_large": lambda: viz.similarity_heatmap(square(48)),
    "alpha_curve": lambda: viz.alpha_curve(torch.tanh),
    "alpha_curve_identity": lambda: viz.alpha_curve(lambda mask: mask * 1.0),
    "coefficient_map": lambda: viz.coefficient_map(pd.DataFrame(np.eye(3, 200))),
}


@pytest.mark.parametrize("name", figures)
def test_figure_is_whole(name):
    figure = figures[name]()
    assert isinstance(figure, Figure) and figure.get_suptitle()
    figure.draw_without_rendering()
    drawn, paper = figure.get_tightbbox(), figure.bbox_inches
    for side, sign in (("x0", 1), ("y0", 1), ("x1", -1), ("y1", -1)):
        over = sign * (getattr(paper, side) - getattr(drawn, side))
        assert over < 0.06, f"{over:.2f} in beyond {side}"
    titles = figure._suptitle.get_window_extent()
    assert titles.x1 <= figure.bbox.x1
    for axis in figure.axes:
        if axis.get_visible() and axis.get_label() != "<colorbar>":
            labelled = axis.get_xlabel() or axis.get_ylabel() or axis.get_title()
            assert labelled, "an axis without any label"


@pytest.mark.parametrize(
    "name",
    ["alpha_heatmap", "loss_curves", "task_matrix", "pareto", "memory_breakdown"],
)
def test_bytes_are_stable_and_dark_leaves_no_trace(name):
    figure = figures[name]()
    light = viz.figure_to_png(figure, 50)
    dark = viz.figure_to_png(figure, 50, dark=True)
    assert (
        viz.figure_to_png(figure, 50) == light == viz.figure_to_png(figures[name](), 50)
    )
    corners = [
        Image.open(io.BytesIO(png)).convert("RGB").getpixel((0, 0))
        for png in (light, dark)
    ]
    assert corners == [(255, 255, 255), (0x15, 0x18, 0x1C)]


def test_viz_leaves_pyplot_alone():
    code = (
        "import sys, merge_lab.viz; assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def deuteranope(colour):
    "How a person without green cones sees a colour (Machado et al. 2009), linear RGB."
    red, green, blue, _ = to_rgba(colour)
    linear = np.array([red, green, blue]) ** 2.2
    matrix = [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
    return np.array(matrix) @ linear


def test_colours_stay_apart_without_green_cones():
    seen = [deuteranope(colour) for colour in viz.PALETTE[:6]]
    gaps = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
    red_green = np.linalg.norm(deuteranope("#d62728") - deuteranope("#2ca02c"))
    assert min(gaps[:3]) > 0.2 and min(gaps) > 0.06, (sorted(gaps)[:3], red_green)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_alpha_heatmap_takes_what_a_merger_gives(architecture, tmp_path):
    paths = []
    for i, expert in enumerate(tiny_experts(architecture, n=2)):
        save_tiny(expert, tmp_path / str(i), tiny_tokenizer())
        paths.append(str(tmp_path / str(i)))
    config = MergerConfig(model_paths=paths, mode="vector_input")
    table = Merger.from_config(config).alphas()
    grid = viz.layer_grid(table[table["component"] == 0])
    layers = [row for row in grid.index if isinstance(row, int)]
    assert layers == [0, 1]
    first = list(grid.index).index(0)
    assert any("emb" in str(row) or "wte" in str(row) for row in grid.index[:first])
    assert any("norm" in str(row) or "ln_f" in str(row) for row in grid.index[first:])
    inside = table[(table["component"] == 0) & (table["layer"] == 1)]
    shown = grid.loc[1].dropna()
    assert len(shown) == len(inside)
    assert np.isclose(sorted(shown), sorted(inside["mean"])).all()
    assert viz.figure_to_png(viz.alpha_heatmap(table), 40)


def test_dark_paper_lightens_the_first_line():
    png = viz.figure_to_png(figures["alpha_trajectories"](), 60, dark=True)
    image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)

    def nearest(colour):
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        return np.abs(image - wanted).max(-1).min()

    light, dark = viz.PALETTE[0], viz.DARK[viz.PALETTE[0].lower()]
    assert nearest(dark) < 12 < nearest(light)


def test_best_of_each_task_is_framed():
    frame = scores()
    for value, best in (("exact_match", "idxmax"), ("loss", "idxmin")):
        axis = viz.task_matrix(frame, value).axes[0]
        framed = {
            (round(p.get_x() + 0.46), round(p.get_y() + 0.42)) for p in axis.patches
        }
        wide = viz.wide_scores(frame, value)
        wanted = {
            (wide.columns.get_loc(task), wide.index.get_loc(model))
            for task, model in getattr(wide, best)().items()
        }
        assert framed == wanted


def test_smoothed_loss_ends_near_the_raw_mean():
    frame = pd.DataFrame({"step": range(400), "loss": 1.0})
    frame.loc[::2, "loss"] = 3.0
    raw, smooth = viz.loss_curves(frame).axes[0].get_lines()[:2]
    assert raw.get_ydata().tolist() == frame["loss"].tolist()
    assert abs(smooth.get_ydata()[-1] - 2.0) < 0.15


def test_missing_scores_are_left_empty():
    frame = scores().iloc[:-1]
    assert viz.figure_to_png(viz.task_matrix(frame, "loss"), 40)
    with pytest.raises(ValueError, match="no finite score"):
        viz.task_matrix(frame.assign(exact_match=np.nan))


def test_palette_keeps_every_colour_close():
    figure = figures["similarity_small"]()
    png = viz.figure_to_png(figure, 80)
    exact = io.BytesIO()
    options = dict(dpi=80, bbox_inches="tight", pad_inches=0.06)
    figure.savefig(exact, format="png", **options)
    pixels = [
        np.asarray(Image.open(file).convert("RGB")).astype(int)
        for file in (io.BytesIO(png), exact)
    ]
    assert np.abs(pixels[0] - pixels[1]).max() < 20
    assert len(png) < 0.6 * len(exact.getvalue()) and b"matplotlib" not in png.lower()


def test_what_figures_share_is_found_beside_the_pictures():
    assert set(shared.__all__) <= set(viz.__all__)
    assert all(getattr(viz, name) is getattr(shared, name) for name in shared.__all__)


def test_a_name_may_hold_dollars(tmp_path):
    "matplotlib takes what stands between two for a formula, and fails on what is none; numbers of an axis may be formulas."
    names = ["a$b_{c$", "$100", "\\$x^$"]
    for number, figure in enumerate((viz.loss_curves(history(), names), viz.alpha_trajectories(history(), names))):
        shared.save_figure(figure, tmp_path / f"{number}.png")
    figure, axes = shared.new_figure("$ is no ^ formula $")
    axes[0, 0].bar(names, [1, 10, 100])
    axes[0, 0].set_yscale("log")
    shared.save_figure(figure, tmp_path / "bars.png")
    assert [label.get_parse_math() for label in axes[0, 0].get_xticklabels()] == [False] * 3
    assert any("mathdefault" in label.get_text() and label.get_parse_math() for label in axes[0, 0].get_yticklabels())
