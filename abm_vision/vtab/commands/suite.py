"""`abm-vtab suite`: see `runs.commands.suite`."""

from functools import partial

from abm_vision.runs.commands import suite
from abm_vision.vtab.view import VIEW

parser, command = partial(suite.parser, VIEW), partial(suite.command, VIEW)
