"""Tasks drawn offline. Never the official pixels: every description says so."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vtab_tasks.order import dsprites_order
from vtab_tasks.render import dsprites
from vtab_tasks.sources.items import Items
from vtab_tasks.taskdata import TaskData
from vtab_tasks.tasks import Task


@dataclass(frozen=True)
class Scene:
    """A data set that can be drawn: how its items are made, and what people are told of them."""

    items: Callable[[Task, str], Items]
    description: str


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


# By TFDS name, because tasks share scenes.
_SCENES = {
    "dsprites": Scene(
        _dsprites_items,
        "rendered: dSprites drawn offline, official split membership; not the official pixel data",
    ),
}


def can_draw(task: Task) -> bool:
    """Whether the task has a rendered form."""
    return task.tfds_name in _SCENES


def load(task: Task, split: str, data_dir: str | os.PathLike[str] | None = None) -> TaskData:
    """The split, drawn; `data_dir` has nothing to give here.

    Raises:
        ValueError: The task has no rendered form.
    """
    if not can_draw(task):
        raise ValueError(
            f"{task.name} has no rendered form (only {', '.join(_SCENES)} has): give data_dir, a folder with "
            f"the community's vtab-1k or with TFDS data; the data's home is {task.url}"
        )
    scene = _SCENES[task.tfds_name]
    positions = np.arange(task.size(split))
    return TaskData(task, split, "rendered", None, scene.description, scene.items(task, split), positions)
