"""What keys of one block demand of each other, in CEL, for the API server.

The sections' validators say the same in Python, and more of it. This is what can be said of the block alone:

| block | rule | refused |
| --- | --- | --- |
| spec.train | epochs or steps | both |
| spec.train | lora belongs to lora and qlora | lora with another method |
| spec.train | scratch belongs to scratch | scratch with another method |
| spec.train | fsdp2 shares evenly | fsdp2 with groups of unequal profiles or speeds |
| spec.train | a token for each worker | batchTokens below the workers listed |
| spec.train | a run shrinks, it does not grow | elastic.minWorkers above the workers listed |
| spec.compress[] | one step does one thing | both of prune and quantize, or neither |
| spec.compress[].prune | pruning removes something | neither layers nor width |
| spec.compress[].quantize | groups are for int4 | groupSize with another format |
| spec.serve | options belong to mlfq | schedulerOptions with another scheduler |
| spec.serve | mlfq resumes from the cache | mlfq with engine.prefixCaching: false |
| spec.serve.replicas | bounds are in order | min above max |
| spec.serve.rollout | steps rise to all | steps that do not rise, or do not end with 100 |

Not among them, since a structural schema hides their fields from rules: limits of a gate (`task.<name>` is a field that
the schema does not name), sources (a text or a block has no one type), values of `scratch.config`. Two of one name
among tasks and adapters are refused by the type of the list.

Rules see the block after its defaults were filled in, so a key with a default is always there. What a rule goes over
has an end (`maxItems`, `maxLength`), and the one that compares items with each other has at most 100 of them: the API
server estimates the cost of each rule, and refuses a definition that could cost too much. A message is the reader's,
without the numbers that only the reader can put in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastserve.spec.compress import CompressStep, Prune, Quantize
from fastserve.spec.section import Section
from fastserve.spec.serve import Replicas, Rollout, Serve
from fastserve.spec.train import Train


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule over a block."""

    cel: str
    """True where the block is right; `self` is the block."""

    message: str
    """What is wrong and what to do, in the reader's words."""

    key: str = ""
    """Path below the block of the key that the message is of; empty: the block."""

    def to_schema(self) -> dict[str, Any]:
        """As it stands in `x-kubernetes-validations`."""
        rule = {"rule": self.cel, "message": self.message}
        return {**rule, "fieldPath": f".{self.key}"} if self.key else rule


_WORKERS = "(has(self.workers) ? self.workers.map(group, group.count).sum() : 1)"
_EQUAL_GROUPS = (
    "self.workers.all(group, group.profile == self.workers[0].profile"
    " && has(group.speed) == has(self.workers[0].speed)"
    " && (!has(group.speed) || group.speed == self.workers[0].speed))"
)

_TRAIN = (
    Rule("!has(self.epochs) || !has(self.steps)", "stands beside steps; keep one of the two", "epochs"),
    Rule(
        "!has(self.lora) || self.method in ['lora', 'qlora']",
        "does not go with this method; write method: lora, or remove lora",
        "lora",
    ),
    Rule(
        "!has(self.scratch) || self.method == 'scratch'",
        "does not go with this method; write method: scratch, or remove scratch",
        "scratch",
    ),
    Rule(
        f"self.engine != 'fsdp2' || !has(self.workers) || {_EQUAL_GROUPS}",
        "fsdp2 shares evenly, and the workers have unequal profiles or speeds; write engine: sharded, or one group of "
        "equal workers",
        "engine",
    ),
    Rule(
        f"self.batchTokens >= {_WORKERS}",
        "is fewer than the workers listed, so some would have nothing to do; raise batchTokens or list fewer workers",
        "batchTokens",
    ),
    Rule(
        f"!has(self.elastic) || self.elastic.minWorkers <= {_WORKERS}",
        "is above the workers listed; lower it or add workers",
        "elastic.minWorkers",
    ),
)

_SERVE = (
    Rule(
        "!has(self.schedulerOptions) || self.scheduler == 'mlfq'",
        "belongs to mlfq, and scheduler is another; remove schedulerOptions",
        "schedulerOptions",
    ),
    Rule(
        "self.scheduler != 'mlfq' || self.engine.prefixCaching",
        "is mlfq, which resumes requests from the prefix cache; remove engine.prefixCaching: false, or write fcfs",
        "scheduler",
    ),
)

_RULES: dict[type[Section], tuple[Rule, ...]] = {
    Train: _TRAIN,
    CompressStep: (
        Rule(
            "has(self.prune) != has(self.quantize)",
            "is one step: write either prune or quantize, and another list item for the other",
        ),
    ),
    Prune: (
        Rule(
            "has(self.layers) || has(self.width)",
            "prunes nothing; give layers or width, such as layers: 0.75",
        ),
    ),
    Quantize: (
        Rule(
            "!has(self.groupSize) || self.format == 'int4'",
            "is for format: int4, and format is another; remove groupSize",
            "groupSize",
        ),
    ),
    Serve: _SERVE,
    Replicas: (Rule("!has(self.max) || self.min <= self.max", "is above max; lower min or raise max", "min"),),
    Rollout: (
        Rule(
            "self.steps.isSorted() && self.steps[self.steps.size() - 1] == 100"
            " && self.steps.all(step, self.steps.exists_one(other, other == step))",
            "does not rise to all; write rising percentages that end with 100, such as [5, 25, 100]",
            "steps",
        ),
    ),
}


def rules_of(section: type[Section]) -> tuple[Rule, ...]:
    """The rules of a block, in the order in which the reader checks them."""
    return _RULES.get(section, ())
