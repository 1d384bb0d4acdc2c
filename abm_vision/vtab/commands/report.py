"""`abm-vtab report`: see `runs.commands.report`."""

from functools import partial

from abm_vision.runs.commands import report
from abm_vision.vtab.view import VIEW

parser, command = partial(report.parser, VIEW), partial(report.command, VIEW)
