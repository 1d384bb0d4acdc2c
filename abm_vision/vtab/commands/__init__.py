"""The commands of `abm-vtab`: a module each, with its `parser()` and, beside it, the `command` that it is for."""

PROGRAM = "abm-vtab"
NAMES = ("compare", "list", "predict", "prepare", "report", "suite")  # and `run`, which goes without its name
