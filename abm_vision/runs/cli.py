"""Command lines: a flag for every setting, one message and exit code 2 for bad input, no traceback."""

from __future__ import annotations

import argparse
import io
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from abm_vision.initializers import load_plugin
from abm_vision.initializers.record import kind_of
from abm_vision.runs.records import read_config
from abm_vision.runs.settings import PLUGIN, AdapterSettings


class Parser(argparse.ArgumentParser):
    """Errors are one line, with the flag that may be meant; flags are written out."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, allow_abbrev=False, **options)
        text = "module of initialisations of your own, which Python must find; it is imported first"
        self.add_argument("--plugin", metavar="MODULE", default=argparse.SUPPRESS, help=text)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """The flags' values."""
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return values

    def _meant(self, unknown: Sequence[str]) -> str:
        """A question with the flag that the first unknown one is like, by its name or by two words of its help."""
        word, _, _ = next((word for word in unknown if word.startswith("--")), "").lstrip("-").partition("=")
        flags = sorted((a for a in self._actions if a.option_strings), key=lambda a: len(a.dest), reverse=True)
        names = {option.lstrip("-"): option for option in self._option_string_actions}
        texts = {"-".join(pair): a.option_strings[-1] for a in flags for pair in pairwise((a.help or "").split())}
        for known, cutoff in ((names, 0.6), (texts, 0.8)):
            if found := get_close_matches(word, known, 1, cutoff):
                return f"; did you mean {known[found[0]]}?"
        return ""

    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def load_plugins(program: str, config: type[AdapterSettings], words: Sequence[str]) -> None:
    """Import what `--plugin`, or the file after `--config`, names: its initialisations then have flags of their own.

    Raises:
        ValueError, FileNotFoundError: as `load_plugin` and `read_config`.
    """
    first = Parser(program, add_help=False)
    first.add_argument("--config")
    early, _ = first.parse_known_args(words)
    if early.config and Path(early.config).is_file():  # else it is reported in its turn
        recorded = read_config(early.config, config.schema).get(PLUGIN)
        if recorded is not None:
            load_plugin(recorded)
    if PLUGIN in early:
        load_plugin(early.plugin)


def add_place(parser: Parser, setting: str) -> None:
    """Take a setting without its flag, too: where the data are."""
    if setting:
        text = f"the same as --{setting}"
        parser.add_argument(setting, nargs="?", metavar="FOLDER", default=argparse.SUPPRESS, help=text)


def add_settings(parser: Parser, config: type[AdapterSettings], without: Collection[str] = ()) -> None:
    """A flag for every setting, those of initialisations among them; those not given are not set."""
    for setting, field in config.settings().items():
        if setting in without or setting == PLUGIN:  # which every parser has
            continue
        name = f"--{setting.replace('_', '-')}"
        default = "none" if field.default is None or field.default is MISSING else field.default
        text = f"{field.metadata.get('help', '')} (default: {default})".replace("%", "%%")
        if kind_of(field) == "bool":
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": value_of(field), "choices": field.metadata.get("choices")}
        parser.add_argument(name, **kind, default=argparse.SUPPRESS, help=text)


def value_of(setting: Field[Any]) -> type:
    """What makes a setting's value of its text."""
    return {"int": int, "float": float}.get(kind_of(setting), str)


UNREAD = 141  # 128 + SIGPIPE, which a shell reports of a Unix tool: so that output cut short is recognised


def say(line: str) -> None:
    """Print a line now, even into a pipe, and not into a progress bar. Where nobody reads it the command ends."""
    from tqdm import tqdm  # not for --help

    try:
        with tqdm.external_write_mode():
            print(line, flush=True)
    except BrokenPipeError:
        _let_go()
        raise SystemExit(UNREAD) from None


class Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, everything that is open is closed on the way out."""


def guarded(program: str, command: Callable[[], int], smaller: str) -> int:
    """The exit code of a command: its own, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM, 141 with no reader.

    Output that nobody reads any longer ends the command. What a terminal cannot show is written as an escape
    (`\\u2020`).

    Args:
        program: its name, before every message.
        command: does the work.
        smaller: the flags that take less memory when they are lowered.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _heeding_sigterm(), _plain_warnings(program):
            try:
                return command()
            finally:  # --help exits; what is still held back is not to fail after this
                print(end="", flush=True)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and _let_go() and isinstance(error, BrokenPipeError):
            return UNREAD
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        from abm_vision.abm.batches import out_of_memory  # with torch, which a wrong flag is not to wait for

        if not out_of_memory(error):
            raise
        cause = str(error).partition("\n")[0]
        print(f"{program}: error: out of memory ({cause}); a smaller {smaller} takes less", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        return _stopped(program, stop)


def run_guarded(program: str, run: Callable[[], Any]) -> Any:
    """What `run` gives, or exit code 130 after Ctrl-C and 143 after SIGTERM, with a word on how to resume."""
    try:
        return run()
    except KeyboardInterrupt as stop:
        code = _stopped(program, stop, "; the same command resumes from its last checkpoint, if there is one")
        raise SystemExit(code) from None


def _stopped(program: str, stop: KeyboardInterrupt, more: str = "") -> int:
    terminated = isinstance(stop, Terminated)
    print(f"\n{program}: {'terminated' if terminated else 'interrupted'}{more}", file=sys.stderr)
    return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


@contextmanager
def _plain_warnings(program: str) -> Iterator[None]:
    """Warnings as one line, without the place in the source that raises them."""

    def show(message: Warning | str, *_: Any) -> None:
        print(f"{program}: warning: {message}", file=sys.stderr)

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextmanager
def _heeding_sigterm() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM, once: a second one ends the process at once. Only a main thread can.

    Python drops what is raised in some places, such as while workers are forked: then the signal is sent once more.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    def again(dropped: Any) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt) or os.getpid() != here:
            drop(dropped)
            return
        number = signal.SIGINT
        if isinstance(dropped.exc_value, Terminated):
            number = signal.SIGTERM
            signal.signal(number, stop)
        later = threading.Timer(0.1, os.kill, (here, number))
        later.daemon = True
        later.start()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    here, before = os.getpid(), signal.signal(signal.SIGTERM, stop)
    drop, sys.unraisablehook = sys.unraisablehook, again
    try:
        yield
    finally:
        sys.unraisablehook = drop
        signal.signal(signal.SIGTERM, before)


def _let_go() -> bool:
    """Whether standard output cannot be written; it leads nowhere then, so that nothing fails at the process's end."""
    try:
        out, asked = sys.stdout.fileno(), select.poll()
    except (AttributeError, OSError):  # there is no output, it is no file, or this is Windows
        return False
    # What a pipe refused is not always held back, to be refused again.
    asked.register(out, 0)
    lost = any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))
    try:
        sys.stdout.flush()
    except OSError:
        lost = True
    if lost:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out)
    return lost
