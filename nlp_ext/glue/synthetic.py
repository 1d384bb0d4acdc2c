"""Sentences of a small grammar in the columns of GLUE, for machines without its data. They are not GLUE.

Every example is a function of task, split and position alone. A reader of the sentences would agree with the labels,
but no bag of words decides them: they depend on who does what to whom, on negation and on synonyms.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nlp_ext.glue.tasks import get_task

SIZES = {"train": 2000, "validation": 400, "test": 400}

# Synonyms are in one tuple.
NOUNS = (("dog", "hound"), ("cat", "kitten"), ("boy", "lad"), ("doctor", "physician"), ("thief", "robber"), ("queen",))
VERBS = (("chased", "pursued"), ("saw", "noticed"), ("helped", "aided"), ("pushed", "shoved"), ("hid", "concealed"))
TRAITS = (("old", "aged"), ("small", "little"), ("clever", "smart"), ("quiet", "silent"), ("tall",))
PLACES = (("in the garden", "in the yard"), ("near the house", "by the house"), ("on the road", "on the street"))
GOOD = ("wonderful", "brilliant", "charming", "moving", "funny")
BAD = ("boring", "clumsy", "awful", "tedious", "shallow")
ASPECTS = ("film", "plot", "acting", "music", "ending")
# A state, and who is in it after "because it was": the one who acts, or the one acted on.
STATES = (("angry", "subject"), ("hungry", "subject"), ("eager", "subject"), ("slow", "object"), ("lost", "object"))


@dataclass(frozen=True)
class Scene:
    """Who (of what trait) did what to whom, and where: positions in the tables above."""

    trait: int
    subject: int
    verb: int
    object: int
    place: int

    def say(self, rng: random.Random, passive: bool = False, trait: bool = True, place: bool = True) -> str:
        """Write a sentence, choosing among synonyms at random."""
        subject = f"the {rng.choice(TRAITS[self.trait]) + ' ' if trait else ''}{rng.choice(NOUNS[self.subject])}"
        verb, thing = rng.choice(VERBS[self.verb]), f"the {rng.choice(NOUNS[self.object])}"
        where = f" {rng.choice(PLACES[self.place])}" if place else ""
        if passive:
            participle = {"saw": "seen", "hid": "hidden"}.get(verb, verb)
            return f"{thing} was {participle} by {subject}{where}"
        return f"{subject} {verb} {thing}{where}"

    def swapped(self) -> Scene:
        return replace(self, subject=self.object, object=self.subject)

    def changed(self, rng: random.Random, role: str) -> Scene:
        """Replace the word in one role; subject and object stay different."""
        table = {"trait": TRAITS, "subject": NOUNS, "verb": VERBS, "object": NOUNS, "place": PLACES}[role]
        taken = {getattr(self, role), *((self.subject, self.object) if role in ("subject", "object") else ())}
        return replace(self, **{role: rng.choice([k for k in range(len(table)) if k not in taken])})


ROLES = ("trait", "subject", "verb", "object", "place")
Example = dict[str, Any]


def draw_scene(rng: random.Random) -> Scene:
    """Draw a scene of the grammar."""
    subject, thing = rng.sample(range(len(NOUNS)), 2)
    trait, verb, place = (rng.randrange(len(table)) for table in (TRAITS, VERBS, PLACES))
    return Scene(trait, subject, verb, thing, place)


def _cola(rng: random.Random) -> Example:
    """In every second sentence, on average, two neighbouring words are swapped."""
    words = draw_scene(rng).say(rng).split()
    label = rng.randrange(2)
    if not label:
        k = rng.randrange(4)  # up to verb and article: never two words of one kind
        words[k], words[k + 1] = words[k + 1], words[k]
    return {"sentence": " ".join(words), "label": label}


def _sst2(rng: random.Random) -> Example:
    """The last judgement decides; "not" negates it."""
    label, negated = rng.randrange(2), rng.randrange(2)
    first, last = rng.sample(ASPECTS, 2)
    word = rng.choice(GOOD if label != negated else BAD)
    opening = f"the {first} was {rng.choice(GOOD + BAD)} but "
    return {"sentence": f"{opening}the {last} was {'not ' if negated else ''}{word}", "label": label}


def _same(rng: random.Random) -> tuple[str, str, int]:
    """Two sentences, and whether they mean the same: synonyms or the passive, or else another word or swapped roles."""
    scene, label = draw_scene(rng), rng.randrange(2)
    other = scene if label else rng.choice([scene.swapped(), scene.changed(rng, rng.choice(ROLES))])
    return scene.say(rng), other.say(rng, passive=rng.random() < 0.5), label


def _pairs(first: str, second: str) -> Callable[[random.Random], Example]:
    def example(rng: random.Random) -> Example:
        one, two, label = _same(rng)
        return {first: one, second: two, "label": label}

    return example


def _stsb(rng: random.Random) -> Example:
    """A point for each of the five roles that agree."""
    scene = other = draw_scene(rng)
    for role in (differing := rng.sample(ROLES, rng.randrange(6))):
        other = other.changed(rng, role)
    return {"sentence1": scene.say(rng), "sentence2": other.say(rng), "label": float(5 - len(differing))}


def _entailed(rng: random.Random) -> tuple[str, str, int]:
    """Premise, hypothesis, and 0: it follows, 1: it may be so, 2: it contradicts."""
    scene, label = draw_scene(rng), rng.randrange(3)
    if label == 0:
        return scene.say(rng), scene.say(rng, passive=rng.random() < 0.5, trait=rng.random() < 0.5, place=False), 0
    if label == 1:
        return scene.say(rng, trait=False, place=False), scene.say(rng, trait=rng.random() < 0.5), 1
    where = rng.choice(["place", "trait"])
    denied = scene.changed(rng, where).say(rng) if rng.random() < 0.5 else f"it is not true that {scene.say(rng)}"
    return scene.say(rng), denied, 2


def _mnli(rng: random.Random) -> Example:
    premise, hypothesis, label = _entailed(rng)
    return {"premise": premise, "hypothesis": hypothesis, "label": label}


def _rte(rng: random.Random) -> Example:
    premise, hypothesis, label = _entailed(rng)
    return {"sentence1": premise, "sentence2": hypothesis, "label": min(label, 1)}


def _qnli(rng: random.Random) -> Example:
    """Whether the sentence answers the question: 0, it does."""
    scene, label = draw_scene(rng), rng.randrange(2)
    question = f"who {rng.choice(VERBS[scene.verb])} the {rng.choice(NOUNS[scene.object])} ?"
    told = scene if not label else rng.choice([scene.swapped(), scene.changed(rng, rng.choice(["verb", "object"]))])
    return {"question": question, "sentence": told.say(rng, passive=rng.random() < 0.5), "label": label}


def _wnli(rng: random.Random) -> Example:
    """Whom "it" refers to, decided by the state that follows."""
    scene, label = draw_scene(rng), rng.randrange(2)
    state, whose = rng.choice(STATES)
    other = "object" if whose == "subject" else "subject"
    named = NOUNS[getattr(scene, whose if label else other)][0]
    subject, thing = NOUNS[scene.subject][0], NOUNS[scene.object][0]
    sentence = f"the {subject} {rng.choice(VERBS[scene.verb])} the {thing} because it was {state}"
    return {"sentence1": sentence, "sentence2": f"the {named} was {state}", "label": label}


_EXAMPLES: Mapping[str, Callable[[random.Random], Example]] = {
    "cola": _cola,
    "mnli": _mnli,
    "mrpc": _pairs("sentence1", "sentence2"),
    "qnli": _qnli,
    "qqp": _pairs("question1", "question2"),
    "rte": _rte,
    "sst2": _sst2,
    "stsb": _stsb,
    "wnli": _wnli,
}


def examples(task: str, split: str) -> list[Example]:
    """Make all examples of a split, with GLUE's columns, `label` and `idx`; a test split's labels are -1, as in GLUE.

    Raises:
        ValueError: an unknown task or split.
    """
    known = get_task(task).sizes
    if split not in known:
        raise ValueError(f"{task} has no split {split!r}; there are {', '.join(known)}")
    hidden = {"label": -1} if split.startswith("test") else {}
    count = SIZES[split.partition("_")[0]]
    return [{**_EXAMPLES[task](random.Random(f"{task} {split} {k}")), "idx": k, **hidden} for k in range(count)]


def sentences(count: int) -> list[str]:
    """Make texts of the grammar without labels, none from a split, for a model's pretraining."""
    return [_unlabelled(random.Random(f"unlabelled {k}")) for k in range(count)]


