"""The command: what it parses and prints, its messages and exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from deepseek_v3 import __version__, cli
from tests.finetuning import runs
from tests.training.helpers import fast_finish, pretrain_module, signal_after, tiny_recipe, write_corpus

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--preset", "tiny", "--set", "heldout_fraction=0.3", "--set", "model={vocab_size: 512}"]
SMALL += ["--set", "sequence_length=32", "--set", "batch_size=4", "--set", "dtype=fp32", "--set", "log_every=1"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def checkpoints(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Checkpoints with 1 and with no MTP layer."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        fast_finish(patch)
        for depth in (1, 0):
            output = tmp_path_factory.mktemp(f"mtp{depth}")
            model = {"vocab_size": 512, "num_nextn_predict_layers": depth}
            pretrain_module.pretrain(tiny_recipe(output, corpus, steps=2, model=model))
            found[depth] = output / "model"
    return found


def overrides(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict:
    """What the recipe is asked for by a command line; nothing is run."""
    import deepseek_v3.training

    seen: dict = {}

    class Fake:
        @staticmethod
        def load(path, **values):
            seen.update(values, path=path)
            raise ValueError("enough")

    monkeypatch.setattr(deepseek_v3.training, "Recipe", Fake)
    assert cli.main(["pretrain", *arguments]) == 1
    return seen


@pytest.mark.parametrize(
    "arguments", [["--help"], ["pretrain", "--help"], ["finetune", "--help"], ["generate", "--help"], ["--version"]]
)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    expected = {"--help": ["pretrain", "finetune", "generate"], "pretrain": ["--data", "--set", "--restart"]}
    expected |= {"finetune": ["recipe", "--set", "--restart"]}
    expected |= {"generate": ["checkpoint", "--drafts", "--chat"], "--version": [__version__]}
    for word in expected[arguments[0]]:
        assert word in printed


@pytest.mark.parametrize("arguments", [[], ["prettrain"], ["generate"], ["finetune"], ["pretrain", "--steps", "few"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2 and "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("stepz: 3", ["unknown field stepz"]),
        ("steps: many", ["steps", "'many'"]),
        ("batch_size: 0", ["batch_size", "1 to"]),
        ("model: {n_group: 3}\npreset: tiny", ["n_group"]),
        ("steps: [1", ["cannot be read"]),
    ],
)
def test_a_bad_recipe(tmp_path: Path, capsys: pytest.CaptureFixture, text: str, parts: list[str]) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    assert cli.main(["pretrain", str(path), "--output-dir", str(tmp_path / "run")]) == 1
    printed = capsys.readouterr()
    for part in (str(path), *parts):
        assert part in printed.err
    assert "Traceback" not in printed.err and not printed.out and not (tmp_path / "run").exists()


def test_errors_of_other_kinds(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = str(tmp_path / "missing.yaml")
    assert cli.main(["pretrain", missing]) == 1 and missing in capsys.readouterr().err
    text = str(tmp_path / "text")
    assert cli.main(["pretrain", *SMALL, "--data", text, "--output-dir", str(tmp_path / "run")]) == 1
    assert f"{text}: no such file or folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["generate", str(tmp_path / "empty"), "x"]) == 1
    assert str(tmp_path / "empty") in capsys.readouterr().err
    assert cli.main(["generate", str(tmp_path / "nowhere"), "x"]) == 1
    assert "nowhere" in capsys.readouterr().err
    monkeypatch.setattr(cli, "_pretrain", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["pretrain"]) == 130


def test_set(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "seed=3",
        "learning_rate=0.5",
        "heldout=null",
        "model={hidden_size: 32, n_group: 1}",
        "data=a=b",
        "tokenizer=",
    ]
    seen = overrides(monkeypatch, *(part for option in options for part in ("--set", option)))
    assert seen.pop("path").name == "quickstart.yaml"
    assert seen == {
        "seed": 3,
        "learning_rate": 0.5,
        "heldout": None,
        "model": {"hidden_size": 32, "n_group": 1},
        "data": "a=b",
        "tokenizer": None,
    }


def test_options_win_over_set_and_are_left_out_if_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(overrides(monkeypatch)) == {"path"}
    arguments = ["r.yaml", "--data", "x", "--heldout", "y", "--preset", "tiny", "--output-dir", "o", "--steps", "5"]
    seen = overrides(monkeypatch, *arguments, "--set", "steps=7", "--set", "data=z")
    assert seen == {"path": "r.yaml", "data": "x", "heldout": "y", "preset": "tiny", "output_dir": "o", "steps": 5}


@pytest.mark.parametrize("item", ["steps", "steps=[1", "=3", "stepz=3", "steps=x", "model={a: b: c}", "data=\x00"])
def test_a_bad_set_is_named(item: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["pretrain", "--output-dir", str(tmp_path / "run"), "--set", item]) == 1
    error = capsys.readouterr().err
    assert item.partition("=")[0] in error and "Traceback" not in error and not (tmp_path / "run").exists()
    assert error.startswith("deepseek-v3: ")


@pytest.mark.parametrize(
    "missing, command, extra",
    [
        ("accelerate", ["pretrain"], "train"),
        ("yaml", ["finetune", "r.yaml"], "train"),
        ("peft", ["finetune", "r.yaml"], "peft"),
        ("bitsandbytes", ["finetune", "r.yaml"], "quant"),
        ("sklearn", ["finetune", "r.yaml"], "domains"),
    ],
)
def test_a_missing_extra_is_named(missing: str, command: list[str], extra: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from deepseek_v3.cli import main; sys.exit(main({command}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{missing} is not installed: pip install 'deepseek-v3[{extra}]'" in done.stderr


def test_export_takes_options_of_the_format_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["export", str(tmp_path), "--format", "bf16", "--output", str(tmp_path / "out")]
    assert cli.main([*command, "--set", "progress=false"]) == 1
    assert "found progress, allowed are dtype" in capsys.readouterr().err


def test_what_evaluate_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    import deepseek_v3.evaluation

    seen: dict = {}

    def fake(checkpoint: str, **options: object) -> None:
        seen.update(options, checkpoint=checkpoint)
        raise ValueError("enough")

    monkeypatch.setattr(deepseek_v3.evaluation, "evaluate", fake)
    options = ["--tasks", "german-credit", "--set", "fold=3", "--set", "drop_sensitive=false", "--max-length", "256"]
    assert cli.main(["evaluate", "folder", *options]) == 1
    assert {name: value for name, value in seen.items() if value} == {
        "checkpoint": "folder",
        "tasks": ["german-credit"],
        "task_options": {"fold": 3, "drop_sensitive": False},
        "max_length": 256,
    }
    assert cli.main(["evaluate", "folder", "--tasks", "german-credit", "--set", "fold"]) == 1
    assert "'fold': expected FIELD=VALUE" in capsys.readouterr().err


def test_every_extra_that_may_be_missing_exists() -> None:
    text = (ROOT / "setup.py").read_text()
    assert all(f'"{extra}": [' in text for extra in cli.EXTRA_OF.values())


def test_numbers_in_scientific_notation(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["pretrain", *SMALL, "--data", str(tmp_path / "none"), "--output-dir", str(tmp_path / "run")]
    assert cli.main([*command, "--set", "learning_rate=1e-3"]) == 1
    assert "no such file" in capsys.readouterr().err  # the recipe was fine


def test_pretrain_reports_and_writes_the_card(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast_finish(monkeypatch)
    command = ["pretrain", *SMALL, "--data", str(corpus), "--output-dir", str(tmp_path), "--steps", "2"]
    for _ in range(2):  # the second call finds the run finished and reports it again
        assert cli.main(command) == 0
        printed = capsys.readouterr().out
        record = json.loads((tmp_path / "run.json").read_text())
        report = printed[printed.index("held-out bits per byte") :].splitlines()
        figures = {line[:24].strip(): line[24:] for line in report[1:5]}
        assert figures == {
            "this model": f"{record['heldout_bits_per_byte']:.3f}",
            "gzip -9": f"{record['baselines_bits_per_byte']['gzip']:.3f}",
            "5-gram": f"{record['baselines_bits_per_byte']['5-gram']:.3f}",
            "dense, equal compute": f"{record['baselines_bits_per_byte']['dense']:.3f}",
        }
        assert [float(value) for value in figures.values()] == sorted(map(float, figures.values()))
        assert "50.0% of 2 drafts accepted, 1.50 tokens per forward pass" in printed
        (tmp_path / "model" / "README.md").unlink()
    assert "this run is finished (2 steps)" in printed
    assert cli.main([*command[:-1], "3"]) == 1
    assert "finished run with steps = 2, the recipe has 3" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_with_the_same_command(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fast_finish(monkeypatch)
    command = ["pretrain", *SMALL, "--data", str(corpus), "--output-dir", str(tmp_path), "--steps", "4"]
    command += ["--set", "compare=false"]
    with monkeypatch.context() as patch:
        signal_after(patch, 2, number)
        assert cli.main(command) == 75
    error = capsys.readouterr().err
    assert "stopped at step 2 of 4" in error and "the same command goes on" in error
    assert (tmp_path / "checkpoints" / "step-2").is_dir() and not (tmp_path / "run.json").exists()
    assert cli.main(command) == 0
    assert "continuing at step 2" in capsys.readouterr().out
    assert not (tmp_path / "checkpoints").exists()


# --- finetune


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and a folder with two classes of texts."""
    folder = tmp_path_factory.mktemp("finetune")
    return runs.save_base(folder / "base"), runs.write_data(folder / "two", "two")


