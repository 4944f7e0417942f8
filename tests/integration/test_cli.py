"""The command line, end to end on a model of few parameters, and every wrong input it must catch."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from ftw import cli
from ftw.errors import ConfigurationError, MissingDependencyError
from ftw.experiment import compare, data, extras, models, report
from ftw.experiment.methods import METHODS, override, parse
from ftw.experiment.sources import demo_data

for package in extras.NEEDED:
    pytest.importorskip(package, reason="`ftw run` needs the extras hf and plot")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
CONSOLE_SCRIPT = "import sys; from ftw.cli import main; sys.exit(main())"
QUICK = ["--steps", "4", "--pretrain-steps", "3", "--pool-size", "8", "--curve-samples", "16", "--plain"]


@pytest.fixture(autouse=True)
def small_world(tmp_path, monkeypatch):
    """A tiny `tiny`, its cache and the working folder in a temporary place, and no way out to a network."""

    def refuse(*args, **kwargs):
        raise AssertionError("a network connection was attempted")

    monkeypatch.setattr(models, "ARCHITECTURE", SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def files(tmp_path):
    """The demo's data as JSONL: a pool in two files, a target and a test set."""
    made = demo_data(0, pool=120, target=20, test=24, generic=1)
    parts = {"a": made.pool[:60], "b": made.pool[60:], "target": made.target, "test": made.test}
    for name, samples in parts.items():
        write(tmp_path / f"{name}.jsonl", *(json.dumps(vars(sample)) for sample in samples))
    return tmp_path


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(*options: str) -> int:
    return cli.main(["run", "--pool", "a.jsonl", "b.jsonl", "--target", "target.jsonl", *QUICK, *options])


def result(folder: str = "out") -> dict:
    return json.loads((Path(folder) / "result.json").read_text())


def losses(folder: str = "out") -> dict[tuple[str, int], list]:
    return {(each["method"], each["seed"]): each["curve"] for each in result(folder)["runs"]}


