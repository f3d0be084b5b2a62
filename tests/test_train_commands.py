"""``kdkernels train`` and what follows it, as a user runs them, and what a run leaves behind.

The runs here are far too short to learn much; what they must get right is who sees what.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kdkernels.__main__ import main
from kdkernels.train import config as configuration
from kdkernels.train import data, experiment
from kdkernels.train.checkpoints import load_model, save_model
from kdkernels.train.errors import NonFiniteError, SetupError, TrainError
from kdkernels.train.experiment import Experiment
from kdkernels.train.export import export
from kdkernels.train.models import load_weights

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
TINY = ["--data.name", "digits", "--training.epochs", "2", "--training.batch_size", "512",
        "--augment.crop", "1", "--training.threads", "1"]  # fmt: skip


def train(folder: Path, *options: str, seeds: int = 1) -> int:
    return main(["train", *TINY, "--seeds", str(seeds), "--out", str(folder), *options])


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert train(folder, seeds=2) == 0
    return folder


def tiny_config(**sections) -> configuration.Config:
    given = {"data": {"name": "digits"}, "augment": {"crop": 0}, "seeds": 1,
             "training": {"epochs": 1, "batch_size": 512}}  # fmt: skip
    for name, options in sections.items():
        given[name] = given.get(name, {}) | options
    return configuration.checked(given)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder)[0].state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what a run leaves behind


def test_a_run_leaves_its_files(tiny_run):
    files = {"config.toml", "summary.json", "report.html", "curves.png", "confusion.png"}
    assert {path.name for path in tiny_run.iterdir()} == files | {"seed0", "seed1"}
    for seed in ("seed0", "seed1"):
        runs = {path.name for path in (tiny_run / seed).iterdir()}
        assert runs == {"teacher", "distilled", "alone", "smoothed"}
        for run in runs:
            names = {path.name.split(".out.")[0] for path in (tiny_run / seed / run).iterdir()}
            assert names == {"model.safetensors", "outcome.json", "metrics.jsonl", "checkpoints",
                             "events"}  # fmt: skip
    for picture in ("curves.png", "confusion.png"):
        assert (tiny_run / picture).read_bytes().startswith(b"\x89PNG")


def test_the_summary_is_of_what_was_measured(tiny_run):
    summary = json.loads((tiny_run / "summary.json").read_text())
    accuracies = {}
    for name in ("teacher", "distilled", "alone", "smoothed"):
        paths = [tiny_run / seed / name / "outcome.json" for seed in ("seed0", "seed1")]
        accuracies[name] = [json.loads(path.read_text())["test_accuracy"] for path in paths]
    assert summary["test_accuracy"] == accuracies
    distilled, alone = (torch.tensor(accuracies[n]).double() for n in ("distilled", "alone"))
    found = summary["summary"]
    assert found["distilled"]["mean"] == pytest.approx(distilled.mean().item())
    spread = found["gain over alone"]["sample_standard_deviation"]
    assert spread == pytest.approx((distilled - alone).std().item())
    assert summary["versions"]["torch"] == torch.__version__


def test_the_report_shows_numbers_pictures_and_configuration(tiny_run):
    page = (tiny_run / "report.html").read_text()
    summary = json.loads((tiny_run / "summary.json").read_text())["summary"]
    for name, row in summary.items():
        assert f"<td>{name}</td><td>{100 * row['mean']:6.2f} ± " in page
    assert 'src="curves.png"' in page
    assert 'src="confusion.png"' in page
    assert "learning_rate = 0.02" in page


def test_the_resolved_configuration_makes_the_same_run(tiny_run, tmp_path):
    again = tmp_path / "again"
    assert main(["train", "--config", str(tiny_run / "config.toml"), "--out", str(again)]) == 0
    for name in ("config.toml", "summary.json"):
        assert (again / name).read_text() == (tiny_run / name).read_text()
    assert same(weights(again), weights(tiny_run))


def test_one_seed_has_no_spread_and_baselines_can_be_left_out(tmp_path, capsys):
    assert train(tmp_path / "run", "--baselines", "false") == 0
    report = capsys.readouterr().out.split("test accuracy")[1]
    assert "distilled" in report
    assert "±" not in report
    assert "alone" not in report


def test_a_run_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "curves.png").write_text("precious")
    assert train(tmp_path) == 2
    assert "is not empty: name a new folder, or --resume" in capsys.readouterr().err
    assert train(tmp_path / "curves.png") == 2
    assert (tmp_path / "curves.png").read_text() == "precious"


def test_default_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment.Experiment, "run", lambda self: {})
    monkeypatch.setattr("kdkernels.train.cli.write_report", lambda *given: None)
    monkeypatch.setattr("kdkernels.train.cli.table", lambda *given: "")
    for expected in ("digits", "digits-2", "digits-3"):
        assert main(["train", *TINY]) == 0
        assert (Path("runs") / expected / "config.toml").exists()


# --- an honest comparison


def test_students_start_equal_and_take_as_many_steps(tiny_run, monkeypatch, tmp_path):
    seen = {}

    class Spy(experiment.Trainer):
        def __init__(self, student, teacher, images, *rest, **options):
            name = Path(options["folder"]).parent.name
            start = {n: v.clone() for n, v in student.state_dict().items()}
            super().__init__(student, teacher, images, *rest, **options)
            seen[name] = start, self.options.batch_size * self.steps_per_epoch, images.labels

    monkeypatch.setattr(experiment, "Trainer", Spy)
    Experiment(tiny_config(), tmp_path, quiet).run()
    assert same(seen["distilled"][0], seen["alone"][0])
    assert same(seen["distilled"][0], seen["smoothed"][0])
    assert len({steps for _, steps, _ in seen.values()}) == 1
    found = {}
    for name, (_, _, labels) in seen.items():
        found[name] = len(labels), (labels != data.UNLABELLED).sum().item()
    assert found == {"teacher": (1078, 1078), "distilled": (1078, 50),
                     "alone": (50, 50), "smoothed": (50, 50)}  # fmt: skip


def test_a_batch_is_at_most_all_training_images(tmp_path):
    config = tiny_config(training={"batch_size": 5000})
    assert Experiment(config, tmp_path, quiet).config.training.batch_size == 1078


def test_students_never_see_a_hidden_label(tmp_path, monkeypatch):
    """Corrupt all labels but those left to the student's owner: the same bits come out."""
    run = Experiment(tiny_config(), tmp_path / "honest", quiet)
    teachers, _ = run.teachers(0)
    run.distilled(0, teachers)
    kept = run.student_images(0)
    other = Experiment(tiny_config(), tmp_path / "corrupt", quiet)
    hidden = kept.labels == data.UNLABELLED
    few = data.Images(kept.images, torch.where(hidden, 9 - other.splits.train.labels, kept.labels))
    few.labels[hidden] = data.UNLABELLED
    monkeypatch.setattr(other, "student_images", lambda seed: few)
    other.splits.train.labels.copy_(9 - other.splits.train.labels)
    other.distilled(0, teachers)
    found = [weights(tmp_path / name / "seed0" / "distilled") for name in ("honest", "corrupt")]
    assert same(*found)


