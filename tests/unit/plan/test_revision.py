from __future__ import annotations

import json

import pytest

from fastserve.plan.digest import canonical, digest_of
from fastserve.plan.revision import Revision, deciding
from fastserve.plan.stages import Stage
from fastserve.spec.serve import Serve


def section(**serve):
    return deciding(Serve.model_validate(serve))


def test_a_revision_survives_json_with_its_digest():
    found = Revision("chat", Stage.TRAIN, "k", "d", section(context=64, engine={"kvCache": "1GiB"}))
    again = Revision.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert again.digest == found.digest
    assert found.short == found.digest[:8]


def test_sizes_and_defaults_written_differently_are_one_revision():
    assert section(engine={"kvCache": "1GiB"}) == section(engine={"kvCache": "1024MiB"})
    assert section() == section(task="generate", engine={"prefixCaching": True})


def test_who_gives_way_changes_no_answer():
    assert section(priority=7) == section()


def test_the_options_of_mlfq_decide_and_are_part_of_no_other_revision():
    plain = section(scheduler="mlfq")
    assert plain == section(scheduler="mlfq", schedulerOptions={"levels": 3, "starvation": "30s"})
    assert plain != section(scheduler="mlfq", schedulerOptions={"quantum": 50})
    assert "schedulerOptions" not in section()
    found = Revision("chat", Stage.TRAIN, "k", "d", section(scheduler="mlfq", schedulerOptions={"starvation": "1.5m"}))
    assert found.section().scheduler_options.starvation == 90


def test_the_section_can_be_read_back():
    found = Revision("chat", Stage.TRAIN, "k", "d", section(context=64, engine={"kvCache": "1GiB", "maxSequences": 3}))
    assert (found.section().context, found.section().engine.kv_cache) == (64, 2**30)


def test_of_adapters_only_the_largest_rank_decides():
    serve = Serve.model_validate({"adapters": [{"name": "de", "source": "s3://b/de"}]})
    found = Revision("chat", Stage.TRAIN, "k", "d", deciding(serve, [8, 48]))
    assert (found.lora_rank, found.section().adapters) == (64, [])
    assert found.digest == Revision("chat", Stage.TRAIN, "k", "d", deciding(Serve(), [64])).digest
    assert Revision("chat", Stage.TRAIN, "k", "d", deciding(serve)).lora_rank == 0


def test_equal_values_have_one_digest():
    assert digest_of({"a": 2e8, "b": (1, 2)}) == digest_of({"b": [1.0, 2], "a": 200000000})
    assert canonical({"b": -0.0, "a": "é"}) == '{"a":"é","b":0}'
    assert digest_of({"a": 0.1}) != digest_of({"a": 0.2})


def test_true_is_not_one():
    assert digest_of(True) != digest_of(1)


def test_what_is_no_number_has_no_digest():
    with pytest.raises(ValueError):
        digest_of(float("nan"))
