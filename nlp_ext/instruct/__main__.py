"""The command line: `python -m nlp_ext.instruct` or `abm-instruct`. Commands are the only place that prints."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abm_vision.runs import commands
from abm_vision.runs.cli import Parser, say
from abm_vision.runs.commands import Command
from nlp_ext.instruct.view import VIEW
from nlp_ext.textview import add_flags


def _talk_parser(name: str, description: str) -> Parser:
    flags = Parser(f"{VIEW.program} {name}", description=description)
    flags.add_argument("--adapter", metavar="DIR", help="a run's folder, or the adapter's own; none: the base alone")
    flags.add_argument("--model", help="the base model (default: as the adapter's run had it)")
    flags.add_argument("--device", default="auto", help="auto, or a torch device (default: auto)")
    tokens = 1024 if name == "mt-bench" else 512
    flags.add_argument("--new-tokens", type=int, default=tokens, help=f"longest answer in tokens (default: {tokens})")
    return flags


def chat_parser() -> Parser:
    """An adapter or a model, and how to draw its answers."""
    flags = _talk_parser("chat", "Talk to an adapter, or to a base model; an empty line or Ctrl-D ends.")
    flags.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest answer (default: 0)")
    return flags


def mt_bench_parser() -> Parser:
    """An adapter or a model, questions, and where the answers go."""
    flags = _talk_parser("mt-bench", "Answer MT-Bench's questions, as FastChat's judge reads them.")
    flags.add_argument("--questions", required=True, metavar="FILE", help="FastChat's question.jsonl")
    flags.add_argument("--out", default=".", metavar="DIR", help="writes DIR/model_answer/NAME.jsonl (default: here)")
    flags.add_argument("--name", help="the name that the judge shows (default: abm-lora; of a base alone its own)")
    flags.add_argument("--seed", type=int, default=0, help="of answers that are drawn (default: 0)")
    flags.add_argument("--quiet", action="store_true", help="no progress bar")
    return flags


def _assistant(options: Any) -> Any:
    if options.new_tokens < 1:
        raise ValueError(f"new_tokens is {options.new_tokens}; it must be 1 or more")

    from abm_vision.runs.device import resolve_device
    from nlp_ext.instruct.talk import Assistant

    return Assistant(options.adapter, options.model, resolve_device(options.device), options.new_tokens)


def chat(options: argparse.Namespace) -> int:
    """Read lines and print answers until there is an empty one."""
    from nlp_ext.quiet import only_our_own_words

    if not 0 <= options.temperature < math.inf:
        raise ValueError(f"temperature is {options.temperature}; it must be 0 or more, and finite")
    with only_our_own_words():
        assistant = _assistant(options)
        turns: list[dict[str, str]] = []
        while True:
            line = _typed()
            if not line.strip():
                return 0
            turns.append({"role": "user", "content": line})
            turns.append({"role": "assistant", "content": assistant.reply(turns, options.temperature)})
            say(turns[-1]["content"])


def _typed() -> str:
    """The next line, empty at the end of the input."""
    try:
        line = input("you> " if sys.stdin.isatty() else "")
        line.encode()  # where Python takes any byte, it hands on those that are no text
    except EOFError:
        return ""
    except UnicodeError as error:
        raise ValueError(
            f"a line is no text in {sys.stdin.encoding} ({error}): set PYTHONIOENCODING to its encoding"
        ) from None
    return line


def mt_bench(options: argparse.Namespace) -> int:
    """Write answers to the questions."""
    from nlp_ext.instruct import talk
    from nlp_ext.quiet import only_our_own_words

    with only_our_own_words():
        path = talk.mt_bench(
            _assistant(options),
            Path(options.questions),
            Path(options.out),
            options.name or ("abm-lora" if options.adapter else Path(options.model).name),
            options.seed,
            show_bar=not options.quiet,
        )
    say(str(path))
    return 0


COMMANDS = commands.commands_of(
    VIEW,
    "Tune a LLaMA or a relative on instructions. Several GPUs: accelerate launch -m nlp_ext.instruct.",
    {
        "chat": Command(chat_parser, chat, "talk to an adapter or a model"),
        "mt-bench": Command(mt_bench_parser, mt_bench, "answer its questions"),
    },
    add_flags,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    smaller = "--batch-size, --length or --model (or --checkpointing)"
    return commands.main(VIEW, COMMANDS, arguments, smaller=smaller)


if __name__ == "__main__":
    sys.exit(main())