class TestRun:
    def test_compares_methods_and_writes_everything(self, files, capsys):
        code = run("--eval", "test.jsonl", "--method", "ours,random,full", "--seed", "0,1", "--out", "out")
        shown = capsys.readouterr()
        assert code == 0, shown.err
        found = result()
        assert [(each["method"], each["seed"]) for each in found["runs"]] == [
            (method, seed) for seed in (0, 1) for method in ("ours", "random", "full")
        ]
        by_method = {each["method"]: each for each in found["runs"]}
        assert by_method["full"]["trained"] == by_method["full"]["passed"] == 4 * 8
        assert by_method["random"]["trained"] == by_method["random"]["passed"] == 4 * 2
        assert by_method["ours"]["trained"] <= 4 * 2
        assert by_method["ours"]["passed"] > 4 * 8  # all candidates, and the target's samples
        for each in found["runs"]:
            assert sum(each["weight_share"].values()) == pytest.approx(1)
            assert sum(each["statuses"].values()) == 4
            assert [step for step, _ in each["curve"]] == [0, 1, 2, 3, 4]
        assert (Path("out") / "result.png").read_bytes().startswith(b"\x89PNG")
        assert found["evaluated_on"] == "test.jsonl, all 24 samples"
        assert found["settings"]["budget"] == 2
        assert found["versions"]["torch"] == torch.__version__
        assert "ours ends" in shown.out
        assert "Share of the weight per source" in shown.out

    def test_plain_output_holds_no_control_characters(self, files, capsys):
        assert run("--method", "random,full", "--out", "out") == 0
        shown = capsys.readouterr()
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\x80-\x9f]", shown.out + shown.err)
        assert "random, seed 0: step 4/4, loss" in shown.err

    def test_same_seed_same_figures_and_same_start(self, files):
        for folder in ("one", "two"):
            assert run("--method", "ours,random", "--out", folder) == 0
        assert losses("one") == losses("two")
        assert run("--method", "random,full", "--seed", "1", "--out", "three") == 0
        assert losses("three")["random", 1] != losses("one")["random", 0]
        starts = {curve[0][1] for folder in ("one", "three") for curve in losses(folder).values()}
        assert len(starts) == 1

    def test_order_of_methods_changes_nothing(self, files):
        assert run("--method", "random,full", "--out", "one") == 0
        assert run("--method", "full,random", "--out", "two") == 0
        assert losses("one") == losses("two")

    def test_every_method_runs(self, files):
        assert run("--method", ",".join(METHODS), "--steps", "12", "--out", "out") == 0
        found = {each["method"]: each for each in result()["runs"]}
        assert found.keys() == METHODS.keys()
        assert all(each["final_loss"] is not None for each in found.values())

    def test_components_of_ours_can_be_changed(self, files):
        options = ("--filter", "topk", "--solver", "uniform", "--geometry", "vanilla")
        assert run("--method", "ours,vanilla_topk", *options, "--out", "out") == 0
        ours, rival = result()["runs"]
        assert ours["method"] == "ours (filter=topk, solver=uniform, geometry=vanilla)"
        assert ours["curve"] == rival["curve"]

    def test_without_eval_a_part_of_the_target_is_held_out(self, files):
        assert run("--method", "random", "--out", "out") == 0
        assert result()["evaluated_on"] == "a held-out quarter of target.jsonl, all 5 samples"
        assert result()["data"]["target"]["used"] == 15

    def test_a_target_too_small_to_split_is_named_as_what_it_is(self, files):
        lines = Path("target.jsonl").read_text().splitlines()
        write(Path("target.jsonl"), *lines[:6])
        assert run("--method", "random", "--out", "out") == 0
        assert "also steers the selection" in result()["evaluated_on"]

    def test_cut_and_skipped_samples_are_counted(self, files, capsys):
        write(Path("b.jsonl"), json.dumps({"prompt": "x" * 200, "response": "y", "source": "long"}))
        assert run("--method", "random", "--max-length", "96", "--out", "out") == 0
        assert result()["data"]["pool"]["prompt too long, left out"] == 1
        assert "prompt too long, left out" in capsys.readouterr().err

    @pytest.mark.parametrize(("name", "place"), [("a", "pool"), ("target", "target")])
    def test_warns_of_test_samples_that_training_sees(self, files, capsys, name, place):
        assert run("--method", "random", "--eval", f"{name}.jsonl", "--out", "out") == 0
        assert f"stand in the {place} too" in capsys.readouterr().err

    def test_lora(self, files):
        pytest.importorskip("peft", reason="LoRA adapters come from peft")
        assert run("--method", "ours,random", "--lora", "--lora-rank", "2", "--out", "out") == 0
        assert "LoRA of rank 2" in result()["model"]

    def test_a_local_model_folder(self, files, tmp_path):
        import transformers

        tokenizer = models.tiny_tokenizer()
        config = transformers.LlamaConfig(vocab_size=len(tokenizer), **SMALL)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        command = ["run", "--pool", "a.jsonl", "--target", "target.jsonl", "--model", "model", "--out", "out"]
        command += ["--steps", "2", "--pool-size", "8", "--method", "ours,random", "--plain"]
        assert cli.main(command) == 0
        assert result()["settings"]["lr"] == 2e-5
        assert result()["data"]["pool"]["used"] == 60  # nothing is set aside for pre-training


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({"lr_warmup": 0, "lr_decay": False}, [1, 1, 1, 1]),
        ({"lr_warmup": 0, "lr_decay": True}, [1, 0.75, 0.5, 0.25]),
        ({"lr_warmup": 1, "lr_decay": False}, [0.5, 1, 1, 1]),
        ({"lr_warmup": 2, "lr_decay": True}, [1 / 3, 2 / 3, 1, 0.5]),
        ({"lr_warmup": 9, "lr_decay": True}, [0.1, 0.2, 0.3, 0.4]),
    ],
)
def test_learning_rate_schedule(settings, factors):
    factor = compare._schedule(compare.Settings(steps=4, pool_size=8, budget=2, lr=1.0, **settings))
    assert [factor(step) for step in range(4)] == pytest.approx(factors)


