import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from jaxadv.evaluate import figures, html, markdown, report

VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Checks that tags nest, and collects attributes, text and the embedded JSON."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.data = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.data += data
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


@pytest.fixture(scope="module")
def page(pictures):
    return Page(html.render(pictures))


def test_the_page_holds_every_number_of_the_json(page, pictures):
    assert json.loads(page.data) == json.loads(pictures.to_json())


def test_readers_see_the_numbers(page, pictures):
    for model in pictures.models:
        assert model.name in page.text
        for value in (model.clean_accuracy, model.robust_accuracy):
            assert f"{100 * value:.2f} %" in page.text
        for low, high in (model.clean_interval, model.robust_interval):
            assert f"[{100 * low:.2f}, {100 * high:.2f}]" in page.text
        for attack in model.attacks:
            assert attack["name"] in page.text and f"{attack['queries']:,}" in page.text
        for point in model.curve:
            assert f"{100 * point['robust_accuracy']:.2f} %" in page.text
        for flag in model.flags:
            assert flag.words in page.text and flag.remedy in page.text and flag.detail in page.text
        for sentence in model.statements:
            assert sentence in page.text
    for value in (*pictures.versions.values(), pictures.data["fingerprint"], "8/255"):
        assert value in page.text


def test_the_page_needs_nothing_from_elsewhere(page, pictures):
    text = html.render(pictures)
    assert len(text.encode()) < 2_000_000
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"] * text.count("<svg")
    for _, attrs in page.tags:
        assert not {"href", "srcset", "onload", "onclick"} & set(attrs)
        assert attrs.get("src", "data:").startswith("data:")
    assert "@import" not in text and "url(" not in text
    scripts = [a for t, a in page.tags if t == "script"]
    assert [s["type"] for s in scripts] == ["application/json"]


def test_pictures_and_figures_have_words_for_those_who_do_not_see_them(page):
    images = [a for t, a in page.tags if t == "img"]
    assert images and all(len(a["alt"]) > 10 for a in images)
    drawn = [a for t, a in page.tags if t == "svg"]
    assert len(drawn) == 6 and all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in drawn)
    assert ("html", {"lang": "en"}) in page.tags and "prefers-color-scheme: dark" in html._STYLE


def decoded(address):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))))


def test_the_wall_shows_clean_adversarial_and_magnified_difference(page, pictures):
    images = [a for t, a in page.tags if t == "img"]
    first = {m.name: [i for i, b in enumerate(m.examples["by"]) if b >= 0] for m in pictures.models}
    both = [i for i in first["plain"] if i in first["twin"]]
    model = pictures.models[0]
    row = min(both or first["plain"], key=lambda i: model.examples["size"][i])  # the closest call
    clean, moved = pictures.x[row, ..., 0], model.x_adv[row, ..., 0]
    np.testing.assert_allclose(decoded(images[0]["src"]), 255 * clean, atol=0.51)
    np.testing.assert_allclose(decoded(images[1]["src"]), 255 * moved, atol=0.51)
    gain = float(re.search(r"magnified ([\d.]+) times", images[2]["alt"]).group(1))
    want = 255 * (0.5 + gain * (moved.astype(float) - clean))
    np.testing.assert_allclose(decoded(images[2]["src"]), want, atol=1.5)
    assert f"label {model.examples['label'][row]}" in images[0]["alt"]
    assert f"predicted {model.examples['adversarial'][row]}" in images[1]["alt"]


def test_a_png_keeps_pixels_and_shrinks_large_images():
    rng = np.random.default_rng(0)
    image = rng.uniform(-0.2, 1.2, (7, 9, 3))
    np.testing.assert_array_equal(decoded(html.png(image)), np.round(255 * image.clip(0, 1)))
    assert decoded(html.png(rng.uniform(size=(300, 200, 1)))).shape == (96, 64)