def finetune_command(folder: Path, tiny: tuple[Path, Path], *sets: str, **changes: object) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(vars(runs.recipe(*tiny, folder / "run", **changes))))
    return ["finetune", str(path), *(part for item in sets for part in ("--set", item))]


def test_finetune_reports_and_writes_the_cards(
    tmp_path: Path, tiny: tuple[Path, Path], capsys: pytest.CaptureFixture
) -> None:
    command = finetune_command(tmp_path, tiny, "epochs=1", "compare=true", merge=True)
    for _ in range(2):  # the second call finds the run finished and reports it again
        assert cli.main(command) == 0
        printed = capsys.readouterr().out
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        assert record["steps"] == 2 and record["recipe"]["epochs"] == 1
        for who, results in {"this model": record["test"], **record["baselines"]}.items():
            (line,) = [line for line in printed.splitlines() if line.split("  ")[0] == who]
            for name in ("accuracy", "macro_f1", "roc_auc"):
                figure = results[name]
                assert f"{name} {figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]" in line
            assert "perplexity" not in line
        assert f"of training; adapter, merged in {tmp_path / 'run'}" in printed
        for folder in ("adapter", "merged"):
            (tmp_path / "run" / folder / "README.md").unlink()
    assert "this run is finished (2 steps)" in printed
    assert cli.main([*command, "--set", "rank=8"]) == 1
    assert "a run with rank = 4, the recipe has 8" in capsys.readouterr().err
    assert cli.main([*command, "--set", "rank=8", "--restart"]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["rank"] == 8


def test_finetune_on_one_text(tmp_path: Path, tiny: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    """Its test split is one row, whose figures have no interval."""
    text = tmp_path / "book.txt"
    text.write_text("\n".join("debt is late and the loss is growing".split() * 30))
    assert cli.main(finetune_command(tmp_path, tiny, f"task={text}")) == 0
    figures = capsys.readouterr().out.split("this model")[1].split("\n")[0].split()
    assert figures[::2] == ["perplexity", "bits_per_byte"] and all(float(value) > 1 for value in figures[1::2])
    assert "undefined" not in (tmp_path / "run" / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_finetune_goes_on_with_the_same_command(
    tmp_path: Path, tiny: tuple[Path, Path], capsys: pytest.CaptureFixture, number: int
) -> None:
    command = finetune_command(tmp_path, tiny)
    with pytest.MonkeyPatch.context() as patch:
        runs.signal_after(patch, 3, number)
        assert cli.main(command) == 75
    error = capsys.readouterr().err
    assert "stopped at step 3 of 4" in error and "the same command goes on" in error
    assert cli.main(command) == 0
    assert f"continuing from {tmp_path / 'run' / 'checkpoints' / 'checkpoint-3'}" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "item, parts",
    [
        ("rank=0", ["recipe.yaml", "rank is 0"]),
        ("rnak=1", ["recipe.yaml", "unknown field rnak"]),
        ("layers=[9]", ["layers", "[9]", "0 to 2"]),
        ("base=/nowhere", ["base /nowhere"]),
        ("task=/nowhere", ["/nowhere", "no such task, file or folder"]),
        ("task_options={fold: 1}", ["unknown options ['fold']"]),
        ("micro_batch_size=3", ["micro_batch_size is 3"]),
        ("general_text=/nowhere", ["/nowhere"]),
        ("rank", ["FIELD=VALUE"]),
    ],
)
def test_an_error_of_finetune_is_one_line(
    tmp_path: Path, tiny: tuple[Path, Path], capfd: pytest.CaptureFixture, item: str, parts: list[str]
) -> None:
    assert cli.main(finetune_command(tmp_path, tiny, item)) == 1
    *others, line = capfd.readouterr().err.splitlines()  # the others are transformers' notes on loading
    assert line.startswith("deepseek-v3: ") and not [other for other in others if "Traceback" in other]
    for part in parts:
        assert part in line


def edited(checkpoint: Path, copy: Path, name: str, **values: object) -> Path:
    """A copy of the folder with these values in one of its JSON files."""
    file = Path(shutil.copytree(checkpoint, copy)) / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return copy


def generate(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[str, str]:
    assert cli.main(["generate", *arguments, "--max-new-tokens", "12"]) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


def test_generate_with_and_without_mtp(checkpoints: dict[int, Path], capsys: pytest.CaptureFixture) -> None:
    """Greedy text is the same with drafts and without; only the former tells how many were accepted."""
    model = str(checkpoints[1])
    drafted, error = generate(capsys, model, "abc def")
    assert drafted.startswith("abc def") and len(drafted) > len("abc def\n") + 3
    assert "[MTP: " in error and "accepted" in error
    plain, error = generate(capsys, model, "abc def", "--drafts", "0")
    assert plain == drafted and "MTP" not in error
    assert generate(capsys, model, "abc def", "--drafts", "3")[0] == plain
    other, error = generate(capsys, str(checkpoints[0]), "abc def")  # no MTP layer: decodes without being told
    assert other.startswith("abc def") and "MTP" not in error


def test_generate_samples_by_seed(checkpoints: dict[int, Path], capsys: pytest.CaptureFixture) -> None:
    arguments = [str(checkpoints[1]), "abc", "--temperature", "1.5", "--top-p", "0.95"]
    first = generate(capsys, *arguments, "--seed", "1")[0]
    assert first == generate(capsys, *arguments, "--seed", "1")[0] != generate(capsys, *arguments, "--seed", "2")[0]


def test_generate_in_a_chat(checkpoints: dict[int, Path], capsys: pytest.CaptureFixture) -> None:
    for model in map(str, checkpoints.values()):
        chat = generate(capsys, model, "abc", "--chat")[0]
        assert "abc" in chat and chat != generate(capsys, model, "abc")[0]


def test_generate_is_greedy_whatever_the_folder_says(
    checkpoints: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = str(edited(checkpoints[1], tmp_path / "model", "generation_config.json", num_beams=2))
    for drafts in ("1", "0"):
        arguments = ["abc def", "--drafts", drafts]
        assert generate(capsys, model, *arguments) == generate(capsys, str(checkpoints[1]), *arguments)


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["abc", "--temperature", "-1"], "--temperature: found -1.0, allowed is 0 (greedy) or more"),
        (["abc", "--temperature", "nan"], "--temperature: found nan, allowed is 0 (greedy) or more"),
        (["abc\udcff"], "prompt: found what is not UTF-8 at character 3, allowed is UTF-8"),
        (["abc\udcff", "--chat"], "prompt: found what is not UTF-8 at character 3, allowed is UTF-8"),
        ([""], "prompt: found no tokens, allowed is one or more: the tokenizer adds no BOS to an empty text"),
    ],
)
def test_an_error_of_generate_is_one_line(
    checkpoints: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], line: str
) -> None:
    model = edited(checkpoints[0], tmp_path / "model", "tokenizer_config.json", add_bos_token=False)
    assert cli.main(["generate", str(model), *arguments]) == 1
    assert capsys.readouterr().err == f"deepseek-v3: {line}\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_real_interruption(tmp_path: Path, corpus: Path, number: int) -> None:
    """From outside, as a user, a scheduler or the kernel does it."""
    command = [sys.executable, "-m", "deepseek_v3.cli", "pretrain", *SMALL, "--data", str(corpus), "--steps", "300"]
    command += ["--output-dir", str(tmp_path), "--set", "compare=false", "--set", "save_every=5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
    limit = time.monotonic() + 120
    while not (tmp_path / "metrics.jsonl").exists() or len((tmp_path / "metrics.jsonl").read_text().splitlines()) < 20:
        assert process.poll() is None and time.monotonic() < limit, log.read_text()
        time.sleep(0.05)
    process.send_signal(number)
    code = process.wait(timeout=60)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 75, log.read_text()
        assert "stopping after this step" in log.read_text()
        assert "the same command goes on from there" in log.read_text()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "continuing at step" in done.stdout
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "ce_loss" in line] == list(range(1, 301))
