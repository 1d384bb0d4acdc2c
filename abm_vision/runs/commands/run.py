"""One run: the command that goes without a name."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from abm_vision.runs.cli import Parser, add_place, add_settings, run_guarded, say
from abm_vision.runs.folder import discard_unbegun
from abm_vision.runs.log import LOGS, opened
from abm_vision.runs.records import read_config
from abm_vision.runs.settings import AdapterSettings
from abm_vision.runs.view import View

HOW = ("out", "rerun", "diagnose", "extras", "save_minutes")  # fields of a `Session` that are flags as they are


def parser(view: View, description: str, epilog: str, add_flags: Callable[[Parser], None]) -> Parser:
    """A flag for every setting, and those that do not change a result."""
    flags = Parser(view.program, description=description, epilog=epilog)
    add_place(flags, view.place)
    add_settings(flags, view.config)
    flags.add_argument(
        "--config",
        metavar="FILE",
        help="settings: a run's config.json or result.json, or YAML such as `lr: 1e-3`; flags win",
    )
    flags.add_argument("--print-config", action="store_true", help="print the settings as --config reads them, and end")
    flags.add_argument("--out", default="results", help="folder of the results, one folder a run (default: results)")
    flags.add_argument(
        "--rerun", action="store_true", help="make the run afresh even if it is finished or was interrupted"
    )
    flags.add_argument(
        "--diagnose", action="store_true", help="measure the information loss of the initialisation, and draw it"
    )
    flags.add_argument("--log", choices=LOGS, help="write losses while it trains, into the run's folder")
    flags.add_argument("--json", action="store_true", help="print the result as one line of JSON, nothing else")
    flags.add_argument("--quiet", action="store_true", help="no settings, stages and progress bars")
    add_flags(flags)
    return flags


def command(view: View, parsed: argparse.Namespace) -> int:
    """Make the run, and print its result. The harness is loaded when the settings are known to be good: it is slow."""
    options = vars(parsed)
    kind, as_json = options.pop("log"), options.pop("json")
    quiet, print_config = options.pop("quiet") or as_json, options.pop("print_config")
    how = {name: options.pop(name) for name in HOW if name in options}
    settings = settings_of(options, view)
    if print_config:
        print(json.dumps({"schema": settings.schema, "config": settings.to_dict()}, indent=2))
        return 0
    if not quiet and os.environ.get("RANK", "0") == "0":  # of several processes the first
        say(f"settings  {_changed(settings)}")

    from abm_vision.runs.harness import Session, silent
    from abm_vision.runs.run import run

    harness, folder = resolve_name(view.harness), Path(how["out"]) / settings.run_name()
    with harness.hushed(), opened(kind, folder) as log:
        session = Session(**how, quiet=quiet, say=silent if quiet else say, log=log)
        try:
            result = run_guarded(view.program, lambda: run(harness, settings, session))
        except (ValueError, OSError):
            discard_unbegun(folder)
            raise
    if harness.processes(settings).main:
        print(json.dumps(result) if as_json else _in_one_line(harness.summary(result), result))
        if not quiet and (steps := harness.next_steps(result)):
            print(steps)
    return 0


def settings_of(options: dict[str, Any], view: View) -> AdapterSettings:
    """The configuration that a run's flags say; takes `config` out of `options`.

    Raises:
        ValueError, FileNotFoundError: as `make` and `read_config`; a flag is given that the initialisation has no use
            for; or no data are given.
    """
    path, config = options.pop("config"), view.config
    if path and "preset" in options:
        raise ValueError("--config sets every field, so --preset would only change the name: give one of them")
    made = config.make(**{**(read_config(path, config.schema) if path else {}), **options})
    made.check_used(options, [made.init])  # what a file or a preset sets beyond that is not the user's mistake
    if view.place and getattr(made, view.place) is None:
        raise ValueError(f"no data are given: name them first, or after --{view.place}")
    return made


def _in_one_line(summary: str, result: Mapping[str, Any]) -> str:
    """What a run has given, what it was initialised by, and where its files are."""
    config, seconds = result["config"], sum(result["seconds"].values())
    return f"{summary}  init {config['init']}  seed {config['seed']}  {seconds:.0f} s  {result['folder']}"


def _changed(config: AdapterSettings) -> str:
    """The settings that are not as by default."""
    kind = type(config)
    defaults = {**kind.make(init=config.init).to_dict(), **kind().to_dict()}
    found = [f"{name} {value}" for name, value in config.to_dict().items() if value != defaults.get(name)]
    return ", ".join([*found, "others by default (--print-config)"])
