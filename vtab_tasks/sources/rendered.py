"""The structured tasks, rendered offline. Never the official pixels, and every description says so."""

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vtab_tasks.order import dsprites_order, tfds_order
from vtab_tasks.render import clevr, dsprites, maze, norb, road
from vtab_tasks.render.cache import code_hash, drawn
from vtab_tasks.sources.items import Items
from vtab_tasks.taskdata import TaskData
from vtab_tasks.tasks import Task


@dataclass(frozen=True, eq=False)
class DspritesItems:
    """Items drawn from rows, int32 (N,), of the dSprites file."""

    task: Task
    rows: NDArray[np.int32]

    def images(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        sprites = dsprites.draw(dsprites.latents_of(self.rows[positions])) * np.uint8(self.task.pixel_scale)
        return np.repeat(sprites[..., None], 3, axis=-1)

    def labels(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        latents = dsprites.latents_of(self.rows[positions])
        examples = zip(latents.x, latents.orientation, strict=True)
        found = [self.task.label_fn({"label_x_position": x, "label_orientation": o}) for x, o in examples]
        return np.array(found, dtype=np.int64)


def _dsprites_items(task: Task, split: str) -> DspritesItems:
    """The official members of the split, by the order in which TFDS stores them."""
    order = dsprites_order()
    return DspritesItems(task, np.concatenate([order[part.start : part.stop] for part in task.parts(split)]))


_SCENES = ("../sources/rendered", "../order")  # the code that decides which scene is at a position


@dataclass(frozen=True)
class Surrogate:
    """A dataset that is replaced by rendered scenes.

    Attributes:
        scene: the scene at a position of a TFDS split; a function of the two alone.
        example: from a scene to the features of a TFDS example, from which labels are derived.
        picture: from a scene to its picture (H, W, 3).
        code: modules that determine the pixels.
        what: what is drawn, in words.
    """

    scene: Callable[[str, int], Any]
    example: Callable[[Any], dict[str, Any]]
    picture: Callable[[Any], NDArray[np.uint8]]
    code: tuple[str, ...]
    what: str

    def draw(self, split: str, position: int) -> NDArray[np.uint8]:
        """Draw the picture at a position of a TFDS split."""
        return self.picture(self.scene(split, position))


@dataclass(frozen=True, eq=False)
class SurrogateItems:
    """Items drawn from their places, (TFDS split, position), in a dataset."""

    task: Task
    places: tuple[tuple[str, int], ...]

    def images(self, positions: NDArray[np.int64]) -> Sequence[NDArray[np.uint8]]:
        surrogate, cached, images = _SURROGATES[self.task.tfds_name], f"{self.task.tfds_name}-{drawing(self.task)}", []
        for split, inside in _runs([self.places[position] for position in positions]):
            images.extend(drawn(cached, split, inside, partial(surrogate.draw, split)))
        return images

    def labels(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        surrogate = _SURROGATES[self.task.tfds_name]
        places = (self.places[position] for position in positions)
        examples = (surrogate.example(surrogate.scene(split, inside)) for split, inside in places)
        return np.array([self.task.label_fn(example) for example in examples], dtype=np.int64)


def _runs(places: Sequence[tuple[str, int]]) -> list[tuple[str, list[int]]]:
    """Places one after another in the same TFDS split, together."""
    runs: list[tuple[str, list[int]]] = []
    for split, position in places:
        if not runs or runs[-1][0] != split:
            runs.append((split, []))
        runs[-1][1].append(position)
    return runs


def _surrogate_items(task: Task, split: str) -> SurrogateItems:
    places = ((part.split, position) for part in task.parts(split) for position in range(part.start, part.stop))
    return SurrogateItems(task, tuple(places))


def _random(name: str, split: str, position: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(f"{name}/{split}".encode()), position])


@cache
def _norb_order(split: str) -> NDArray[np.int64]:
    return tfds_order(split, range(int(np.prod(norb.GRID))))


_SURROGATES = {
    "smallnorb": Surrogate(
        lambda split, position: norb.view(split, int(_norb_order(split)[position])),
        norb.example,
        norb.picture,
        ("scene", "norb"),
        "toys of plain solids in smallNORB's views",
    ),
    "clevr": Surrogate(
        lambda split, position: clevr.objects(_random("clevr", split, position)),
        clevr.example,
        clevr.picture,
        ("scene", "clevr"),
        "scenes after CLEVR's generator",
    ),
    "kitti": Surrogate(
        lambda split, position: road.road(_random("kitti", split, position)),
        road.example,
        road.picture,
        ("scene", "noise", "road"),
        "roads with vehicles of boxes and wheels",
    ),
    "dmlab": Surrogate(
        lambda split, position: maze.view(_random("dmlab", split, position)),
        maze.example,
        maze.picture,
        ("scene", "noise", "maze"),
        "maze corridors with an object",
    ),
}
_MAKERS: dict[str, Callable[[Task, str], Items]] = {
    "dsprites": _dsprites_items,
    **dict.fromkeys(_SURROGATES, _surrogate_items),
}


def can_draw(task: Task) -> bool:
    """Return whether the task has a rendered form."""
    return task.tfds_name in _MAKERS


def drawing(task: Task) -> str:
    """Hash the code that draws the task's pictures and chooses their scenes."""
    surrogate = _SURROGATES.get(task.tfds_name)
    return code_hash(*(surrogate.code if surrogate else ("dsprites",)), *_SCENES)


def _describe(task: Task) -> str:
    if task.tfds_name in _SURROGATES:
        return f"rendered: {_SURROGATES[task.tfds_name].what}, drawn offline; a surrogate, not the official data"
    return "rendered: dSprites drawn offline, official split membership; not the official pixel data"


def load(task: Task, split: str, data_dir: str | os.PathLike[str] | None = None) -> TaskData:
    """Render the split; `data_dir` is not used.

    Raises:
        ValueError: the task has no rendered form.
    """
    if not can_draw(task):
        raise ValueError(
            f"{task.name} has no rendered form (only {', '.join(_MAKERS)} have): give data_dir, a folder with "
            f"the community's vtab-1k or with TFDS data; the data's home is {task.url}"
        )
    positions = np.arange(task.size(split))
    return TaskData(task, split, "rendered", None, _describe(task), _MAKERS[task.tfds_name](task, split), positions)
