"""Instructions on sentences of GLUE's small grammar, for machines without a dataset. They are no benchmark."""

from __future__ import annotations

import random
from typing import Any

from nlp_ext.glue.synthetic import NOUNS, PLACES, TRAITS, VERBS, Scene, draw_scene

COUNT = 2400


def examples() -> list[dict[str, Any]]:
    """Make examples with `instruction`, `input` and `output`, each a function of its position alone."""
    return [_example(random.Random(f"instruct {k}")) for k in range(COUNT)]


def _example(rng: random.Random) -> dict[str, Any]:
    scene = draw_scene(rng)
    given = Words(scene, rng)
    instruction, output = rng.choice(
        [
            ("Say it in the passive.", f"{given.object} was {given.participle} by {given.subject} {given.place}"),
            ("Who did it?", given.subject),
            ("To whom was it done?", given.object),
            ("Where did it happen?", given.place),
            ("Swap who did it and to whom.", f"{given.object} {given.verb} {given.subject} {given.place}"),
            ("Write it in capitals.", given.sentence.upper()),
        ]
    )
    return {"instruction": instruction, "input": given.sentence, "output": output}


class Words:
    """A scene in words, drawn once, so that question and answer agree."""

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self.subject = f"the {rng.choice(TRAITS[scene.trait])} {rng.choice(NOUNS[scene.subject])}"
        self.object = f"the {rng.choice(NOUNS[scene.object])}"
        self.verb, self.place = rng.choice(VERBS[scene.verb]), rng.choice(PLACES[scene.place])
        self.participle = {"saw": "seen", "hid": "hidden"}.get(self.verb, self.verb)
        self.sentence = f"{self.subject} {self.verb} {self.object} {self.place}"
