"""The data of `ftw run` and `ftw demo`: reading, encoding, batches, order, splits, generated sources."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from ftw.errors import DataError
from ftw.experiment import data, sources
from ftw.experiment.data import Sample

transformers = pytest.importorskip("transformers", reason="byte tokens come from transformers")


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.ByT5Tokenizer(extra_ids=0)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


GOOD = '{"prompt": "2 + 2?", "response": "4", "source": "sums"}'


class TestReading:
    def test_reads_lines_and_passes_over_blank_ones(self, tmp_path):
        path = write(tmp_path / "a.jsonl", GOOD, "", GOOD)
        assert data.read_samples(path) == [Sample("2 + 2?", "4", "sums")] * 2

    def test_reads_several_files_in_order(self, tmp_path):
        first = write(tmp_path / "a.jsonl", GOOD)
        second = write(tmp_path / "b.jsonl", GOOD.replace("sums", "more"))
        assert [sample.source for sample in data.read_all([first, second])] == ["sums", "more"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"prompt": ', "not valid JSON"),
            ("[1, 2]", "JSON list, not an object"),
            ('{"prompt": "a", "source": "s"}', "no field 'response'"),
            ('{"prompt": "a", "response": "b"}', "no field 'source'"),
            ('{"prompt": 3, "response": "b", "source": "s"}', "field 'prompt' is a int"),
            ('{"prompt": "a", "response": null, "source": "s"}', "field 'response' is a NoneType"),
            ('{"prompt": "a", "response": " \\n", "source": "s"}', "response is empty"),
        ],
    )
    def test_names_file_and_line_of_what_is_malformed(self, tmp_path, line, message):
        path = write(tmp_path / "a.jsonl", GOOD, line)
        with pytest.raises(DataError) as caught:
            data.read_samples(path)
        assert message in str(caught.value)
        assert f"{path}, line 2" in str(caught.value)

    def test_refuses_missing_empty_and_binary_files(self, tmp_path):
        with pytest.raises(DataError, match="cannot read"):
            data.read_samples(tmp_path / "none.jsonl")
        with pytest.raises(DataError, match="cannot read"):
            data.read_samples(tmp_path)
        with pytest.raises(DataError, match="holds no sample"):
            data.read_samples(write(tmp_path / "empty.jsonl", ""))
        (tmp_path / "latin.jsonl").write_bytes(GOOD.replace("sums", "süms").encode("latin-1"))
        with pytest.raises(DataError, match="not UTF-8"):
            data.read_samples(tmp_path / "latin.jsonl")


class TestEncoding:
    def test_loss_falls_on_response_and_end(self, tokenizer):
        (row,) = data.encode([Sample("ab", "cde", "s")], tokenizer, 100).rows
        text = tokenizer.decode([token for token in row.labels if token != data.IGNORED])
        assert text == "cde" + tokenizer.eos_token
        assert tokenizer.decode(row.input_ids) == "ab\ncde" + tokenizer.eos_token
        assert row.labels[:3] == [data.IGNORED] * 3
        assert row.labels[3:] == row.input_ids[3:]

    def test_pretraining_text_has_labels_everywhere(self, tokenizer):
        (row,) = data.encode([Sample("ab", "cde", "s")], tokenizer, 100, loss_on_prompt=True).rows
        assert row.labels == row.input_ids

    def test_counts_what_it_cuts_and_what_it_leaves_out(self, tokenizer):
        samples = [Sample("ab", "cd", "s"), Sample("ab", "c" * 20, "s"), Sample("a" * 10, "c", "s")]
        encoded = data.encode(samples, tokenizer, 10)
        assert (len(encoded.rows), encoded.truncated, encoded.skipped) == (2, 1, 1)
        assert all(len(row.input_ids) <= 10 for row in encoded.rows)
        assert all(any(label != data.IGNORED for label in row.labels) for row in encoded.rows)

    def test_sets_bos_where_the_tokenizer_does(self, tokenizer):
        class WithBos:
            bos_token_id, eos_token_id = 300, None

            def __call__(self, text, add_special_tokens=True):
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                return {"input_ids": [300, *ids] if add_special_tokens else ids}

        (row,) = data.encode([Sample("a", "b", "s")], WithBos(), 100).rows
        assert row.input_ids[0] == 300
        assert row.input_ids.count(300) == 1
        assert len(row.input_ids) == 4


class TestBatches:
    def test_pads_on_the_right_outside_attention_and_loss(self, tokenizer):
        rows = data.encode([Sample("a", "b", "s"), Sample("a", "bcdef", "s")], tokenizer, 100).rows
        batch = data.collate(rows, pad=0)
        assert batch["input_ids"].shape == (2, 8)
        assert batch["attention_mask"].tolist()[0] == [1, 1, 1, 1, 0, 0, 0, 0]
        assert batch["labels"][0, 4:].eq(data.IGNORED).all()
        assert data.label_tokens(batch).tolist() == [2, 6]

    def test_mass_is_the_share_of_the_token_mean(self, tokenizer):
        """`sum_i mu_i loss_i / n` is the model's own loss: so label tokens are the right mass."""
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        model = transformers.LlamaForCausalLM(config)
        samples = [Sample("a", "b", "s"), Sample("abc", "bcdef", "s"), Sample("", "xyz", "s")]
        rows = data.encode(samples, tokenizer, 100).rows
        batch = data.collate(rows, pad=0)
        mass = data.label_tokens(batch).double()
        mass *= len(rows) / mass.sum()
        single = [model(**data.collate([row], pad=0)).loss.item() for row in rows]
        mixed = sum(m * loss for m, loss in zip(mass.tolist(), single, strict=True)) / len(rows)
        assert mixed == pytest.approx(model(**batch).loss.item(), rel=1e-5)

    def test_all_rows_in_order(self, tokenizer):
        rows = data.encode([Sample(str(i), "b", "s") for i in range(7)], tokenizer, 100).rows
        made = data.batches(rows, 3, pad=0)
        assert [batch["input_ids"].shape[0] for batch in made] == [3, 3, 1]
        assert [int(token) for batch in made for token in batch["input_ids"][:, 0]] == [r.input_ids[0] for r in rows]


