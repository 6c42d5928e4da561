"""`python -m tests.bench KIND`, KIND as below: one tab-separated line a figure: name, value, unit, aim, verdict.

A kind with several parts runs them one after the other; `KIND.PART` runs one. The verdict is `met` or `short`. Every
figure is measured in this run; ratios are measured side by side. Nothing here fails because a figure is short.
"""

import importlib
import sys

KINDS = {
    "main": ("main",),
    "gateway": ("gateway",),
    "serving": ("scheduler", "path", "coldstart", "profiles", "day", "rollout"),
    "kubernetes": ("steady", "many", "kills", "losses", "first"),
    "training": ("training",),
}
MODULES = {
    "scheduler": "serving",
    "path": "serving_path",
    "coldstart": "cold_start",
    "profiles": "two_profiles",
    "day": "day_trace",
    "steady": "operator_steady",
    "many": "operator_many",
    "kills": "operator_kills",
    "losses": "operator_losses",
    "first": "first_token",
}
"""Where a part's module has another name than the part."""


def modules_of(wanted: str) -> list[str]:
    """Modules of a kind, or of one part of it; empty when there is no such kind."""
    kind, _, part = wanted.partition(".")
    parts = [name for name in KINDS.get(kind, ()) if part in ("", name)]
    return [MODULES.get(name, name) for name in parts]


def run(wanted: str) -> int:
    modules = modules_of(wanted)
    if not modules:
        known = ", ".join(kind if len(parts) == 1 else f"{kind}[.{'|'.join(parts)}]" for kind, parts in KINDS.items())
        sys.stderr.write(f"no benchmark named {wanted}; there are: {known}\n")
        return 2
    for module in modules:
        for figure in importlib.import_module(f"tests.bench.{module}").run():
            sys.stdout.write(figure.line() + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1] if len(sys.argv) > 1 else "main"))