def test_smoothing_is_of_the_smoothed_student_alone(tmp_path, monkeypatch):
    seen = {}
    real = Experiment.train

    def spy(self, name, seed, purpose, config, *rest):
        seen[name] = config.training.label_smoothing
        return real(self, name, seed, purpose, config, *rest)

    monkeypatch.setattr(Experiment, "train", spy)
    Experiment(tiny_config(), tmp_path, quiet).run()
    assert seen == {"teacher": 0.0, "distilled": 0.0, "alone": 0.0, "smoothed": 0.1}


# --- teachers


def test_weights_of_teacher_and_student_come_from_files(tiny_run, tmp_path):
    file = str(tiny_run / "seed0" / "teacher" / "model.safetensors")
    student = str(tiny_run / "seed0" / "alone" / "model.safetensors")
    config = tiny_config(teacher={"weights": file}, student={"weights": student})
    run = Experiment(config, tmp_path, quiet)
    _, found = run.teachers(0)
    reported = json.loads((tiny_run / "seed0" / "teacher" / "outcome.json").read_text())
    assert found["teacher"].test_accuracy == reported["test_accuracy"]
    assert not (tmp_path / "seed0" / "teacher").exists()
    wrong = tiny_config(teacher={"weights": student})
    with pytest.raises(SetupError, match="does not fit the model: "):
        Experiment(wrong, tmp_path, quiet).teachers(0)