class TestOrder:
    def test_epochs_are_permutations_and_differ(self):
        order = data.pool_order(size=12, pool_size=4, steps=6, seed=0)
        first, second = order[:3].flatten().tolist(), order[3:].flatten().tolist()
        assert sorted(first) == sorted(second) == list(range(12))
        assert first != second

    def test_follows_the_seed_and_leaves_the_global_generator_alone(self):
        before = torch.get_rng_state()
        assert torch.equal(data.pool_order(50, 8, 30, 3), data.pool_order(50, 8, 30, 3))
        assert not torch.equal(data.pool_order(50, 8, 30, 3), data.pool_order(50, 8, 30, 4))
        assert torch.equal(before, torch.get_rng_state())

    def test_no_step_offers_a_sample_twice_where_the_pool_does_not_divide(self):
        order = data.pool_order(size=10, pool_size=4, steps=9, seed=1)
        assert order.shape == (9, 4)
        assert all(len(set(step)) == 4 for step in order.tolist())


def test_split_takes_its_share_of_every_source():
    samples = [Sample(str(i), "r", source) for source, n in (("a", 40), ("b", 4), ("c", 1)) for i in range(n)]
    rest, part = data.split_off(samples, 0.2, seed=0)
    assert Counter(sample.source for sample in part) == {"a": 8, "b": 1}
    assert sorted(rest + part, key=samples.index) == samples
    assert (rest, part) == data.split_off(samples, 0.2, seed=0)


@pytest.fixture(scope="module")
def made():
    return sources.demo_data(0)


class TestSources:
    def test_follows_the_seed(self, made):
        assert sources.demo_data(0) == made
        assert sources.demo_data(1).pool != made.pool

    def test_sizes_and_proportions(self, made):
        assert (len(made.pool), len(made.target), len(made.test)) == (1600, 32, 192)
        counts = Counter(sample.source for sample in made.pool)
        assert {source: n / 1600 for source, n in counts.items()} == pytest.approx(dict(sources.SHARES))

    def test_no_test_prompt_is_seen_in_training(self, made):
        seen = {sample.prompt for sample in made.pool + made.target + made.generic}
        assert not seen & {sample.prompt for sample in made.test}
        assert len({sample.prompt for sample in made.test}) == len(made.test)

    def test_sources_are_what_they_claim(self, made):
        def right(sample):
            left, answer = sample.response.split("=")
            return eval(left) == int(answer)

        def of(source):
            return [sample for sample in made.pool if sample.source == source]

        assert all(right(sample) for sample in (*made.target, *made.test, *of("useful"), *of("redundant")))
        assert len({sample.prompt for sample in of("redundant")}) == sources.DISTINCT_REDUNDANT
        assert len({sample.prompt for sample in of("useful")}) == len(of("useful"))
        truth = {sample.prompt: sample.response for sample in made.test + made.target}
        assert not truth.keys() & {sample.prompt for sample in of("corrupted")}
        assert not any("=" in sample.response for sample in of("irrelevant"))

    def test_rows_are_plain_jsonl(self, made, tmp_path):
        lines = [json.dumps(vars(sample)) for sample in made.pool[:50]]
        assert data.read_samples(write(tmp_path / "a.jsonl", *lines)) == made.pool[:50]
