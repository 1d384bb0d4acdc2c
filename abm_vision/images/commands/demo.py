"""`demo`: a page in a browser."""

from __future__ import annotations

import argparse

from abm_vision.images.commands.predict import add_classifier
from abm_vision.runs.cli import Parser, say


def parser(program: str) -> Parser:
    """An adapter, and where the page is served."""
    flags = Parser(f"{program} demo", description="Serve a page that classifies the picture dropped on it.")
    add_classifier(flags)
    flags.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: from other machines, too")
    flags.add_argument("--port", type=int, help="to listen on (default: the first free one from 7860)")
    return flags


def command(options: argparse.Namespace) -> int:
    """Serve until it is interrupted."""
    from abm_vision.images.classifier import load_classifier
    from abm_vision.images.demo import page
    from abm_vision.runs.device import resolve_device

    classifier = load_classifier(options.adapter, options.weights, resolve_device(options.device))
    try:
        served = page(classifier)
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from None
    try:
        _, address, _ = served.launch(
            server_name=options.host, server_port=options.port, prevent_thread_lock=True, quiet=True
        )
    except OSError as error:  # gradio's advice is for a script of one's own
        where = f"port {options.port} of {options.host}" if options.port else options.host
        raise ValueError(
            f"nothing can be served at {where}: another program has it, or there is no such address; "
            "give another --port or --host, or leave --port out"
        ) from error
    say(f"{address}  (Ctrl+C ends it)")
    served.block_thread()
    return 0