def test_an_ensemble_teaches(tmp_path):
    others = [{"name": "mobilenet1", "options": {"stem_stride": 2}}]
    config = tiny_config(teacher={"others": others}, loss={"ensemble": "logits"})
    found = Experiment(config, tmp_path, quiet).run()
    assert list(found) == ["teacher", "teacher 2", "distilled", "alone", "smoothed"]
    assert (tmp_path / "seed0" / "teacher-2" / "model.safetensors").exists()


@pytest.mark.parametrize(("kind", "top_k"), [("float32", 0), ("float16", 0), ("float16", 3)])
def test_a_cached_teacher_says_what_it_would_say(tmp_path, kind, top_k):
    run = Experiment(tiny_config(teacher={"cache": kind, "cache_top_k": top_k}), tmp_path, quiet)
    teacher = run.build(run.config.teacher).eval()
    cached, again = (run.cached(0, t) for t in (teacher, None))  # the second time it is read
    file = tmp_path / "seed0" / "teacher-logits.safetensors"
    bytes_of_an_image = top_k * (2 + 4) or 10 * {"float32": 4, "float16": 2}[kind]
    assert file.stat().st_size < 1078 * bytes_of_an_image + 500
    index = torch.tensor([5, 1000, 3])
    with torch.no_grad():
        logits = teacher(run.normalize(run.splits.train[index][0]))
    tolerance = {"rtol": 0, "atol": 1e-5 if kind == "float32" else 4e-3}
    if top_k:
        values, indices = logits.topk(top_k)
        assert torch.equal(cached[index].indices.long(), indices)
        found, expected = (v.float().log_softmax(1) for v in (cached[index].values, values))
    else:
        found, expected = cached[index].float(), logits
    torch.testing.assert_close(found, expected, **tolerance)
    assert torch.equal(again[index].values if top_k else again[index],
                       cached[index].values if top_k else cached[index])  # fmt: skip


def test_a_cached_teacher_teaches_alike(tmp_path):
    cached = Experiment(tiny_config(teacher={"cache": "float32"}), tmp_path / "cached", quiet)
    plain = Experiment(tiny_config(), tmp_path / "plain", quiet)
    teachers, _ = cached.teachers(0)
    for run in (cached, plain):
        run.distilled(0, teachers)
    found = [weights(tmp_path / name / "seed0" / "distilled") for name in ("cached", "plain")]
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=1e-3)


# --- interruptions


def test_a_finished_model_is_not_trained_again(tiny_run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    shutil.rmtree(folder / "seed1" / "smoothed")
    (folder / "summary.json").unlink()
    fitted = []
    real = experiment.Trainer.fit
    monkeypatch.setattr(experiment.Trainer, "fit", lambda self: fitted.append(1) or real(self))
    assert main(["train", "--resume", str(folder)]) == 0
    assert len(fitted) == 1
    assert (folder / "summary.json").read_text() == (tiny_run / "summary.json").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_command_goes_on_to_the_same_bits(tiny_run, tmp_path, number):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "kdkernels", "train", *TINY, "--seeds", "2", "--out", folder]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=environment) as process:  # fmt: skip
        for line in process.stdout:
            if "distilled" in line and "epoch 1" in line:
                process.send_signal(number)
                break
        _, error = process.communicate()
    assert process.returncode == {signal.SIGKILL: -9}.get(number, 128 + number)
    if number != signal.SIGKILL:
        assert error.startswith(f"kdkernels train: error: {number.name} at step ")
        assert f"--resume {folder}" in error
    assert "Traceback" not in error
    assert main(["train", "--resume", str(folder)]) == 0
    assert (folder / "summary.json").read_text() == (tiny_run / "summary.json").read_text()
    for seed in ("seed0", "seed1"):
        for name in ("teacher", "distilled", "alone"):
            whole, resumed = (f / seed / name for f in (tiny_run, folder))
            assert same(weights(whole), weights(resumed))
            lines = [(f / "metrics.jsonl").read_text() for f in (whole, resumed)]
            assert lines[0] == lines[1]