def test_names_cannot_break_the_page(pictures):
    name = '</script><b>"x" & | y'
    models = [dataclasses.replace(pictures.models[0], name=name)]
    timing = {"models": [pictures.timing["models"][0] | {"name": name}]}
    text = html.render(dataclasses.replace(pictures, models=models, timing=timing))
    page = Page(text)
    assert json.loads(page.data)["models"][0]["name"] == name and name in page.text
    assert "\\|" in markdown.render(dataclasses.replace(pictures, models=models))


def test_reports_without_pictures_or_broken_examples_say_so(pictures):
    flat = dataclasses.replace(pictures, x=pictures.x.reshape(30, -1))
    assert "No pictures" in Page(html.render(flat)).text
    model = pictures.models[0]
    columns = model.examples | {"by": [-1] * 30, "size": [None] * 30}
    unbroken = dataclasses.replace(model, examples=columns, robust_accuracy=1.0, robust_interval=(0.9, 1.0), curve=[])
    page = Page(html.render(dataclasses.replace(pictures, models=[unbroken])))
    assert "no sizes to show" in page.text and "no example was broken" in page.text


def test_a_large_report_stays_below_two_megabytes(pictures):
    n = 30_000
    model = pictures.models[0]
    columns = {c: (v * (n // 30 + 1))[:n] for c, v in model.examples.items()}
    columns["index"] = list(range(n))
    x = np.broadcast_to(np.random.default_rng(0).uniform(size=(1, 96, 96, 3)).astype(np.float32), (n, 96, 96, 3))
    large = [dataclasses.replace(model, name=str(i), n=n, examples=columns, x_adv=x) for i in range(2)]
    text = html.render(dataclasses.replace(pictures, models=large, x=x))
    assert len(text.encode()) < 2_000_000
    assert json.loads(Page(text).data)["models"][0]["examples"].startswith("left out")
    assert text.count("<img") >= 6


def test_markdown_holds_the_numbers_in_tables(pictures):
    text = markdown.render(pictures)
    for model in pictures.models:
        row = next(line for line in text.splitlines() if line.startswith(f"| {model.name} |"))
        assert markdown.percent(model.robust_accuracy) in row and markdown.interval(model.clean_interval) in row
        for attack in model.attacks:
            assert any(line.startswith(f"| {attack['name']} | {attack['restarts']} |") for line in text.splitlines())
        for flag in model.flags:
            assert f"`{flag.name}`" in text
    widths = {}
    for line in text.splitlines():
        if line.startswith("|"):
            widths.setdefault(line.count("|"), []).append(line)
    assert all(len(rows) >= 3 for rows in widths.values())
    assert "noise (test), 30 examples of shape 5 x 4 x 1, 3 classes" in text
    assert "L∞, eps 0.03137 (8/255), values in [0, 1]" in text


def test_words_for_threats_and_numbers():
    assert markdown.threat_words({"norm": "l2", "eps": 0.5, "bounds": [-1.0, 1.0]}) == "L2, eps 0.5, values in [-1, 1]"
    each = markdown.threat_words({"norm": "linf", "eps": [0.1, 0.3], "bounds": [[0.0], [1.0]]})
    assert each == "L∞, eps 0.1 to 0.3 (one for each example), values in bounds of their own"
    assert (markdown.percent(2 / 3), markdown.interval((0, 1))) == ("66.67 %", "[0.00, 100.00]")
    data = {"name": "", "split": "", "n": 2, "shape": [3], "classes": 2}
    assert markdown.data_words(data) == "unnamed data, 2 examples of shape 3, 2 classes"


def test_carried_examples_are_told(pictures):
    model = pictures.models[0]
    carried = next(c["carried"] for c in model.curve if c["eps"] == model.threat["eps"])
    assert markdown.carried_words(model).startswith(f"{carried} examples") and carried > 0
    assert markdown.carried_words(dataclasses.replace(model, curve=[])) == ""


def test_the_report_is_what_the_pages_read(pictures):
    again = report.from_json(pictures.to_json())
    assert markdown.render(again) == markdown.render(pictures)
    assert isinstance(figures.WIDTH, int)


def test_the_confusion_under_attack_counts_every_example(page, pictures):
    for model in pictures.models:
        table = markdown.confusion(model.examples, 3)
        want = np.zeros((3, 4), int)
        for label, said in zip(model.examples["label"], model.examples["adversarial"]):
            want[label, said] += 1  # -1 is the last column: not finite
        np.testing.assert_array_equal(table, want)
        assert sum(map(sum, table)) == 30
    assert "Confusion under attack" in page.text
    many = dataclasses.replace(pictures, data=pictures.data | {"classes": 21})
    assert "Not shown for 21 classes" in Page(html.render(many)).text


def test_robust_accuracy_from_sizes_meets_both_ends(pictures):
    for model in pictures.models:
        eps = model.threat["eps"]
        curve = markdown.size_curve(model.examples, eps)
        assert curve[0] == (0.0, model.clean_accuracy) and curve[-1][0] == eps
        assert curve[-1][1] == pytest.approx(model.robust_accuracy)
        shares = [share for _, share in curve]
        assert shares == sorted(shares, reverse=True)
        at, share = curve[8]
        sizes = [s for s, by in zip(model.examples["size"], model.examples["by"]) if by != -1]
        assert share == pytest.approx(1 - np.mean([s <= at for s in sizes]) * len(sizes) / 30)


def test_models_are_compared_on_the_same_examples(page, pictures):
    (row,) = markdown.compared(pictures.models)
    held = [np.asarray(m.examples["by"]) == -1 for m in pictures.models]
    counts = [int((held[0] & held[1]).sum()), int((held[0] & ~held[1]).sum()), int((~held[0] & held[1]).sum())]
    assert row[:2] == ["plain", "twin"] and [int(v) for v in row[2:5]] == counts
    for word in (*markdown.COMPARED, row[5]):
        assert word in page.text and word in markdown.render(pictures)
    alone = dataclasses.replace(pictures, models=pictures.models[:1])
    assert "McNemar" not in html.render(alone) and "McNemar" not in markdown.render(alone)


def test_certified_accuracy_stands_beside_the_upper_bound(pictures):
    model = pictures.models[0]
    by = list(model.examples["by"])
    covered = [i for i, b in enumerate(by) if b == -1][:4]
    for i in covered:
        by[i] = report.CERTIFIED
    sure = dataclasses.replace(
        model,
        examples=model.examples | {"by": by},
        certified_accuracy=len(covered) / 30,
        certified_interval=(0.03, 0.4),
    )
    both = dataclasses.replace(pictures, models=[sure, pictures.models[1]])
    assert report.from_json(both.to_json()) == both
    text, marked = Page(html.render(both)).text, markdown.render(both)
    for words in (*markdown.certified_words(sure), "ertified accuracy"):
        assert words in text and words in marked
    assert "ertified accuracy" not in Page(html.render(pictures)).text.split("How to read this")[0]
    with pytest.raises(ValueError, match="must add up"):
        report.from_dict(
            dataclasses.replace(both, models=[dataclasses.replace(sure, certified_accuracy=0.2)]).to_dict()
        )


def test_the_cost_is_told(page, pictures):
    model = pictures.models[0]
    grads = sum(a["grads"] for a in model.attacks)
    assert (
        f"{grads:,} of them with a gradient" in markdown.spent_words(model) and markdown.spent_words(model) in page.text
    )
    assert markdown.search_words(model) == f"{model.search['slots']} slots, attacks in float32."
    many = dataclasses.replace(model, search={"slots": 9, "devices": 8, "dtype": "bfloat16", "retried": 3})
    words = "9 slots on each of 8 devices, attacks in bfloat16; 3 runs were repeated in float32."
    assert markdown.search_words(many) == words
    cost = {"t_grad": 0.00123, "t_fwd": 0.0005, "attacks": [{"name": "fgsm", "overhead": 1.25}]}
    timing = {"models": [pictures.timing["models"][0] | {"cost": cost}]}
    text = Page(html.render(dataclasses.replace(pictures, models=[model], timing=timing))).text
    assert "0.00123, 0.0005" in text and "1.25" in text
