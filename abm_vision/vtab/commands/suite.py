"""`abm-vtab suite`: that of every harness."""

from abm_vision.runs.commands import shared
from abm_vision.vtab.view import VIEW

parser, command = shared(VIEW)["suite"]
