"""The synthetic sentences: GLUE's columns, balanced labels, and rules checked by other means than the generator's."""

import collections

import pytest

from nlp_ext.glue import synthetic
from nlp_ext.glue.synthetic import SIZES, examples
from nlp_ext.glue.tasks import TASKS

# Every word to its meaning: a word that stands for it in the tables' first place.
MEANING = {
    word: group[0]
    for table in (synthetic.NOUNS, synthetic.VERBS, synthetic.TRAITS, synthetic.PLACES)
    for group in table
    for word in group
}


def roles(sentence):
    """(trait, subject, verb, object, place) as meanings, read off the sentence: active or passive."""
    place = next((p for p in MEANING if " the " in p and sentence.endswith(p)), None)
    words = sentence.removesuffix(f" {place}").split()
    first, second = words[: (cut := words.index("the", 1))], words[cut:]
    if "by" in first:
        thing, verb, subject = first[1], first[3], second
        verb = {"seen": "saw", "hidden": "hid"}.get(verb, verb)
    else:
        subject, verb, thing = first[:-1], first[-1], second[1]
    trait = MEANING[subject[1]] if len(subject) == 3 else None
    return trait, MEANING[subject[-1]], MEANING[verb], MEANING[thing], MEANING.get(place)


@pytest.mark.parametrize("name", TASKS)
def test_columns_splits_and_balance(name):
    task = TASKS[name]
    for split in task.sizes:
        rows = examples(name, split)
        assert len(rows) == SIZES[split.partition("_")[0]] and rows == examples(name, split)
        assert {tuple(row) for row in rows} == {(*rows[0],)} and {*task.columns, "label", "idx"} == set(rows[0])
        labels = collections.Counter(row["label"] for row in rows)
        if split.startswith("test"):
            assert set(labels) == {-1}
            continue
        for row in rows:
            task.target(row["label"])
        share = {"stsb": 1 / 6, "rte": 1 / 3, "mnli": 1 / 3}.get(name, 1 / 2)
        assert min(labels.values()) / len(rows) > 0.8 * share
    with pytest.raises(ValueError, match=f"{name} has no split 'dev'; there are train"):
        examples(name, "dev")


def test_splits_do_not_share_their_examples():
    train = {row["sentence1"] + row["sentence2"] for row in examples("mrpc", "train")}
    validation = {row["sentence1"] + row["sentence2"] for row in examples("mrpc", "validation")}
    assert len(train) > 1900 and len(train & validation) < 5


@pytest.mark.parametrize(
    ("name", "columns"), [("mrpc", ("sentence1", "sentence2")), ("qqp", ("question1", "question2"))]
)
def test_equivalent_is_what_has_the_same_roles(name, columns):
    for row in examples(name, "validation"):
        assert (roles(row[columns[0]]) == roles(row[columns[1]])) == bool(row["label"]), row


def test_a_point_a_role():
    for row in examples("stsb", "validation"):
        same = sum(a == b for a, b in zip(roles(row["sentence1"]), roles(row["sentence2"]), strict=True))
        assert row["label"] == same, row


def test_what_follows():
    for row in examples("mnli", "validation_matched"):
        if row["hypothesis"].startswith("it is not true"):
            assert row["label"] == 2 and roles(row["premise"]) == roles(
                row["hypothesis"][len("it is not true that ") :]
            )
            continue
        premise, hypothesis = roles(row["premise"]), roles(row["hypothesis"])
        said = [(p, h) for p, h in zip(premise, hypothesis, strict=True) if h is not None]
        expected = 0 if all(p == h for p, h in said) else 1 if all(p in (None, h) for p, h in said) else 2
        assert row["label"] == expected, row


def test_answers():
    for row in examples("qnli", "validation"):
        _, verb, _, thing, _ = row["question"].split()
        _, _, told_verb, told_thing, _ = roles(row["sentence"])
        assert row["label"] == ((MEANING[verb], MEANING[thing]) != (told_verb, told_thing)), row


def test_the_last_judgement():
    for row in examples("sst2", "validation"):
        words = row["sentence"].split()
        assert row["label"] == ((words[-1] in synthetic.GOOD) != (words[-2] == "not")), row


def test_sentences_in_order():
    for row in examples("cola", "validation"):
        words = row["sentence"].split()
        in_order = (words[0], words[4]) == ("the", "the") and words[1] in MEANING and words[3] in {
            w for group in synthetic.VERBS for w in group
        }  # fmt: skip
        assert row["label"] == (in_order and words[2] in {w for group in synthetic.NOUNS for w in group}), row


def test_whose_state():
    states = dict(synthetic.STATES)
    for row in examples("wnli", "validation"):
        words, named = row["sentence1"].split(), row["sentence2"].split()[1]
        subject, thing, state = words[1], words[4], words[-1]
        assert row["label"] == (named == (subject if states[state] == "subject" else thing)), row
