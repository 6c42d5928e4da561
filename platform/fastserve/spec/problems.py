"""Pydantic's errors in the words of the manifest.

Pydantic knows what is wrong but speaks of Python ("Input should be a valid dictionary"). Here every type of error that
our sections can cause becomes a path, a line and a sentence that ends with what to do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from fastserve.errors import Problem
from fastserve.spec.evaluate import TASK_KEY, Gate
from fastserve.spec.nearest import Advice, key_advice, nearest
from fastserve.spec.section import Section
from fastserve.spec.shape import FieldShape, fields_of
from fastserve.spec.yaml_tree import Block, Items, Leaf, Tree, join


@dataclass(frozen=True, slots=True)
class Place:
    """Where an error is, as far as the file has such a place."""

    path: str
    line: int | None
    kind: type[Section]
    block: type[Section]
    """The block that holds the key."""

    key: str
    field: FieldShape | None
    """What is known of the key; None when the block has no such key."""

    node: Tree | None
    """What stands there; None when nothing does."""

    in_list: bool
    """Whether it is an item of the key's list, or a value of its mapping."""

    @property
    def words(self) -> str:
        """What should stand here."""
        if self.field is None:
            return "value"
        if self.in_list and not self.field.shape.section:
            return self.field.shape.form.words if self.field.shape.form else "text"
        return "block" if self.in_list else self.field.shape.words


def problems_of(error: ValidationError, root: Block, kind: type[Section], file: str | None) -> list[Problem]:
    """One problem for each error, in the order of the sections."""
    problems = []
    for details in error.errors(include_url=False):
        context = details.get("ctx", {})
        at = tuple(str(context["at"]).split(".")) if "at" in context else ()
        place = locate((*details["loc"], *_rejoined(at)), root, kind)
        advice = _ADVICE.get(details["type"], _does_not_fit)(place, context)
        problems.append(Problem(place.path, advice.message, place.line, advice.suggestion, file))
    return problems


def locate(loc: Iterable[int | str], root: Block, kind: type[Section]) -> Place:
    """Follow pydantic's location through the file; the line is that of the deepest key that is there."""
    node: Tree | None = root
    line: int | None = root.line
    path, key, block, in_list = "", "", kind, False
    section: type[Section] | None = kind
    field: FieldShape | None = None
    for step in _manifest_steps(loc, kind):
        if isinstance(step, int):
            in_list = True
            node = node.items[step] if isinstance(node, Items) and step < len(node.items) else None
            line = node.line if node is not None else line
        else:
            if section is not None:
                block, field = section, _field(section, step)
                in_list = False
            else:
                in_list = True
            key = step
            entry = node.entries.get(step) if isinstance(node, Block) else None
            node, line = (entry.node, entry.line) if entry else (None, line)
            section = field.shape.section if field else None
        path = join(path, step)
    return Place(path, line, kind, block, key, field, node, in_list)


def _field(section: type[Section], key: str) -> FieldShape | None:
    if section is Gate and key.startswith(TASK_KEY):
        return fields_of(Gate)["tasks"]
    return fields_of(section).get(key)


def _manifest_steps(loc: Iterable[int | str], kind: type[Section]) -> Iterable[int | str]:
    """Pydantic's steps with a gate's `tasks`, `triage` as the manifest's one key, `task.triage`."""
    section: type[Section] | None = kind
    steps = iter(loc)
    for step in steps:
        if isinstance(step, str) and section is not None:
            if section is Gate and step == "tasks":
                step = f"{TASK_KEY}{next(steps, '')}"
            field = _field(section, step)
            section = field.shape.section if field else None
        yield step


def _rejoined(at: tuple[str, ...]) -> tuple[str, ...]:
    """`gate`, `task`, `triage` as `gate`, `task.triage`."""
    if TASK_KEY[:-1] in at:
        start = at.index(TASK_KEY[:-1])
        return (*at[:start], ".".join(at[start:]))
    return at


def _missing(place: Place, context: dict[str, Any]) -> Advice:
    return Advice(f"is missing; write `{place.key}: {_example(place)}`", place.key)


def _example(place: Place) -> str:
    shape = place.field.shape if place.field else None
    if shape is None:
        return "..."
    if shape.choices:
        return shape.choices[0]
    if shape.form:
        example = shape.form.example.partition(" or ")[0]
        return f"[{example}]" if shape.many else example
    if shape.section:
        required = [field for field in fields_of(shape.section).values() if field.required]
        return "{" + ", ".join(f"{field.key}: ..." for field in required) + "}"
    return "..."


def _unknown(place: Place, context: dict[str, Any]) -> Advice:
    return key_advice(place.key, place.block, place.kind, place.node)


def _not_text(place: Place, context: dict[str, Any]) -> Advice:
    leaf = place.node
    if not isinstance(leaf, Leaf):
        return Advice(f"must be a {place.words}, not {_seen(leaf)}; write one text")
    if leaf.value is None:
        return Advice(f"is empty; write a text{_or_remove(place)}")
    if not leaf.plain:
        return Advice(f"must be a {place.words}; write it in quotes")
    quoted = json.dumps(leaf.raw, ensure_ascii=False)
    read_as = str(leaf.value).lower() if isinstance(leaf.value, bool) else f"the number {leaf.value}"
    same = read_as in (leaf.raw, f"the number {leaf.raw}")
    meaning = f"{leaf.raw} is {read_as}" if not same else f"{leaf.raw} is not text"
    return Advice(f"{meaning} without quotes; put it in quotes: {quoted}", quoted)


