"""Commands that every harness has: a module each, with its `parser` and, beside it, the `command` that it is for.

Both are given the harness's `View`; the harness itself, which loads torch and a model library, is resolved when runs
are made.
"""
