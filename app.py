"""Protects a portrait on a local page, and shows what a stranger's edit would make of it.

    python app.py
    python app.py --models=mini --attack_budget=0.06

Listens on 127.0.0.1 only and keeps nothing: pictures are deleted when their page is closed.
Needs Gradio (pip install -r requirements-app.txt). The other flags are those of defend.py; method, budget and
iterations are what the page begins with. docs/app.md has more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import util
from typing import TYPE_CHECKING, Any

import utils
from backend import Backend, bundled, loop_of
from defend import add_defense_arguments, settings_of
from methods import RECOMMENDED
from models.config import ModelSettings, resolve
from utils import UserError

if TYPE_CHECKING:
    from visits import Visits


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=utils.HelpFormatter)
    port = utils.number(int, 1, 65535, "a port from 1 to 65535")
    parser.add_argument("--port", type=port, default=7860, help="port on 127.0.0.1")
    add_defense_arguments(parser)
    parser.set_defaults(method=None)  # the page chooses its own: `first_method`
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return utils.run_command(run, args)


def run(args: argparse.Namespace) -> int:
    """Serves the page until a signal ends it."""
    if util.find_spec("gradio") is None:
        raise UserError("the page needs Gradio: pip install -r requirements-app.txt")
    from server import serve

    args.seed = utils.draw_seed(args.seed)
    args.method = args.method or first_method(args)
    own = set(map(str, bundled(args.models)))

    def page(visits: Visits) -> tuple[Any, dict]:
        from page import CSS, Page, theme

        backend = Backend(settings_of(args))
        backend.config.warn_of_cpu(args.device)
        for line in backend.missing:
            utils.warn(line)
        return Page(backend, visits, args.debug).blocks, {"theme": theme(), "css": CSS}

    serve(page, args.port, own)
    return 0


def first_method(args: argparse.Namespace) -> str:
    """Names the page's first method: `instant` if a network is there for the autoencoder under attack."""
    return "instant" if loop_of(resolve(ModelSettings.of(args))) else next(iter(RECOMMENDED))


if __name__ == "__main__":
    sys.exit(main())
