"""Which tokens are trained, and what becomes of rows that teach nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.artifacts.tokenizer import TokenizerFiles
from fastserve.data.samples import (
    CANNOT_PRINT_TOOL_CALLS,
    NO_ASSISTANT_MESSAGE,
    ONE_TOKEN,
    SampleSet,
    SampleStream,
    dataset_facts,
    samples,
)
from fastserve.errors import DatasetInvalid, SourceInvalid
from fastserve.plan.facts import DatasetFacts


def read(smol: TokenizerFiles, path: Path, max_length: int, template: str | None = None) -> SampleSet:
    return samples([path], smol.tokenizer(), template or smol.chat_template, max_length, special=smol.special)


@pytest.mark.parametrize("name", ["01-bom-crlf.jsonl", "01-clean.jsonl"])
def test_case_01_rows_tokens_and_trained_tokens(smol: TokenizerFiles, cases: Path, name: str) -> None:
    assert read(smol, cases / name, 256).facts == DatasetFacts(rows=3, used=3, tokens=163, trained_tokens=40)


def test_case_01_the_token_ids_are_equal_one_for_one(smol: TokenizerFiles, cases: Path) -> None:
    dirty, clean = (read(smol, cases / name, 256) for name in ("01-bom-crlf.jsonl", "01-clean.jsonl"))
    assert [(list(a.ids), a.trained) for a in dirty.samples] == [(list(a.ids), a.trained) for a in clean.samples]
    texts = [smol.tokenizer().decode(list(sample.ids), skip_special_tokens=False) for sample in dirty.samples]
    assert not any("\ufeff" in text or "\r" in text for text in texts)


def test_the_trained_tokens_are_the_answer_and_its_end(smol: TokenizerFiles, cases: Path) -> None:
    sample = read(smol, cases / "01-clean.jsonl", 256).samples[0]
    trained = [token for token, flag in zip(sample.ids, sample.trained, strict=True) if flag]
    assert smol.tokenizer().decode(trained, skip_special_tokens=False) == "It left the depot this morning.<|im_end|>"


def test_case_03_truncation_comes_before_the_question_what_is_left(smol: TokenizerFiles, cases: Path) -> None:
    short = read(smol, cases / "03-long-rows.jsonl", 128).facts
    assert (short.rows, short.used, short.trained_tokens, short.truncated) == (3, 2, 8 + 92, 1)
    assert short.left_out == {"no assistant token within maxLength": 1}
    long = read(smol, cases / "03-long-rows.jsonl", 1024).facts
    assert (long.used, long.trained_tokens, long.truncated, long.left_out) == (3, 8 + 4 + 184, 0, {})


def test_case_03_a_row_left_out_leaves_no_trace(smol: TokenizerFiles, cases: Path, tmp_path: Path) -> None:
    lines = (cases / "03-long-rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "by-hand.jsonl").write_text(lines[0] + lines[2])
    whole = read(smol, cases / "03-long-rows.jsonl", 128).samples
    by_hand = read(smol, tmp_path / "by-hand.jsonl", 128).samples
    assert [(a.ids, a.trained) for a in whole] == [(a.ids, a.trained) for a in by_hand]


def test_case_03_a_set_that_teaches_nothing_is_refused_with_the_length_that_fits(
    smol: TokenizerFiles, cases: Path
) -> None:
    with pytest.raises(DatasetInvalid) as caught:
        read(smol, cases / "03-only-long.jsonl", 128)
    assert "maxLength: 128" in str(caught.value)
    assert "586" in str(caught.value)
    assert read(smol, cases / "03-only-long.jsonl", 586).facts.truncated == 0


def test_the_limit_goes_by_the_name_it_has_in_the_manifest(smol: TokenizerFiles, cases: Path) -> None:
    with pytest.raises(DatasetInvalid, match="context: 128"):
        samples([cases / "03-only-long.jsonl"], smol.tokenizer(), smol.chat_template, 128, limit_name="context")


def test_case_05_calls_that_the_template_cannot_print_are_left_out_by_name(smol: TokenizerFiles, cases: Path) -> None:
    one, two = (read(smol, cases / name, 256) for name in ("05-tools.parquet", "05-tools.jsonl"))
    assert one.facts == two.facts
    assert (one.facts.rows, one.facts.left_out) == (3, {CANNOT_PRINT_TOOL_CALLS: 2})
    assert [sample.ids for sample in one.samples] == [sample.ids for sample in two.samples]


def test_case_05_a_template_that_prints_calls_shows_exactly_their_arguments(smol: TokenizerFiles, cases: Path) -> None:
    prints = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    one, two = (read(smol, cases / name, 256, prints) for name in ("05-tools.parquet", "05-tools.jsonl"))
    assert [sample.ids for sample in one.samples] == [sample.ids for sample in two.samples]
    texts = [smol.tokenizer().decode(list(sample.ids), skip_special_tokens=False) for sample in one.samples]
    assert '{"city": "Oslo"}' in texts[0]
    assert '{"city": "Rome", "unit": "F"}' in texts[1]
    assert not any(word in text for text in texts for word in ("None", "null"))


def test_rows_without_an_answer_are_counted(smol: TokenizerFiles, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n{"prompt": "Hi", "output": "Hello"}\n')
    assert read(smol, path, 64).facts.left_out == {NO_ASSISTANT_MESSAGE: 1}


def test_an_empty_file_is_refused(smol: TokenizerFiles, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(DatasetInvalid, match=r"rows\.jsonl: the data set is empty"):
        read(smol, tmp_path / "rows.jsonl", 64)


def test_all_of_a_text_row_is_trained_but_its_first_token(smol: TokenizerFiles, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("The sun is a star.\n")
    sample = read(smol, tmp_path / "rows.txt", 64).samples[0]
    assert sample.trained == [False] + [True] * (len(sample.ids) - 1)


def test_chat_rows_need_a_template(smol: TokenizerFiles, cases: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceInvalid, match=r"01-clean\.jsonl:1: .*no chat template"):
        samples([cases / "01-clean.jsonl"], smol.tokenizer(), None, 64)
    (tmp_path / "rows.txt").write_text("The sun is a star.\n")
    assert samples([tmp_path / "rows.txt"], smol.tokenizer(), None, 64).facts.used == 1


def test_a_refusing_template_is_told_with_the_row(smol: TokenizerFiles, cases: Path) -> None:
    with pytest.raises(DatasetInvalid, match=r"01-clean\.jsonl:1: .*not today"):
        read(smol, cases / "01-clean.jsonl", 64, "{{ raise_exception('not today') }}")


def test_longer_rows_are_dropped_where_that_is_asked_for(smol: TokenizerFiles, cases: Path) -> None:
    def facts(max_length: int) -> DatasetFacts:
        return dataset_facts(
            [cases / "03-long-rows.jsonl"],
            smol.tokenizer(),
            smol.chat_template,
            max_length,
            special=smol.special,
            over_length="drop",
        )

    short = facts(128)
    assert (short.rows, short.used, short.truncated, short.trained_tokens) == (3, 1, 0, 8)
    assert short.left_out == {"longer than maxLength": 2}
    assert facts(1024).left_out == {}


def test_a_set_that_is_dropped_whole_is_refused_with_the_length_that_fits(smol: TokenizerFiles, cases: Path) -> None:
    with pytest.raises(DatasetInvalid, match=r"4 rows: longer than maxLength.*fits with maxLength: 586"):
        samples([cases / "03-only-long.jsonl"], smol.tokenizer(), smol.chat_template, 128, over_length="drop")


def test_a_stream_gives_the_same_samples_and_facts(smol: TokenizerFiles, quickstart_data: Path) -> None:
    path = quickstart_data / "quickstart-train.jsonl"
    whole = samples([path], smol.tokenizer(), smol.chat_template, 40, special=smol.special)
    stream = SampleStream([path], smol.tokenizer(), smol.chat_template, 40, special=smol.special, digests=False)
    first = next(iter(stream))
    assert first.digest == ""
    stream = SampleStream([path], smol.tokenizer(), smol.chat_template, 40, special=smol.special, digests=False)
    assert [(s.ids, s.trained, s.place) for s in stream] == [(s.ids, s.trained, s.place) for s in whole.samples]
    assert stream.facts == whole.facts
    assert whole.facts.truncated > 0


def test_text_and_chat_rows_keep_their_order(smol: TokenizerFiles, tmp_path: Path) -> None:
    lines = ['{"text": "One."}', '{"prompt": "Two?", "output": "Two."}', '{"text": "Three."}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    found = samples([tmp_path], smol.tokenizer(), smol.chat_template, 64, special=smol.special).samples
    assert [sample.place for sample in found] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]
    texts = [smol.tokenizer().decode(list(sample.ids), skip_special_tokens=False) for sample in found]
    assert (texts[0], texts[2]) == ("One.", "Three.")


def test_a_text_row_of_one_token_says_why_it_is_left_out(smol: TokenizerFiles, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "One two."}\n')
    assert samples([tmp_path], smol.tokenizer(), None, 64).facts.left_out == {ONE_TOKEN: 1}


def test_a_tokenizer_that_cuts_by_itself_does_not(smol: TokenizerFiles, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "The sun is a star, and the moon is not."}\n')
    tokenizer = smol.tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    (sample,) = samples([tmp_path], tokenizer, None, 64).samples
    assert tokenizer.decode(list(sample.ids)) == "The sun is a star, and the moon is not."
