"""`frd web`: a page in the browser that finds the edited pixels of photos."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from frd_model.output import say

from .arguments import (
    add_checkpoint_argument,
    add_device_argument,
    add_engine_arguments,
    at_least,
    open_checkpoint,
    prepared,
    runs_in,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_argument(parser)
    add_device_argument(parser, "auto")
    add_engine_arguments(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to answer at (default 127.0.0.1: this machine alone; 0.0.0.0: everybody who reaches it)",
    )
    parser.add_argument("--port", type=at_least(0), default=7860, help="(default 7860; 0: a free one)")
    parser.add_argument(
        "--max-megabytes", type=at_least(1), default=50, metavar="MB", help="of a photo's file (default 50)"
    )
    parser.add_argument(
        "--max-megapixels", type=at_least(1), default=50, metavar="MP", help="of a photo (default 50)"
    )
    parser.add_argument(
        "--time-limit", type=at_least(1), default=120, metavar="SECONDS", help="for one photo (default 120)"
    )


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl+C."""
    if find_spec("gradio") is None:
        raise ValueError("frd web needs gradio; pip install 'frd-kernels[web]'")
    from frd_model.web import Limits, Service
    from frd_model.web_page import LOCAL, serve

    limits = Limits(args.max_megabytes * 1_000_000, args.max_megapixels * 1_000_000, args.time_limit)
    # The server has it end the process; photos that were uploaded must not stay behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with (
        _listen(args.host, args.port) as sock,
        tempfile.TemporaryDirectory(prefix="frd-web-", ignore_cleanup_errors=True) as folder,
    ):
        # Not kept: the prepared network is a copy.
        checkpoint = prepared(
            open_checkpoint(args.checkpoint, args.device, model=args.model, preset=args.preset), args
        )
        # The name of a file alone: folders of this machine are not shown.
        label = Path(checkpoint.label).name if os.path.exists(checkpoint.label) else checkpoint.label
        service = Service(checkpoint.model, label, Path(folder), limits, runs_in(checkpoint))
        host = f"[{args.host}]" if ":" in args.host else args.host
        say(f"http://{host}:{sock.getsockname()[1]} (Ctrl+C ends it)")
        if args.host not in LOCAL:
            say("Everybody who reaches this address can use the page; it asks for no password.", sys.stderr)
        serve(service, sock, args.host)
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens. ValueError where it cannot."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"--host and --port must be free to listen at, got {host}, port {port}: {reason}"
        ) from None
