"""The tasks of VTAB-1K as data: the table of tasks, and (image, label) items from three sources.

>>> import vtab_tasks
>>> data = vtab_tasks.load("dsprites_loc", "train800val200", source="rendered")
>>> image, label = data[0]
>>> image.dtype, image.shape, label
(dtype('uint8'), (64, 64, 3), 0)

Needs numpy, Pillow and platformdirs; `tensorflow_datasets` only for data that it has prepared.
"""

from vtab_tasks.data import load, locate
from vtab_tasks.taskdata import TaskData
from vtab_tasks.tasks import GROUPS, SPLITS, TASKS, Task, get_task

__all__ = ["GROUPS", "SPLITS", "TASKS", "Task", "TaskData", "get_task", "load", "locate"]
