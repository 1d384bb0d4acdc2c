"""The commands of `abm-vtab` alone: a module each, with its `parser()` and, beside it, the `command` that it is for."""