class TestDemo:
    def test_needs_no_file(self, capsys):
        assert cli.main(["demo", *QUICK]) == 0
        assert Path("runs/demo/result.png").is_file()
        assert {each["method"] for each in result("runs/demo")["runs"]} == {"ours", "random", "full"}
        assert set(result("runs/demo")["pool_share"]) == {"useful", "redundant", "irrelevant", "corrupted"}
        assert "ftw demo --filter topk" in capsys.readouterr().out


def test_a_diverged_run_is_reported_as_one(tmp_path):
    nan = float("nan")
    runs = [compare.Run(name, 0, [(0, 3.0), (1, nan)], nan, 4, 4, 1.0, {"s": 4.0}) for name in ("ours", "random")]
    report.write_json(tmp_path / "r.json", {}, runs)
    report.write_figure(tmp_path / "r.png", runs, "test", {"s": 1.0})
    assert json.loads((tmp_path / "r.json").read_text())["runs"][0]["final_loss"] is None
    assert report.verdicts(report.summarise(runs)) == [
        "ours against random: a loss is not finite, so nothing can be said."
    ]


class TestTinyCache:
    @pytest.fixture
    def rows(self):
        return data.encode(demo_data(0, generic=40).generic, models.tiny_tokenizer(), 96, loss_on_prompt=True).rows

    def test_is_built_once_and_read_back_exactly(self, rows, tmp_path):
        settings = models.Pretraining(steps=2)
        built, first = models.tiny(rows, settings, tmp_path / "c")
        cached, second = models.tiny(rows, settings, tmp_path / "c")
        assert (first, second) == ("built", "cached")
        assert all(torch.equal(a, b) for a, b in zip(built.parameters(), cached.parameters(), strict=True))
        assert [path.suffix for path in (tmp_path / "c").iterdir()] == [".safetensors"]

    @pytest.mark.parametrize("damage", [b"", b"not a model", None])
    def test_a_damaged_file_is_built_anew(self, rows, tmp_path, damage):
        settings = models.Pretraining(steps=2)
        built, _ = models.tiny(rows, settings, tmp_path / "c")
        (path,) = (tmp_path / "c").iterdir()
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
        again, done = models.tiny(rows, settings, tmp_path / "c")
        assert done == "built"
        assert all(torch.equal(a, b) for a, b in zip(built.parameters(), again.parameters(), strict=True))
        assert path.read_bytes() == whole

    def test_other_data_steps_or_seed_are_another_model(self, rows, tmp_path):
        for used, settings in (
            (rows, models.Pretraining(steps=1)),
            (rows, models.Pretraining(steps=2)),
            (rows, models.Pretraining(steps=1, seed=1)),
            (rows[:20], models.Pretraining(steps=1)),
        ):
            assert models.tiny(used, settings, tmp_path / "c")[1] == "built"
        assert len(list((tmp_path / "c").iterdir())) == 4

    def test_a_cache_that_cannot_be_written_is_done_without(self, rows, tmp_path):
        (tmp_path / "file").write_text("")
        assert models.tiny(rows, models.Pretraining(steps=1), tmp_path / "file" / "c")[1] == "built"

    def test_folder_follows_xdg(self, tmp_path, monkeypatch):
        assert models.cache_folder() == tmp_path / "cache" / "ftw"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert models.cache_folder() == Path.home() / ".cache" / "ftw"


