"""Commands on the adapter of a run on images: a module each, with its `parser(program)` and the `command` it is for."""