def _not_a_block(place: Place, context: dict[str, Any]) -> Advice:
    if place.field and place.field.shape.is_source and isinstance(place.node, Leaf):
        return _not_text(place, context)
    section = place.field.shape.section if place.field else None
    keys = f" with the keys {', '.join(fields_of(section))}" if section else ""
    if section is None and place.field and place.field.shape.many:
        keys = ", such as {key: value}"
    return Advice(f"must be a block, not {_seen(place.node)}; write a block{keys}")


def _not_a_list(place: Place, context: dict[str, Any]) -> Advice:
    if isinstance(place.node, Leaf) and place.node.value is None:
        return Advice(f"is empty; write a list{_or_remove(place)}")
    if isinstance(place.node, Leaf):
        listed = f"[{place.node.raw}]"
        return Advice(f"must be a list; write {listed}", listed)
    return Advice(f"must be a list, not {_seen(place.node)}; begin each item with `- `")


def _not_a_flag(place: Place, context: dict[str, Any]) -> Advice:
    return Advice(f"must be true or false, not {_seen(place.node)}; write one of the two, without quotes")


def _not_a_number(place: Place, context: dict[str, Any]) -> Advice:
    example = place.field.shape.form.example if place.field and place.field.shape.form else "100"
    return Advice(f"must be a {place.words}, not {_seen(place.node)}; write it like {example}")


def _not_a_choice(place: Place, context: dict[str, Any]) -> Advice:
    choices = place.field.shape.choices if place.field else ()
    near = nearest(place.node.raw, choices) if isinstance(place.node, Leaf) else None
    allowed = f"one of {', '.join(choices)}" if len(choices) > 1 else "".join(choices)
    suggestion = near or (choices[0] if len(choices) == 1 else None)
    if isinstance(place.node, Leaf) and place.node.value is None:
        return Advice(f"is empty; write {allowed}{_or_remove(place)}", suggestion)
    return Advice(f"{_seen(place.node)} is not allowed; write {near or allowed}" + _others(near, choices), suggestion)


def _others(near: str | None, choices: tuple[str, ...]) -> str:
    return f" (allowed: {', '.join(choices)})" if near and len(choices) > 1 else ""


def _bad_name(place: Place, context: dict[str, Any]) -> Advice:
    raw = place.node.raw if isinstance(place.node, Leaf) else ""
    allowed = "".join(char if char.isascii() and char.isalnum() else "-" for char in raw.lower()).strip("-")[:63]
    near = allowed.rstrip("-") or None
    hint = f", such as {near}" if near else ""
    rule = "at most 63 lower-case letters, digits and `-`, a letter or digit at both ends"
    return Advice(f"{_seen(place.node)} is not a name; write {rule}{hint}", near)


def _empty_list(place: Place, context: dict[str, Any]) -> Advice:
    return Advice(f"is an empty list; write at least one item{_or_remove(place)}")


def _long_list(place: Place, context: dict[str, Any]) -> Advice:
    return Advice(f"has {context['actual_length']} items; write at most {context['max_length']}")


def _or_remove(place: Place) -> str:
    return "" if place.in_list or (place.field and place.field.required) else ", or remove the line"


def _bound(words: str) -> Callable[[Place, dict[str, Any]], Advice]:
    def advice(place: Place, context: dict[str, Any]) -> Advice:
        limit = next(context[name] for name in ("ge", "gt", "le", "lt") if name in context)
        form = place.field.shape.form if place.field else None
        shown = form.write(limit) if form and form.write else f"{limit:g}"
        return Advice(
            f"{_seen(place.node)} is out of range; write a {form.words if form else 'number'} {words} {shown}"
        )

    return advice


def _said(place: Place, context: dict[str, Any]) -> Advice:
    """Our own validators already speak the manifest's words; only what stands in the file they cannot know."""
    message = str(context["error"] if "error" in context else context["message"])
    leaf = place.node
    if isinstance(leaf, Leaf) and leaf.plain and isinstance(leaf.value, bool):
        read_as = str(leaf.value).lower()
        if leaf.raw != read_as:
            return Advice(message.replace(f"{read_as} is", f"{leaf.raw} is {read_as} without quotes,", 1))
    return Advice(message)


def _does_not_fit(place: Place, context: dict[str, Any]) -> Advice:
    """For an error that the sections cannot cause today; plain, but true."""
    return Advice(f"{_seen(place.node)} does not fit; write a {place.words}")


def _seen(node: Tree | None) -> str:
    if isinstance(node, Block):
        return "a block"
    if isinstance(node, Items):
        return "a list"
    if node is None or node.value is None:
        return "nothing"
    shown = node.raw if len(node.raw) <= 60 else node.raw[:57] + "..."
    return shown if node.plain else json.dumps(shown, ensure_ascii=False)


_ADVICE: dict[str, Callable[[Place, dict[str, Any]], Advice]] = {
    "missing": _missing,
    "extra_forbidden": _unknown,
    "string_type": _not_text,
    "string_pattern_mismatch": _bad_name,
    "string_too_long": _bad_name,
    "model_type": _not_a_block,
    "model_attributes_type": _not_a_block,
    "dict_type": _not_a_block,
    "list_type": _not_a_list,
    "too_short": _empty_list,
    "too_long": _long_list,
    "bool_type": _not_a_flag,
    "finite_number": _not_a_number,
    "literal_error": _not_a_choice,
    "greater_than": _bound("above"),
    "greater_than_equal": _bound("from"),
    "less_than": _bound("below"),
    "less_than_equal": _bound("up to"),
    "value_error": _said,
    "wrong_at": _said,
}
