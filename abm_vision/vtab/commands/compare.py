"""`abm-vtab compare`: see `runs.commands.compare`."""

from functools import partial

from abm_vision.runs.commands import compare
from abm_vision.vtab.view import VIEW

parser, command = partial(compare.parser, VIEW), partial(compare.command, VIEW)
