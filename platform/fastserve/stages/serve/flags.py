"""Writes `plan/engine_flags.py`: the flags that the pinned vLLM knows, so that the planner can name a mistyped one.

python -m fastserve.stages.serve.flags           print the module
python -m fastserve.stages.serve.flags --write   replace it
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from fastserve.plan import engine_flags


def render() -> str:
    """The module's text for the vLLM that is installed."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    actions = make_arg_parser(FlexibleArgumentParser())._actions
    long = [(option, action) for action in actions for option in action.option_strings if option.startswith("--")]
    flags = {option for option, _ in long} - {"--help"}
    switches = {
        option for option, action in long if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction)
    } - {"--help"}
    release = version("vllm").partition("+")[0]
    return (
        '"""Generated from the argument parser of the pinned vLLM by '
        "`python -m fastserve.stages.serve.flags`; do not edit.\n\n"
        "The planner may not import vLLM, yet it must name a mistyped flag before anything runs.\n"
        '"""\n\n'
        f'VLLM_VERSION = "{release}"\n\n'
        f"FLAGS = {_listed(flags)}\n"
        '"""Every long flag of vLLM\'s server."""\n\n'
        f"SWITCHES = {_listed(switches)}\n"
        '"""Those of them that take no value."""\n'
    )


def _listed(names: Iterable[str]) -> str:
    lines = "".join(f'        "{name}",\n' for name in sorted(names))
    return f"frozenset(\n    {{\n{lines}    }}\n)"


def main() -> int:
    """Print the module, or replace it with --write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    text = render()
    if parser.parse_args().write:
        Path(engine_flags.__file__).write_text(text)
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
