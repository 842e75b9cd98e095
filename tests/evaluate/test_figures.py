import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from jaxadv.evaluate import figures
from jaxadv.evaluate.figures import Axis, Bar, Curve

SVG = "{http://www.w3.org/2000/svg}"


def test_an_axis_maps_ends_to_ends():
    up = Axis(0.0, 1.0, 236.0, 22.0)
    assert [up.at(v) for v in (0.0, 0.25, 0.5, 1.0)] == [236.0, 182.5, 129.0, 22.0]
    assert Axis(2.0, 2.0, 5.0, 9.0).at(2.0) == 5.0


@pytest.mark.parametrize(
    ("low", "high", "most", "want"),
    [
        (0, 1, 6, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 0.3, 6, [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]),
        (0, 8 / 255, 6, [0, 0.01, 0.02, 0.03]),
        (0, 137, 4, [0, 50, 100]),
        (-1, 1, 4, [-1, -0.5, 0, 0.5, 1]),
        (3, 3, 4, [3]),
    ],
)
def test_ticks_are_round_numbers_within_the_ends(low, high, most, want):
    assert figures.ticks(low, high, most) == pytest.approx(want)


def test_bars_stand_at_their_heights_with_their_error_bars():
    bars = [Bar(9, "clean", 0.75, (0.5, 1.0)), Bar(0, "robust", 0.25, (0.0, 0.5))]
    root = ET.fromstring(figures.bars("title & more", [("net", bars)], 520, 280))
    up = Axis(0.0, 1.0, 236.0, 22.0)  # golden: height 280 less 44 below, 22 above
    rects = root.findall(f"{SVG}rect")
    assert [float(r.get("y")) for r in rects] == [up.at(0.75), up.at(0.25)] == [75.5, 182.5]
    assert [float(r.get("height")) for r in rects] == [160.5, 53.5]
    assert [r.get("class") for r in rects] == ["bar s9", "bar s0"]
    stems = [e for e in root.findall(f"{SVG}line") if e.get("class") == "error" and e.get("x1") == e.get("x2")]
    assert [(float(e.get("y1")), float(e.get("y2"))) for e in stems] == [(129.0, 22.0), (236.0, 129.0)]
    assert root.get("aria-label") == root.find(f"{SVG}title").text == "title & more"
    assert {"75.0%", "25.0%", "net"} <= {t.text for t in root.findall(f"{SVG}text")}


def test_curves_run_through_their_points_inside_their_bands():
    line = Curve("net", (0.0, 0.1, 0.2), (1.0, 0.5, 0.25), ((0.9, 1.0), (0.4, 0.6), (0.2, 0.3)))
    root = ET.fromstring(figures.curves("curve", [line], "eps", 520, 280))
    across, up = Axis(0.0, 0.2, 58.0, 498.0), Axis(0.0, 1.0, 236.0, 22.0)
    points = [tuple(map(float, p.split(","))) for p in root.find(f"{SVG}polyline").get("points").split()]
    assert points == [(58.0, 22.0), (278.0, 129.0), (498.0, 182.5)]
    assert points == [(across.at(x), up.at(y)) for x, y in zip(line.x, line.y)]
    band = [tuple(map(float, p.split(","))) for p in root.find(f"{SVG}polygon").get("points").split()]
    assert band[:3] == [(across.at(x), up.at(h)) for x, (_, h) in zip(line.x, line.intervals)]
    assert band[3:][::-1] == [(across.at(x), up.at(low)) for x, (low, _) in zip(line.x, line.intervals)]
    assert "eps" in {t.text for t in root.findall(f"{SVG}text")}


def test_counts_agree_with_numpy_and_the_edge_stays_inside():
    sizes = np.random.default_rng(0).uniform(0, 0.1, 500).tolist()
    want = np.histogram(sizes, bins=20, range=(0, 0.1))[0]
    np.testing.assert_array_equal(figures.count(sizes, 0.1, 20), want)
    assert figures.count([0.1 + 6e-8, 0.1, 0.0], 0.1, 20) == [1] + [0] * 18 + [2]
    assert figures.count([0.025 + 1e-9], 0.1, 4) == [1, 0, 0, 0]  # a rounding above an edge stays below it


def test_a_histogram_draws_its_counts():
    root = ET.fromstring(figures.histogram("sizes", [0.05, 0.1, 0.1], 0.1, "size", series=2, bins=2))
    rects = root.findall(f"{SVG}rect")
    heights = [float(r.get("height")) for r in rects]
    assert [r.get("class") for r in rects] == ["bar s2"] * 2 and heights[1] == pytest.approx(2 * heights[0])
    assert re.fullmatch(r"1 between 0 and 0\.05", rects[0].find(f"{SVG}title").text)
