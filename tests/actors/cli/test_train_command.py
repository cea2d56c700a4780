"""`outrider train` and `outrider tune` turn flags into folders of weights and results."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from runtime.core.cache_folder import cache_folder
from tests.support.command import outrider
from tests.support.pair import save_model
from training.folder import LOCK

SMALL = ("--steps", 2, "--batch", 2, "--context", 24, "--own", 40)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=3, context=64)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("".join(f"def number_{index}():\n    return {index}\n" for index in range(400)))
    return file


def test_a_head_from_the_command_line_is_the_same_twice(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    told = []
    for name in ("a", "b"):
        assert (
            outrider(
                monkeypatch,
                "train",
                "medusa",
                "--target",
                tiny,
                "--data",
                data,
                "--out",
                tmp_path / name,
                *SMALL,
            )
            == 0
        )
        told.append(capsys.readouterr())
    assert "is ready" in told[0].out
    assert "generating training texts" in told[0].err
    assert "generating training texts" not in told[1].err  # they are cached
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(bool((one[name] == two[name]).all()) for name in one)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["settings"] == {
        "heads": 4,
        "blocks": 1,
    }
    assert "2 of 2 texts of 24 tokens" in (tmp_path / "a" / "README.md").read_text()
    assert (cache_folder() / "outputs").is_dir()
    assert (
        outrider(
            monkeypatch,
            "train",
            "medusa",
            "--target",
            tiny,
            "--data",
            data,
            "--out",
            tmp_path / "a",
            *SMALL,
        )
        == 2
    )
    assert "already exists" in capsys.readouterr().err


def test_an_interrupted_training_goes_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    command = (
        "train",
        "hidden-transfer",
        "--positions",
        2,
        "--target",
        tiny,
        "--data",
        data,
        "--out",
        tmp_path / "h",
        *SMALL,
    )

    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("training.run.measure_acceptance", broken)
        assert outrider(patch, *command) == 130
    assert not (tmp_path / "h").exists()
    assert (tmp_path / "h.partial" / "checkpoint.pt").exists()
    other = [
        3 if argument == 2 and command[index - 1] == "--steps" else argument
        for index, argument in enumerate(command)
    ]
    assert outrider(monkeypatch, *other) == 2
    assert "steps was 2 and is 3" in capsys.readouterr().err
    assert outrider(monkeypatch, *command) == 0
    assert json.loads((tmp_path / "h" / "config.json").read_text())["settings"] == {
        "layers": [1, 2]
    }
    assert not (tmp_path / "h.partial").exists()


def test_layers_of_the_target_from_the_command_line_draft_for_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    given = (
        "--skip",
        "0,2",
        "--masks",
        2,
        "--rank",
        2,
        "--target",
        tiny,
        "--data",
        data,
        "--out",
        tmp_path / "s",
    )
    assert outrider(monkeypatch, "train", "s3d", *given, *SMALL) == 0
    assert json.loads((tmp_path / "s" / "config.json").read_text())["settings"] == {
        "layers": [1],
        "masks": 2,
        "rank": 2,
    }
    capsys.readouterr()
    asked = (
        "--target",
        tiny,
        "--in-process",
        "--json",
        "--max-tokens",
        12,
        "--prompt",
        "import os",
    )
    assert outrider(monkeypatch, "generate", *asked, "--draft", tmp_path / "s") == 0
    drafted = json.loads(capsys.readouterr().out)
    assert outrider(monkeypatch, "generate", *asked, "--speculation", "off") == 0
    assert drafted["text"] == json.loads(capsys.readouterr().out)["text"]


def test_a_draft_of_a_given_shape(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, data: Path, tmp_path: Path
) -> None:
    given = (
        "--shape",
        "64x1",
        "--loss",
        "kl",
        "--target",
        tiny,
        "--data",
        data,
        "--out",
        tmp_path / "d",
    )
    assert outrider(monkeypatch, "train", "draft", *given, *SMALL) == 0
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert (
        config["hidden_size"],
        config["num_hidden_layers"],
        config["max_position_embeddings"],
    ) == (64, 1, 64)
    again = ("--start", tmp_path / "d", "--target", tiny, "--data", data, "--out", tmp_path / "e")
    assert outrider(monkeypatch, "train", "draft", *again, *SMALL) == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["medusa"], "--out"),
        (["medusa", "--out", "OUT", "--heads", "0"], "heads 0"),
        (["medusa", "--out", "OUT", "--steps", "0"], "steps 0"),
        (["medusa", "--out", "OUT", "--seed", "-1"], "seed -1"),
        (["medusa", "--out", "OUT", "--own", "-1"], "own -1"),
        (
            ["medusa", "--out", "OUT", "--context", "65"],
            "context 65 is not allowed: this target reads 16 to 64 tokens",
        ),
        (
            ["medusa", "--out", "OUT", "--context", "24", "--data", "/nowhere"],
            "cannot read /nowhere",
        ),
        (["medusa", "--out", "TAKEN"], "already exists"),
        (["medusa", "--out", "OUT", "--target", "/nowhere/model"], "/nowhere/model"),
        (["medusa", "--out", "OUT", "--target", "TAKEN"], "has no config.json"),
        (
            ["hidden-transfer", "--out", "OUT", "--layers", "2", "--layers", "1"],
            "layers 2, 1 are invalid",
        ),
        (
            ["hidden-transfer", "--out", "OUT", "--layers", "3"],
            "layers 3 are invalid: give rising numbers from 1 to 2",
        ),
        (
            ["s3d", "--out", "OUT", "--skip", "1-3"],
            "skip '1-3' is invalid: give some of layers 0 to 2",
        ),
        (["s3d", "--out", "OUT", "--skip", "0-2"], "skip '0-2' is invalid"),
        (["s3d", "--out", "OUT", "--skip", "1-"], "skip '1-' is invalid"),
        (["s3d", "--out", "OUT", "--skip", "2-1"], "skip '2-1' is invalid"),
        (["s3d", "--out", "OUT", "--masks", "0"], "masks 0"),
        (["s3d", "--out", "OUT", "--rank", "1025"], "rank 1025"),
        (["draft", "--out", "OUT"], "exactly one of --latency, --shape and --start"),
        (["draft", "--out", "OUT", "--shape", "64x1", "--latency", "1"], "exactly one"),
        (["draft", "--out", "OUT", "--latency", "0"], "latency 0"),
        (["draft", "--out", "OUT", "--shape", "65x1"], "shape '65x1' is invalid"),
        (["draft", "--out", "OUT", "--shape", "64x1", "--loss", "hinge"], "hinge"),
        (["draft", "--out", "OUT", "--start", "/nowhere/draft"], "/nowhere/draft"),
        (["falcon", "--out", "OUT"], "falcon"),
    ],
)
def test_bad_training_is_one_line_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny: Path,
    data: Path,
    tmp_path: Path,
    arguments: list[str],
    named: str,
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    places = {"OUT": str(tmp_path / "out"), "TAKEN": str(tmp_path / "taken")}
    given = [places.get(argument, argument) for argument in arguments]
    target = [] if "--target" in given else ["--target", str(tiny)]
    texts = [] if "--data" in given else ["--data", str(data)]
    assert outrider(monkeypatch, "train", *given, *target, *texts) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert named in told.err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["taken"]


def test_a_damaged_target_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    damaged = Path(shutil.copytree(tiny, tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:1000])
    assert (
        outrider(
            monkeypatch,
            "train",
            "medusa",
            "--target",
            damaged,
            "--data",
            data,
            "--out",
            tmp_path / "out",
            *SMALL,
        )
        == 2
    )
    assert "is not a whole safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "out.partial").exists()


def test_a_draft_of_another_vocabulary_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        {**tokenizer["added_tokens"][0], "id": 4096, "content": "<|more|>"}
    )
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    given = ("--start", other, "--target", tiny, "--data", data, "--out", tmp_path / "out")
    assert outrider(monkeypatch, "train", "draft", *given, *SMALL) == 2
    assert "differ in vocabulary" in capsys.readouterr().err


def test_what_is_left_of_a_killed_training_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, tiny: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / LOCK).touch()
    assert (
        outrider(
            monkeypatch,
            "train",
            "medusa",
            "--target",
            tiny,
            "--data",
            data,
            "--out",
            tmp_path / "out",
            *SMALL,
        )
        == 0
    )


def test_layers_are_found_and_written_down(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    file = tmp_path / "layers.json"
    command = (
        "tune",
        "layers",
        "--target",
        tiny,
        "--data",
        data,
        "--out",
        file,
        "--texts",
        2,
        "--context",
        24,
    )
    assert outrider(monkeypatch, *command) == 0
    found = json.loads(file.read_text())
    assert found["method"] == "layer-skip"
    assert found["target"]["layers"] == 3
    assert [len(other["layers"]) for other in found["others"]] == [2, 1]
    assert found["layers"] in [other["layers"] for other in found["others"]]
    assert "layer-skip" in capsys.readouterr().out
    assert outrider(monkeypatch, *command) == 2
    assert "exists: give another --out" in capsys.readouterr().err


def test_shapes_of_one_size_are_trained_and_compared(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("training.shapes.DEPTHS", (1, 2))
    command = (
        "tune",
        "shapes",
        "--million",
        0.4,
        "--target",
        tiny,
        "--data",
        data,
        "--out",
        tmp_path / "shapes",
        *SMALL,
    )
    assert outrider(monkeypatch, *command) == 0
    found = json.loads((tmp_path / "shapes" / "shapes.json").read_text())
    assert [shape["name"] for shape in found["shapes"]] == ["64x1", "64x2"]
    assert all(
        shape["promise"] >= 1.0 and set(shape["times"]) >= {"1", "4"} for shape in found["shapes"]
    )
    assert (tmp_path / "shapes" / "shapes.png").read_bytes().startswith(b"\x89PNG")
    assert f"{found['best']} is the best draft model" in " ".join(
        capsys.readouterr().out.split()
    )  # lines are wrapped
    (tmp_path / "shapes" / "64x1" / "training.json").write_text("{}")
    assert outrider(monkeypatch, *command) == 2
    assert "has no training measurements" in capsys.readouterr().err
