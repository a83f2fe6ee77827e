"""Figures of a classifier: those of scikit-learn; and the page that shows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from odtk.data.records import Image
from odtk.evaluation.classification import measure, table_lines
from odtk.evaluation.classification_page import Answers, classification_page


def answers(generator: np.random.Generator, images: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores [n, K] and the classes by falling score."""
    scores = generator.random((images, classes))
    return scores, np.argsort(-scores, axis=1)


@pytest.mark.parametrize(("images", "classes"), [(300, 12), (40, 3), (5, 9)])
def test_every_figure_is_that_of_scikit_learn(images: int, classes: int) -> None:
    """The last class has no image, and the second is never answered, nor is it where there are five images only."""
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed (pip install 'odtk[dev]')")
    generator = np.random.default_rng(images)
    labels = generator.integers(0, classes - 1, images)
    scores, _ = answers(generator, images, classes)
    scores[np.arange(images), labels] += 0.3
    scores[:, 1] -= 2
    by_score = np.argsort(-scores, axis=1)
    first = by_score[:, 0]
    found = measure(labels, by_score[:, :5], [str(k) for k in range(classes)])

    assert found.top1 == pytest.approx(metrics.accuracy_score(labels, first), abs=1e-12)
    if classes > 5:
        assert found.top5 == pytest.approx(metrics.top_k_accuracy_score(labels, scores, k=5, labels=range(classes)))
    else:
        assert found.top5 is None
    every = metrics.precision_recall_fscore_support(labels, first, labels=range(classes), zero_division=0)
    ours = [(c.precision, c.recall, c.f1, c.support) for c in found.classes]
    np.testing.assert_allclose(np.array(ours).T, np.array(every), atol=1e-12)
    means = metrics.precision_recall_fscore_support(labels, first, average="macro", zero_division=0)[:3]
    np.testing.assert_allclose((found.precision, found.recall, found.f1), means, atol=1e-12)
    np.testing.assert_array_equal(found.confusion, metrics.confusion_matrix(labels, first, labels=range(classes)))


def test_the_figures_of_a_small_set() -> None:
    found = measure(np.array([0, 0, 0, 1]), np.array([[0], [0], [1], [1]]), ["cat", "dog", "never"])
    assert (found.top1, found.top5) == (0.75, None)
    assert [(c.precision, c.recall, c.support, c.answers) for c in found.classes] == [
        (1.0, 2 / 3, 3, 2),
        (0.5, 1.0, 1, 2),
        (0.0, 0.0, 0, 0),
    ]
    assert found.confusion.tolist() == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert found.precision == 0.75, "a class that does not occur is in no mean"
    assert found.line() == "top-1 0.750  F1 0.733  (cat 0.800, dog 0.667)"
    assert "F1/never" not in found.values() and found.values()["F1/cat"] == pytest.approx(0.8)
    assert table_lines(found)[-1].split() == ["mean", "0.750", "0.833", "0.733", "4"]
    assert measure(np.zeros(0, int), np.zeros((0, 2), int), ["a", "b"]).top1 == -1, "nothing was measured"


def test_the_page_shows_mistakes_and_takes_names_as_text(tmp_path: Path) -> None:
    names = ["<b>cat</b>", "dog"]
    images = []
    for i in range(3):
        PILImage.new("RGB", (20, 10), (200, 30 * i, 0)).save(tmp_path / f"<i>{i}.png")
        images.append(Image(i + 1, tmp_path / f"<i>{i}.png", 20, 10, np.zeros((0, 4)), np.zeros(0, int)))
    labels, said = np.array([0, 1, 0]), np.array([[0, 1], [0, 1], [1, 0]])
    scores = np.array([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]])
    page = classification_page(measure(labels, said, names), Answers(images, labels, said, scores), "w.pth on <script>")
    assert "<b>cat" not in page and "<script>" not in page and "<i>0" not in page
    assert page.count("data:image/jpeg") == 2 and "top-1 0.333" in page
    first, second = page.index("answered dog 0.80"), page.index("answered &lt;b&gt;cat&lt;/b&gt; 0.60")
    assert first < second, "the surest mistake first"
    right = classification_page(
        measure(labels[:1], said[:1], names), Answers(images[:1], labels[:1], said[:1], scores[:1]), ""
    )
    assert "Every answer is right." in right