def _unlabelled(rng: random.Random) -> str:
    example = _EXAMPLES[rng.choice(sorted(_EXAMPLES))](rng)
    return " ".join(text for column, text in example.items() if column != "label")


def exercises(count: int) -> list[tuple[str, str]]:
    """Make sources and targets that teach words and roles, but no task's labels, for a model's pretraining.

    The target is the sentence in the active with the first of its synonyms, one of its parts, or one of two judgements.
    """
    return [_exercise(random.Random(f"exercise {k}")) for k in range(count)]


def _exercise(rng: random.Random) -> tuple[str, str]:
    kind = rng.choice(["plain", "who", "whom", "where", "verdict"])
    if kind == "verdict":
        first, last = rng.sample(ASPECTS, 2)
        said = {aspect: f"{rng.choice(['', 'not '])}{rng.choice(GOOD + BAD)}" for aspect in (first, last)}
        asked = rng.choice([first, last])
        return f"verdict {asked}: the {first} was {said[first]} but the {last} was {said[last]}", said[asked]
    scene = draw_scene(rng)
    sentence = scene.say(rng, passive=rng.random() < 0.5)
    noun, verb, thing = NOUNS[scene.subject][0], VERBS[scene.verb][0], NOUNS[scene.object][0]
    place = PLACES[scene.place][0]
    answers = {
        "plain": f"the {TRAITS[scene.trait][0]} {noun} {verb} the {thing} {place}",
        "who": f"the {noun}",
        "whom": f"the {thing}",
        "where": place,
    }
    return f"{kind}: {sentence}", answers[kind]