BAD_OPTIONS = [
    (("--budget", "0"), "--budget is 0; allowed are an integer from 1 to --pool-size 8"),
    (("--budget", "9"), "--budget is 9"),
    (("--budget", "1.5"), "--budget is 1.5"),
    (("--budget", "0.0"), "--budget is 0.0"),
    (("--budget", "nan"), "is no number"),
    (("--budget", "much"), "'much' is no number"),
    (("--method", "ours,randon"), "unknown method 'randon'; did you mean 'random'?"),
    (("--method", ","), "one or more different names"),
    (("--method", "full,full"), "one or more different names"),
    (("--filter", "topkk"), "unknown filter 'topkk'; did you mean 'topk'?"),
    (("--solver", "pdg"), "unknown solver 'pdg'; did you mean 'pgd'?"),
    (("--gradients", "ful"), "unknown gradient extractor 'ful'; did you mean 'full'?"),
    (("--geometry", "round"), "invalid choice: 'round'"),
    (("--method", "random", "--filter", "topk"), "add it to --method or drop the option"),
    (("--method", "random,ours", "--geometry", "update", "--objective", "utility"), "has no meaning"),
    (("--steps", "0"), "--steps is 0; an integer from 1 on is needed"),
    (("--steps", "-3"), "--steps is -3"),
    (("--steps", "few"), "argument --steps"),
    (("--pool-size", "0"), "--pool-size is 0"),
    (("--pool-size", "500"), "the pool has 96 usable samples"),
    (("--refresh", "0"), "--refresh is 0"),
    (("--target-batches", "0"), "--target-batches is 0"),
    (("--target-batches", "none"), "neither an integer nor 'all'"),
    (("--eval-every", "0"), "--eval-every is 0"),
    (("--seed", ""), "--seed is empty"),
    (("--seed", "1,1"), "--seed is 1,1"),
    (("--seed", "a"), "no list of integers"),
    (("--lr", "0"), "--lr is 0.0"),
    (("--lr", "nan"), "--lr is nan"),
    (("--threads", "0"), "--threads is 0"),
    (("--lora-rank", "4"), "--lora-rank is given without --lora"),
    (("--device", "nowhere"), "--device is 'nowhere'"),
    (("--max-length", "5"), "leaves room for a response"),
    (("--model", "nowhere"), "--pretrain-steps is given with model nowhere"),
    (("--eval", "none.jsonl"), "cannot read none.jsonl"),
    (("--out", "a.jsonl/out"), "cannot write to a.jsonl/out"),
    (("--colour",), "unrecognized arguments: --colour"),
]


class TestBadInput:
    @pytest.fixture(autouse=True)
    def no_training(self, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("training began")

        monkeypatch.setattr(compare, "_train", refuse)

    def check(self, code: int, capsys, message: str) -> None:
        shown = capsys.readouterr()
        assert code == 2
        assert shown.out == ""
        *notes, line = shown.err.splitlines()
        assert line.startswith("ftw: error: ")
        assert message in line
        assert not any("Traceback" in note or "error" in note for note in notes)

    @pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[" ".join(bad) for bad, _ in BAD_OPTIONS])
    def test_options(self, files, capsys, options, message):
        self.check(run(*options), capsys, message)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "a.jsonl, line 2: not valid JSON"),
            ('"text"', "a.jsonl, line 2: a JSON str, not an object"),
            ('{"prompt": "p", "source": "s"}', "a.jsonl, line 2: no field 'response'"),
            ('{"prompt": "p", "response": 4, "source": "s"}', "a.jsonl, line 2: field 'response' is a int"),
            ('{"prompt": "p", "response": "", "source": "s"}', "a.jsonl, line 2: the response is empty"),
        ],
    )
    def test_lines(self, files, capsys, line, message):
        lines = Path("a.jsonl").read_text().splitlines()
        write(Path("a.jsonl"), lines[0], line, *lines[1:])
        self.check(run(), capsys, message)

    @pytest.mark.parametrize("name", ["a", "target"])
    def test_missing_and_empty_files(self, files, capsys, name):
        Path(f"{name}.jsonl").write_text("")
        self.check(run(), capsys, f"{name}.jsonl holds no sample")
        Path(f"{name}.jsonl").unlink()
        self.check(run(), capsys, f"cannot read {name}.jsonl")

    def test_model_folders(self, files, tmp_path, capsys):
        command = ["run", "--pool", "a.jsonl", "--target", "target.jsonl", "--model", "model"]
        self.check(cli.main(command), capsys, "no model folder model")
        Path("model").mkdir()
        self.check(cli.main(command), capsys, "has no config.json")
        Path("model/config.json").write_text("{}")
        self.check(cli.main(command), capsys, "has no *.safetensors")
        Path("model/model.safetensors").write_text("")
        self.check(cli.main(command), capsys, "model cannot be loaded")

    def test_a_command_is_needed(self, capsys):
        self.check(cli.main([]), capsys, "arguments are required")
        self.check(cli.main(["train"]), capsys, "invalid choice: 'train'")

    def test_missing_packages(self, files, capsys, monkeypatch):
        monkeypatch.setattr(extras, "NEEDED", ("transformers", "no_such_package"))
        self.check(run(), capsys, "pip install 'filter-then-weight[hf,plot]'")
        with pytest.raises(MissingDependencyError, match="no_such_package"):
            extras.optional("no_such_package.part")

    def test_an_interrupt_is_no_error(self, files, capsys, monkeypatch):
        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(compare, "_train", interrupt)
        assert run() == 130
        assert "interrupted" in capsys.readouterr().err


