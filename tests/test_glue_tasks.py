"""GLUE's tasks and metrics: published facts, and cases computed by hand."""

import math

import pytest

from nlp_ext.glue.scores import score
from nlp_ext.glue.tasks import TASKS, get_task

# Sizes of the splits as the paper of GLUE and its dataset card give them: train, validation, test.
SIZES = {
    "cola": (8551, 1043, 1063),
    "mnli": (392702, 9815, 9832, 9796, 9847, 1104),  # the last: AX
    "mrpc": (3668, 408, 1725),
    "qnli": (104743, 5463, 5463),
    "qqp": (363846, 40430, 390965),
    "rte": (2490, 277, 3000),
    "sst2": (67349, 872, 1821),
    "stsb": (5749, 1500, 1379),
    "wnli": (635, 71, 146),
}


def test_all_nine():
    assert {name: tuple(task.sizes.values()) for name, task in TASKS.items()} == SIZES
    with pytest.raises(ValueError, match=r"unknown task 'sst-2'; allowed are cola, .*wnli; did you mean sst2"):
        get_task("sst-2")


@pytest.mark.parametrize(
    ("name", "example", "label", "source", "target"),
    [
        ("cola", {"sentence": "A b."}, 1, "cola sentence: A b.", "acceptable"),
        ("mnli", {"premise": "P", "hypothesis": "H"}, 2, "mnli hypothesis: H premise: P", "contradiction"),
        ("mrpc", {"sentence1": "x", "sentence2": "y"}, 0, "mrpc sentence1: x sentence2: y", "not_equivalent"),
        ("qnli", {"question": "q?", "sentence": "s"}, 0, "qnli question: q? sentence: s", "entailment"),
        ("qqp", {"question1": "a", "question2": "b"}, 1, "qqp question1: a question2: b", "duplicate"),
        ("rte", {"sentence1": "x", "sentence2": "y"}, 1, "rte sentence1: x sentence2: y", "not_entailment"),
        ("sst2", {"sentence": "good"}, 1, "sst2 sentence: good", "positive"),
        ("stsb", {"sentence1": "x", "sentence2": "y"}, 3.75, "stsb sentence1: x sentence2: y", "3.8"),
        ("wnli", {"sentence1": "x", "sentence2": "y"}, 1, "wnli sentence1: x sentence2: y", "entailment"),
    ],
)
def test_text_to_text(name, example, label, source, target):
    """As the examples in appendix D of the paper of T5 are written."""
    task = get_task(name)
    assert task.source({"idx": 0, **example}) == source and task.target(label) == target
    expected = 3.8 if name == "stsb" else label
    assert task.read(target) == task.read(f" {target}\n") == expected


@pytest.mark.parametrize(("score_", "text"), [(0, "0.0"), (5, "5.0"), (2.6, "2.6"), (2.69, "2.6"), (2.71, "2.8")])
def test_scores_are_rounded_to_a_fifth(score_, text):
    assert get_task("stsb").target(score_) == text


def test_what_is_no_label():
    assert get_task("rte").read("entailments") is None and get_task("rte").read("") is None
    assert [get_task("stsb").read(t) for t in ("5.2", "-1.0", "3", "3.8 ", "high", "nan")] == [
        None,
        None,
        3.0,
        3.8,
        None,
        None,
    ]
    with pytest.raises(ValueError, match=r"rte has the label 2; allowed are 0 \(entailment\), 1 \(not_entailment\)"):
        get_task("rte").target(2)
    with pytest.raises(ValueError, match=r"rte has the label -1; allowed"):
        get_task("rte").target(-1)  # what GLUE's test splits have
    with pytest.raises(ValueError, match=r"stsb has the score 5.5; it must lie in 0 .. 5"):
        get_task("stsb").target(5.5)


def test_metrics_by_hand():
    labels, predictions = [1, 1, 1, 0, 0, 1], [1, 0, 1, 1, 0, 1]  # 3 true positives, 1 false, 1 missed, 1 true negative
    assert score(get_task("sst2"), predictions, labels) == {"accuracy": pytest.approx(4 / 6), "invalid": 0}
    found = score(get_task("mrpc"), predictions, labels)
    assert found == {"f1": pytest.approx(2 * 3 / (2 * 3 + 1 + 1)), "accuracy": pytest.approx(4 / 6), "invalid": 0}
    matthews = (3 * 1 - 1 * 1) / math.sqrt((3 + 1) * (3 + 1) * (1 + 1) * (1 + 1))
    assert score(get_task("cola"), predictions, labels)["matthews"] == pytest.approx(matthews)
    # Deviations of the labels -2, -1, 0, 3, of the predictions -1.5, -.5, .5, 1.5; ranks differ by 0.
    found = score(get_task("stsb"), [1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 5.0])
    assert found["pearson"] == pytest.approx((3 + 0.5 + 0 + 4.5) / math.sqrt(14 * 5)) and found["spearman"] == 1.0


def test_invalid_predictions_are_wrong_and_counted():
    labels = [1, 1, 0, 0]
    found = score(get_task("mrpc"), [1, None, None, 0], labels)
    # The missed one counts as 0, the other as 1: one true positive, one false, one missed.
    assert found == {"f1": pytest.approx(2 / (2 + 1 + 1)), "accuracy": 0.5, "invalid": 2}
    assert score(get_task("mnli"), [None, 2], [0, 2]) == {"accuracy": 0.5, "invalid": 1}
    assert score(get_task("stsb"), [None, 4.0, 2.0], [0.0, 4.0, 2.0])["pearson"] == pytest.approx(1.0)
    # A class of its own in the general coefficient (Gorodkin 2004): as the other class it would be -1.
    assert score(get_task("cola"), [None, None], [1, 0])["matthews"] == 0
    assert 0 < score(get_task("cola"), [1, None, None, 0], [1, 1, 0, 0])["matthews"] < 1


def test_without_a_defined_correlation():
    assert score(get_task("stsb"), [2.0, 2.0], [1.0, 3.0]) == {"pearson": 0.0, "spearman": 0.0, "invalid": 0}
    with pytest.raises(ValueError, match="0 predictions for 0 labels"):
        score(get_task("rte"), [], [])
    with pytest.raises(ValueError, match="1 predictions for 2 labels"):
        score(get_task("rte"), [1], [1, 0])
