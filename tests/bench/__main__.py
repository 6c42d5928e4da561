"""`python -m tests.bench KIND`, KIND as below: one tab-separated line a figure: name, value, unit, aim, verdict.

The verdict is `met` or `short`. Every figure is measured in this run; ratios are measured side by side. Nothing here
fails because a figure is short.
"""

import importlib
import sys

KINDS = ("main", "gateway", "serving", "training")


def run(kind: str) -> int:
    if kind not in KINDS:
        sys.stderr.write(f"no benchmark named {kind}; there are: {', '.join(KINDS)}\n")
        return 2
    for figure in importlib.import_module(f"tests.bench.{kind}").run():
        sys.stdout.write(figure.line() + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1] if len(sys.argv) > 1 else "main"))