class TestMethods:
    def test_names_stand_for_themselves(self):
        assert all(name == method.name for name, method in METHODS.items())
        assert [method.name for method in parse(" full , ours")] == ["full", "ours"]

    def test_an_override_that_changes_nothing_is_no_change(self):
        (ours,) = override(parse("ours"), {"filter": "greedy", "solver": None})
        assert ours.label == "ours"

    def test_closed_form_comes_without_bounds(self):
        (ours,) = override(parse("ours"), {"solver": "closed_form"})
        assert ours.label == "ours (solver=closed_form, no bounds)"
        assert ours.arguments() | {"constraints": None} == METHODS["unbounded"].arguments() | {"constraints": None}
        assert not ours.preset.bounded

    def test_an_override_needs_ours(self):
        with pytest.raises(ConfigurationError, match="add it to --method"):
            override(parse("random"), {"geometry": "vanilla"})


class TestList:
    def test_names_components_and_methods(self, capsys):
        assert cli.main(["list"]) == 0
        shown = capsys.readouterr().out
        for name in ("greedy", "pgd", "adamw", "factorized", *METHODS):
            assert re.search(rf"^  {name} ", shown, flags=re.MULTILINE)
        assert "filter-then-weight" in shown

    def test_imports_no_component(self):
        code = (
            "import sys; from ftw import cli; cli.main(['list']);"
            "heavy = {'transformers', 'matplotlib', 'peft', 'cvxpy', 'rich'} & set(sys.modules);"
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("command", [[sys.executable, "-m", "ftw"], [sys.executable, "-c", CONSOLE_SCRIPT]])
def test_the_version_is_the_installed_one(command):
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"ftw {metadata.version('filter-then-weight')}\n", "")


def test_the_module_is_the_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "ftw", "list"], capture_output=True, text=True, check=True)
    assert "greedy" in done.stdout
    wrong = subprocess.run([sys.executable, "-m", "ftw", "train"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "invalid choice: 'train'" in wrong.stderr


@pytest.mark.parametrize("command", [["list"], ["--help"]])
def test_a_reader_that_has_seen_enough_is_no_error(command):
    """As `ftw list | head`: the pipe is closed before, or while, anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "ftw", *command], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode in (0, 141)


def test_tiny_may_go_without_pretraining() -> None:
    from ftw.experiment import data, models

    rows = data.encode([data.Sample("a", "b", "s")], models.tiny_tokenizer(), 16, loss_on_prompt=True).rows
    model, done = models.tiny(rows, models.Pretraining(steps=0), None)
    assert done == "built"
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path) -> None:
    from ftw.experiment import data

    path = tmp_path / "marked.jsonl"
    path.write_text('{"prompt": "a", "response": "b", "source": "s"}\n', encoding="utf-8-sig")
    assert data.read_samples(path) == [data.Sample("a", "b", "s")]
