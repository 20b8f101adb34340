"""Pictures of a comparison: names that lie on nothing, the front, colours to tell apart."""

import copy
import math
import re
from functools import cache
from itertools import combinations

import numpy as np
import pytest

from benchmarks.common.files import ROOT
from benchmarks.experiments import labels, pictures
from benchmarks.experiments.colors import COLORS, OTHERS, method_colors
from benchmarks.experiments.plan import Plan, read_rows
from benchmarks.experiments.summary import summarise

PLANS = {plan.name: plan for plan in Plan.stored()}


@cache
def every_record(name):
    return summarise(PLANS[name], read_rows(PLANS[name].results_path))


def records_of(name, protocol=None):
    records = copy.deepcopy(every_record(name))
    return [r for r in records if protocol in (None, r["protocol"])]


def extents(figure):
    """The names in the picture, with the pixels that their text covers, less the lines to them."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    return [(t.get_text(), Text.get_window_extent(t)) for t in figure.axes[0].texts]


@pytest.mark.parametrize("protocol", ["tuned", None])
@pytest.mark.parametrize("name", PLANS)
def test_no_name_lies_on_another_or_on_a_point(name, protocol):
    records = records_of(name, protocol)
    figure = pictures.memory_figure(PLANS[name], records)
    names = extents(figure)
    shown = [r for r in records if math.isfinite(r["perplexity"] + r["bytes_60m"])]
    assert len(names) == len(shown) and len(records) > 0
    for (a, box), (b, other) in combinations(names, 2):
        assert not box.overlaps(other), (a, b)
    axes = figure.axes[0]
    points = axes.transData.transform([(r["bytes_60m"] / 1e6, r["perplexity"]) for r in shown])
    for text, box in names:
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1, text
        assert axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1, text
        assert not any(box.contains(*point) for point in points), text


def test_the_front_is_what_no_other_beats():
    points = [(100.0, 9.0), (100.3, 8.0), (99.8, 8.5), (150.0, 8.0), (200.0, 5.0), (150.0, 7.0)]
    assert pictures.pareto_front(points) == [1, 5, 4]
    assert pictures.pareto_front([]) == []


def test_the_names_of_the_front_are_bold():
    records = records_of("nano", "tuned")
    figure = pictures.memory_figure(PLANS["nano"], records)
    bold = {t.get_text() for t in figure.axes[0].texts if t.get_weight() == "bold"}
    beaten = {
        r["label"]
        for r in records
        for o in records
        if round(o["bytes_60m"] / 1e6) <= round(r["bytes_60m"] / 1e6)
        and o["perplexity"] < r["perplexity"]
    }
    assert bold == {r["label"] for r in records} - beaten and len(bold) >= 2


def test_the_committed_picture_has_the_methods_and_the_bold_names():
    text = (ROOT / "docs" / "memory.svg").read_text(encoding="utf-8")
    records = records_of("nano", "tuned")
    figure = pictures.memory_figure(PLANS["nano"], records)
    drawn = {t.get_text(): t.get_weight() == "bold" for t in figure.axes[0].texts}
    named = re.findall(r'<text style="([^"]*)[^>]*>([^<]+)</text>', text)
    fonts = {name: style for style, name in named if name in drawn}
    assert {name: "bold" in style or "700" in style for name, style in fonts.items()} == drawn


def test_a_diverged_run_is_not_drawn():
    records = records_of("nano", "tuned")
    records[0]["perplexity"] = math.inf
    assert len(extents(pictures.memory_figure(PLANS["nano"], records))) == len(records) - 1
    for record in records:
        record["perplexity"] = math.nan
    assert pictures.saved(pictures.memory_figure(PLANS["nano"], records)).startswith(b"\x89PNG")


def test_names_of_one_point_are_set_apart():
    points, sizes = np.full((6, 2), 100.0), np.full((6, 2), (60.0, 10.0))
    frame, lines = np.array([0.0, 0.0, 200.0, 200.0]), np.zeros((0, 4))
    boxes = labels.place(sizes, points, 4.0, lines, frame)
    assert not (labels.overlaps(boxes, boxes) - np.diag([600.0] * 6)).any()
    assert not labels.overlaps(boxes, np.array([[96.0, 96.0, 104.0, 104.0]])).any()
    assert (boxes >= 0).all() and (boxes <= 200).all()


def test_lines_stay_free_where_there_is_room():
    line = np.array([[100.0, 90.0, 200.0, 110.0]])
    frame = np.array([0.0, 0.0, 200.0, 200.0])
    for lines, right in ((np.zeros((0, 4)), True), (line, False)):
        box = labels.place(np.array([[50.0, 10.0]]), np.full((1, 2), 100.0), 4.0, lines, frame)
        assert (box[0, 0] > 100) == right and not labels.overlaps(box, lines).any()


def oklab(color):
    """A colour in OKLab, by Ottosson's matrices."""
    c = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    rgb = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    lms = rgb @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    return np.cbrt(lms) @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )


def test_colours_can_be_told_apart():
    def distance(a, b):
        return np.linalg.norm(oklab(a) - oklab(b))

    for a, b in combinations([*COLORS.values(), *OTHERS], 2):
        assert distance(a, b) > 0.08, (a, b)
    for a, b in combinations([COLORS[m] for m in ("scale", "scale_spectral", "muon")], 2):
        assert distance(a, b) > 0.2
    assert abs(distance("#000000", "#ffffff") - 1) < 1e-3


def test_every_method_of_a_plan_has_a_colour_of_its_own():
    assert COLORS.keys() >= PLANS["nano"].methods.keys()
    for plan in PLANS.values():
        colors = method_colors(plan.methods)
        assert len(set(colors.values())) == len(colors) == len(plan.methods)
    colors = method_colors(["muon", "mine", "scale"])
    assert colors == {"muon": COLORS["muon"], "mine": OTHERS[0], "scale": COLORS["scale"]}
    assert len(method_colors(map(str, range(50)))) == 50