def test_resume_takes_no_other_option(tiny_run, capsys):
    assert main(["train", "--resume", str(tiny_run), "--seeds", "3"]) == 2
    assert "--resume goes on with the run's own configuration" in capsys.readouterr().err
    assert main(["train", "--resume", str(tiny_run / "nothing")]) == 2
    assert "config.toml cannot be read: No such file" in capsys.readouterr().err


def test_an_edited_configuration_is_not_taken_for_that_of_the_run(tiny_run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    file = folder / "config.toml"
    edited = file.read_text().replace("learning_rate = 0.02", "learning_rate = 0.03")
    file.write_text(edited)
    assert main(["train", "--resume", str(folder)]) == 2
    assert "config.toml was edited after the run began" in capsys.readouterr().err
    file.write_text(edited.rsplit("\n#", 1)[0])
    assert main(["train", "--resume", str(folder)]) == 0


def test_a_disk_that_is_full_has_its_exit_code(tmp_path, monkeypatch, capsys):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert train(tmp_path / "run") == 3
    assert "No space left on device" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_has_its_exit_code(tmp_path, capsys):
    assert train(tmp_path / "run", "--training.learning_rate", "1e30", "--baselines=false",
                 "--teacher.learning_rate", "1e30") == 4  # fmt: skip
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "last good checkpoint" in error


# --- after training


def test_evaluate_says_what_was_reported(tiny_run, capsys):
    assert main(["evaluate", str(tiny_run)]) == 0
    reported = json.loads((tiny_run / "seed0" / "distilled" / "outcome.json").read_text())
    out = capsys.readouterr().out
    assert out.startswith(f"accuracy {reported['test_accuracy']:.2%}")
    assert out.endswith("449 images\n")


@pytest.fixture(scope="module")
def folder_of_images(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("images")
    digits, _ = data.SOURCES["digits"]()
    for i in range(60):
        place = folder / str(digits.labels[i].item())
        place.mkdir(exist_ok=True)
        pixels = (digits.images[i, 0] * 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


def test_evaluate_and_predict_take_files(tiny_run, folder_of_images, capsys):
    assert main(["evaluate", str(tiny_run), "--folder", str(folder_of_images)]) == 0
    assert capsys.readouterr().out.endswith("60 images\n")
    files = sorted(map(str, folder_of_images.glob("3/*.png")))[:2]
    assert main(["predict", str(tiny_run), *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == files
    assert all(line.count("%") == 3 for line in lines)


def test_predict_is_what_the_model_says(tiny_run, folder_of_images, capsys):
    model, about = load_model(tiny_run)
    file = next(folder_of_images.glob("0/*.png"))
    image = data.read_image(file, 1, None)[None].float() / 255
    best = model(image).softmax(1)[0].max(0)
    assert main(["predict", str(tiny_run), str(file)]) == 0
    expected = f"{file}  {about['classes'][best.indices]} {best.values:.1%}"
    assert capsys.readouterr().out.startswith(expected)


def test_export_agrees_with_pytorch_for_any_batch(tiny_run, tmp_path, capsys):
    import onnxruntime

    assert main(["export", str(tiny_run), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("largest difference to PyTorch") == 2
    images = torch.rand(7, 1, 8, 8)
    expected = load_model(tiny_run)[0](images).detach()
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(images), expected, rtol=1e-4, atol=1e-4)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_an_export_that_differs_is_an_error(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kdkernels.train.export._difference", lambda *given: 0.5)
    assert main(["export", str(tiny_run), "--out", str(tmp_path)]) == 1
    assert "model.pt2 differs from PyTorch by 5.0e-01" in capsys.readouterr().err


def test_what_cannot_be_exported_is_said(tmp_path):

    class Undecided(nn.Module):
        def forward(self, images):
            return images.flatten(1) * (2 if images.sum().item() > 0 else 1)

    with pytest.raises(TrainError, match="the model cannot be exported: "):
        export(Undecided(), [1, 2, 2], tmp_path)
    assert not any(tmp_path.iterdir())


def test_search_goes_on_and_its_best_can_be_trained(tmp_path, capsys):
    folder = tmp_path / "search"
    command = ["search", *TINY, "--seeds", "1", "--out", str(folder)]
    assert main([*command, "--trials", "1"]) == 0
    assert main([*command, "--trials", "3"]) == 0
    out = capsys.readouterr().out
    assert [f"trial {i}:" in out for i in range(4)] == [True, True, True, False]
    best = configuration.load(folder / "best.toml")
    accuracies = [float(line.split()[-1][:-1]) for line in out.splitlines() if "trial" in line]
    chosen = f"temperature {best.loss['temperature']:.4g}, alpha {best.loss['alpha']:.4g}"
    lines = [line for line in out.splitlines() if chosen in line and "trial" in line]
    assert float(lines[0].split()[-1][:-1]) == max(accuracies)
    assert out.endswith(f"kdkernels train --config {folder / 'best.toml'}\n")


def test_what_cannot_be_searched_for_is_refused(tmp_path, capsys):
    command = ["search", *TINY, "--trials", "1", "--out", str(tmp_path / "search")]
    assert main([*command, "--schedules", "{temperature = [[0, 8.0], [1, 2.0]]}"]) == 2
    assert main([*command, "--distill.learn_temperature"]) == 2
    error = capsys.readouterr().err
    assert error.count("temperature or alpha is scheduled or learned") == 2
    assert main([*command, "--training.epochs", "1"]) == 0
    assert main([*command, "--training.epochs", "3"]) == 2
    assert "trials of another configuration" in capsys.readouterr().err


def test_a_trial_that_diverges_is_not_the_end_of_a_search(tmp_path, monkeypatch, capsys):
    real, calls = Experiment.distilled, []

    def diverges(self, seed, teachers):
        calls.append(seed)
        if len(calls) == 1:
            raise NonFiniteError("step 1 has loss nan")
        return real(self, seed, teachers)

    monkeypatch.setattr(Experiment, "distilled", diverges)
    command = ["search", *TINY, "--seeds", "1", "--out", str(tmp_path / "search"), "--trials"]
    assert main([*command, "0"]) == 2
    assert "of 0 trials none is complete" in capsys.readouterr().err
    assert main([*command, "2"]) == 0
    captured = capsys.readouterr()
    assert "trial 0: step 1 has loss nan\ntrial 1:" in captured.out
    assert captured.err == ""


def test_a_search_looks_at_no_test_image(tmp_path, monkeypatch):
    looked_at = []
    real = experiment.evaluate
    monkeypatch.setattr(
        experiment,
        "evaluate",
        lambda m, images, *r: looked_at.append(len(images)) or real(m, images, *r),
    )
    assert main(["search", *TINY, "--trials", "1", "--out", str(tmp_path / "search")]) == 0
    assert looked_at == [270, 270]  # of the teacher and the student; the test split has 449


def test_models_are_listed(capsys):
    assert main(["models"]) == 0
    assert "resnet8 " in capsys.readouterr().out


# --- what is missing or wrong


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [("kornia", "train", ["train", "--augment.flip", "0.5"]), ("mlxtend", "train", ["train"]),
     ("tensorboard", "train", ["train"]), ("optuna", "search", ["search"]),
     ("wandb", "wandb", ["train", "--wandb", "project"]),
     ("timm", "timm", ["train", "--student.name", "timm:resnet18"])],
)  # fmt: skip
def test_a_missing_package_says_how_to_get_it(
    module, extra, command, tmp_path, monkeypatch, capsys
):
    for name in {name for name in sys.modules if name.split(".")[0] == module} | {module}:
        monkeypatch.setitem(sys.modules, name, None)
    given = ["--out", str(tmp_path / "run"), "--seeds", "1"]
    if module != "mlxtend":
        given += TINY
    assert main([*command, *given]) == 2
    error = capsys.readouterr().err
    assert f"pip install 'kdkernels[{extra}]'" in error
    assert error.count("\n") == 1


def test_without_the_extra_the_commands_say_how_to_get_it():
    code = "import sys; sys.modules['pydantic'] = None; from kdkernels.__main__ import main; " \
           "sys.exit(main(['train']))"  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 2
    assert run.stderr == (
        "kdkernels train: error: pydantic is not installed: pip install 'kdkernels[train]'\n"
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["evaluate", "nowhere"], "nowhere cannot be read"),
        (["predict", "nowhere", "image.png"], "nowhere cannot be read"),
        (["export", str(Path(__file__))], "cannot be read"),
        (["train", "--data.name", "folder"], "data.folder"),
        (
            ["train", "--data.name", "digits", "--student.name", "resnet9"],
            "no model 'resnet9'; did you mean resnet8?",
        ),
        (["train", "--training.epoch", "3"], "did you mean --training.epochs?"),
    ],
)
def test_mistakes_are_one_line(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"kdkernels {command[0]}: error: ")
    assert error.count("\n") == 1


def test_only_options_of_the_command_are_near(capsys):
    assert main(["evaluate", "run", "--training.device", "cpu"]) == 2
    assert capsys.readouterr().err.endswith("error: unknown option --training.device\n")
    assert main(["evaluate", "run", "--fodler", "images"]) == 2
    assert "did you mean --folder?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "search"])
def test_a_place_where_nothing_can_be_written_is_named(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([command, *TINY, "--out", str(tmp_path / "file" / "run")]) in (2, 3)
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error
    assert error.count("\n") == 1


def test_a_corrupt_image_is_named_by_predict(tiny_run, tmp_path, capsys):
    (tmp_path / "no.png").write_text("no image")
    assert main(["predict", str(tiny_run), str(tmp_path / "no.png")]) == 2
    assert "no.png is no image that can be read" in capsys.readouterr().err


def test_info_and_help_import_no_more_than_they_need():
    code = "import sys; from kdkernels.__main__ import main; main(['info']); " \
           "assert not {'kdkernels.train', 'pydantic'} & set(sys.modules)"  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)


def test_weights_that_are_one_tensor_are_saved(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    save_model(tmp_path / "model.safetensors", model, {})
    again = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    load_weights(again, tmp_path / "model.safetensors")
    assert same(model.state_dict(), again.state_dict())


OWN = {
    "number": "3",
    "vector": "nn.Flatten(0)",
    "maps": "nn.Conv2d(channels, classes, 1)",
    "pair": "nn.LSTM(8, classes)",
    "large": "nn.Conv2d(channels, classes, 20)",
    "nine": "nn.Sequential(nn.Flatten(), nn.Linear(64, 9))",
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--student.name", "odd_models:vector"], "the student returns (128,) and not the logits"),
        (["--student.name", "odd_models:maps"], "the student returns (2, 10, 8, 8) and not"),
        (["--teacher.name", "odd_models:large"], "the teacher does not take images of (1, 8, 8): "),
        (["--student.name", "odd_models:pair"], "the student "),
        (["--student.name", "odd_models:nine"], "loss: "),
        (["--data.labelled", "5"], "data.labelled must be from 10"),
        (["--loss.divergence", "dist", "--training.accumulate", "2"], "num_items do not go togeth"),
        (["--loss.weight", "[1.0, 2.0]"], "loss: weight"),
        (["--loss.backend", "cuda"], "loss: "),
        (["--loss.num_classes", "3"], "loss: labels[1] is 9"),
        (["--student.name", "odd_models:number"], "3 is no module of PyTorch"),
        (["--student.freeze", '["*"]'], "student.freeze leaves nothing to train"),
        (
            [
                "--loss.standardize=true",
                "--augment.crop=0",
                "--teacher.cache=float16",
                "--teacher.cache_top_k=3",
            ],
            "standardize do not go together",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_before_a_teacher_is_trained(
    options, message, tmp_path, monkeypatch, capsys
):
    functions = [f"def {name}(classes, channels): return {made}\n" for name, made in OWN.items()]
    (tmp_path / "odd_models.py").write_text("from torch import nn\n" + "".join(functions))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(Experiment, "teachers", lambda self, seed: pytest.fail("too late"))
    nothing = ["--student.options", "{}", "--teacher.options", "{}"]
    assert train(tmp_path / "run", *nothing, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_any_module_may_be_taught(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "def linear(classes, channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"name": "my_models:linear", "options": {}}
    run = Experiment(tiny_config(student=options), tmp_path / "run", quiet)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    run.distilled(0, [teacher])
    model, about = load_model(tmp_path / "run" / "seed0" / "distilled" / "model.safetensors")
    assert about["name"] == "my_models:linear"
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)
