import re
from html.parser import HTMLParser

import numpy as np
import pytest

from hub_scripts.evaluation.finetune_plots import accuracy_curves
from hub_scripts.evaluation.learning_curves import LearningCurve
from hub_scripts.evaluation.plots import (
    accuracy_against_distance,
    accuracy_histogram,
    embedding_map,
    filter_rows,
    predicted_against_true,
    training_curves,
)
from hub_scripts.evaluation.report import Picture, Section, Table, format_value, write_report


class Page(HTMLParser):
    """Tags, attributes and text of a page; void tags do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.attributes, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def figure():
    accuracy = np.array([[[0.2, 0.4], [0.5, 0.7], [0.8, 0.9]]])
    return accuracy_curves({"generated": LearningCurve(np.arange(3), accuracy)}, steps_per_epoch=1)


@pytest.fixture
def report(tmp_path, figure):
    plot = tmp_path / "plot.png"
    figure.savefig(plot)
    table = Table(("property", "R² <test>"), [("epoch", 0.51249), ("gap", float("nan"))])
    sections = [Section("Is 1 < 2?", "first & foremost\n\nsecond", [Picture(plot, 'a "curve"')], [table])]
    results = {"probe": {"epoch": {"sane": {"r2": 0.25}}}, "versions": {"torch": "<2>"}, "finetune": [0.5, None]}
    path = tmp_path / "report.html"
    write_report(path, "A <report>", sections, results)
    return path.read_text(encoding="utf-8")


def test_a_report_needs_nothing_but_itself(report):
    page = Page(report)
    assert page.open == []
    links = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert len(links) == 1
    assert links[0].startswith("data:image/png;base64,iVBORw0KGgo")  # base64 of PNG's first bytes
    assert not re.search(r"https?:|<script|<link|@import|url\(", report)


def test_a_report_escapes_what_it_is_given(report):
    page = Page(report)
    assert ("img", "alt", 'a "curve"') in page.attributes
    for text in ("A <report>", "Is 1 < 2?", "first & foremost", "second", "R² <test>", "<2>"):
        assert text in page.texts


def test_a_report_lists_nested_figures_by_their_path(report):
    texts = [text for text in Page(report).texts if text.strip()]
    assert texts[texts.index("probe.epoch.sane.r2") + 1] == "0.250"
    assert texts[texts.index("finetune") + 1] == "0.500, n/a"
    assert texts[texts.index("epoch") + 1] == "0.512"
    assert texts[texts.index("gap") + 1] == "n/a"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (128, "128"), (np.int64(1408), "1,408"), (1234567.8, "1,234,568"), (np.float32(0.5), "0.500"), (-0.25, "-0.250"),
        (0.00012345, "0.00012"), (0.0, "0"), (None, "n/a"), (True, "True"), ("name", "name"),
    ],
)  # fmt: skip
def test_values_are_written_for_readers(value, text):
    assert format_value(value) == text


def test_a_table_with_a_row_too_short_is_refused_and_leaves_no_file(tmp_path):
    table = Table(("a", "b", "c"), [(1, 2)])
    with pytest.raises(ValueError, match="2 cells, expected 3: a, b, c"):
        write_report(tmp_path / "report.html", "t", [Section("s", tables=[table])])
    assert list(tmp_path.iterdir()) == []


def test_training_curves_leave_out_what_was_not_logged():
    log = [
        {"step": 5, "loss": 0.9, "loss_contrastive": None, "r2": 0.1, "seconds": 3.0},
        {"step": 9, "loss": 0.4, "loss_contrastive": None, "r2": 0.6, "seconds": 7.0},
    ]
    losses, validation = training_curves(log).axes
    assert [line.get_label() for line in losses.lines] == ["total"]
    np.testing.assert_array_equal(losses.lines[0].get_xydata(), [[5, 0.9], [9, 0.4]])
    np.testing.assert_array_equal(validation.lines[0].get_xydata(), [[5, 0.1], [9, 0.6]])


def test_embeddings_are_coloured_by_accuracy_and_by_epoch():
    features = np.random.default_rng(0).normal(size=(7, 5))
    accuracy, epoch = np.linspace(0.1, 0.9, 7), np.arange(7)
    by_accuracy, by_epoch = embedding_map(features, accuracy, epoch).axes[:2]
    np.testing.assert_array_equal(by_accuracy.collections[0].get_array(), accuracy)
    np.testing.assert_array_equal(by_epoch.collections[0].get_array(), epoch)
    np.testing.assert_array_equal(by_accuracy.collections[0].get_offsets(), by_epoch.collections[0].get_offsets())


def test_predictions_carry_r2_in_their_titles():
    true = np.array([0.0, 1.0, 2.0])
    figure = predicted_against_true(true, {"sane": true, "weights": np.array([1.0, 1.0, 1.0])}, "epoch")
    assert [axes.get_title() for axes in figure.axes] == ["SANE: R² = 1.00", "raw weights W: R² = 0.00"]
    assert figure.axes[0].get_xlabel() == "true epoch"


def test_a_histogram_row_names_mean_and_number_of_the_finite_networks():
    figure = accuracy_histogram({"joint": np.array([0.25, 0.75, np.nan]), "my_method": np.array([])})
    assert [axes.get_ylabel() for axes in figure.axes] == ["SANE, joint\nmean 0.500, n = 2", "my method\nnone, n = 0"]
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == pytest.approx(1)


def test_the_mean_of_each_method_stands_in_the_legend():
    figure = accuracy_against_distance(
        {"noise": (np.array([1.0, 3.0]), np.array([0.5, 0.7])), "anchors": ([0.0], [0.9])}
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["anchors + noise", "anchors"]
    np.testing.assert_allclose(figure.axes[0].collections[1].get_offsets(), [[2.0, 0.6]])


def test_finetuning_curves_are_means_over_networks(figure):
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), [[0, 0.3], [1, 0.6], [2, 0.85]])
    assert figure.legends[0].get_texts()[0].get_text() == "generated by SANE (n = 2)"


def test_filters_share_one_scale():
    originals = np.arange(18.0).reshape(2, 3, 3)
    figure = filter_rows(originals, -2 * originals)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 4
    assert {image.get_clim() for image in images} == {(-34.0, 34.0)}
    np.testing.assert_array_equal(images[3].get_array(), -2 * originals[1])
