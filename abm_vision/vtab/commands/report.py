"""`abm-vtab report`: that of every harness."""

from abm_vision.runs.commands import shared
from abm_vision.vtab.view import VIEW

parser, command = shared(VIEW)["report"]
