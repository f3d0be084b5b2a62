"""``benchmarks/gpu_report.sh`` as far as it goes without a GPU: what it computes, prints and keeps.

All figures here are made up; none is a measurement.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# At the end: kdkernels is to be the one that is installed.
sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import (
    gpu_checks,
    gpu_objectives,
    gpu_plot,
    gpu_report,
    gpu_results,
    gpu_timing,
    providers,
)
from benchmarks.gpu_providers import Provider
from benchmarks.gpu_results import COMPILED, COPY, CROSS_ENTROPY, EAGER, FORWARD, TRAIN

SCRIPT = Path(gpu_report.__file__).with_suffix(".sh")
RATE = 1e12  # bytes per second, of a copy
OURS = "kdkernels cuda"
LARGE, ROW = (4096, 128256), (8192, 4096)
MIB = 1 << 20


def measurement(shape, fractions, dtype="bfloat16", direction=TRAIN, extra=0):
    """Every provider at its fraction of the floor; one with None has failed."""
    m = {"dtype": dtype, "rows": shape[0], "classes": shape[1], "direction": direction}
    floor = gpu_results.floor_ms(m, RATE)
    size = gpu_results.array_bytes(m)
    m["providers"] = {
        name: {"error": "out of memory"}
        if fraction is None
        else {"ms": floor / fraction, "extra_bytes": size + extra}
        for name, fraction in fractions.items()
    }
    return m


def measured(*measurements):
    return {
        "backends": ["cuda"],
        "shapes": [LARGE, ROW],
        "ceiling": {"bytes": 1 << 32, "bytes_per_second": RATE},
        "agreement": {OURS: {"gradient_error": 1e-7}, EAGER: {"error": "a | b"}},
        "measurements": list(measurements),
    }


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    return tmp_path / "work"


def published(work, **parts):
    """The results of a run that left these parts, and their Markdown."""
    parts = {"environment": {"device": "Some GPU", "torch": "2.11"}} | parts
    for name, part in parts.items():
        gpu_results.write_part(work, name, part)
    results = gpu_results.publish(work, work / "results")
    return results, (work / "results" / "some-gpu.md").read_text(encoding="utf-8")


def targets_of(results):
    return {t["name"]: t for t in results["targets"]}


# --- what is computed -----------------------------------------------------------------------------


def test_the_floor_is_three_arrays_or_two_without_a_gradient():
    elements = 4096 * 128256
    for dtype, item_bytes in (("bfloat16", 2), ("float32", 4)):
        for direction, arrays in ((TRAIN, 3), (FORWARD, 2)):
            m = measurement(LARGE, {}, dtype, direction)
            expected = 1e3 * arrays * elements * item_bytes / RATE
            assert gpu_results.floor_ms(m, RATE) == pytest.approx(expected)


def test_small_inputs_take_several_sets_to_get_past_the_cache():
    cache = 50 * MIB
    assert gpu_timing.number_of_sets(4096, 128256, 2, cache) == 1
    assert gpu_timing.number_of_sets(1024, 1000, 4, cache) == 26
    assert gpu_timing.number_of_sets(128, 10, 2, cache) == gpu_timing.MAX_SETS


class Scripted:
    """A clock that takes no time: a warm-up of 1 ms, then turns of 2, 9 and 4 ms."""

    cache_bytes = 0

    def __init__(self):
        self.times = iter([1.0, 2.0, 9.0, 4.0])

    def ms(self, step, repeats):
        step(0)
        return next(self.times)

    def peak_bytes(self, step):
        return 77

    def finish(self):
        pass


class NoGradients:
    def drop_gradients(self):
        pass


def test_a_figure_is_the_median_of_its_turns_and_a_failure_says_why():
    def fail(inputs):
        raise ValueError("no such kernel\nand more")

    plan = gpu_timing.Plan("cpu", [], [], "eager", 0, 1.0, 0.0, Path())
    candidates = [Provider("right", lambda inputs: None, None), Provider("wrong", fail, fail)]
    arguments = ([NoGradients()], Scripted(), plan, lambda: 0.0)
    found = gpu_timing.measure_direction(candidates, TRAIN, *arguments)
    right = {"ms": 4.0, "low_ms": 2.0, "high_ms": 9.0, "turns": 3, "extra_bytes": 77}
    assert found == {"right": right, "wrong": {"error": "ValueError: no such kernel"}}
    # One that has no forward alone is not there, rather than 0.
    assert "right" not in gpu_timing.measure_direction(candidates, FORWARD, *arguments)


def test_the_truth_is_the_textbook_loss_and_its_gradient():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.randint(7, (5,))
    losses, grad = gpu_checks.truth(student, teacher, labels, temperature=3.0)
    leaf = student.clone().requires_grad_()
    loss = providers.eager(leaf, teacher, labels, 3.0)
    loss.backward()
    torch.testing.assert_close(losses.sum(), loss.detach())
    torch.testing.assert_close(grad, leaf.grad)


@pytest.mark.parametrize("tweak", ["as is", "incoming gradient 0.37"])
def test_a_check_notices_a_gradient_that_is_off(monkeypatch, tweak):
    case = gpu_checks.Case(7, 100, torch.bfloat16, tweak=tweak)
    assert gpu_checks.compare(gpu_checks.make(case, "cpu"), "cpu")[0]
    right = gpu_checks.kd_loss
    monkeypatch.setattr(gpu_checks, "kd_loss", lambda *a, **k: right(*a, **k) * 1.01)
    passed, detail = gpu_checks.compare(gpu_checks.make(case, "cpu"), "cpu")
    assert not passed
    assert "wrong: loss, gradient" in detail


def test_later_steps_keep_their_share_of_the_time():
    left = gpu_report.SECONDS
    for i, step in enumerate(gpu_report.STEPS):
        later = gpu_report.STEPS[i + 1 :]
        fair, limit = gpu_report.allowance(step, later, left)
        assert 0 < fair <= limit <= left - gpu_report.LEAST_SECONDS * len(later)
        left -= limit  # the worst: each is ended at its limit
    assert left >= 0


# --- what is said of it ---------------------------------------------------------------------------


def test_targets_are_met_or_not_by_the_figures():
    fast = {OURS: 0.95, COMPILED: 0.3, EAGER: 0.1}
    costs = {OURS: {"host_us": 20.0, "stream_us": 6.0}, CROSS_ENTROPY: {"host_us": 30.0}}
    results = measured(measurement(LARGE, fast), measurement(ROW, fast))
    results |= {"checks": [], "steps": [], "small_batch": {"bfloat16": costs}}
    mine = gpu_results.judge(results)[:6]
    assert {t["of"] for t in mine} == {OURS}
    assert [t["met"] for t in mine] == [True] * 6
    assert mine[1]["measured"] == "3.2 ×"
    assert mine[3]["measured"].startswith("at most 0.00 MiB more")

    slow = measurement(ROW, {OURS: 0.5, COMPILED: 0.3, EAGER: 0.1}, extra=2 * MIB)
    costs[OURS] = {"host_us": 40.0, "stream_us": 26.0}
    results["measurements"] = [measurement(LARGE, {OURS: 0.2, COMPILED: 0.1, EAGER: 0.1}), slow]
    mine = gpu_results.judge(results)[:6]
    assert [t["met"] for t in mine] == [False] * 6
    assert mine[0]["measured"] == "20% at C = 128,256, the lowest of 2"
    assert mine[3]["measured"] == "at most 2.00 MiB more, at (8192, 4096) bfloat16"
    assert mine[5]["measured"] == "40.0 against 30.0 µs"


def same_width(text):
    """Every row of a table has the cells of its header."""
    width = None
    for line in text.splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = line.replace(r"\|", "").count("|")
        width = width or cells
        assert cells == width, line


def test_every_row_of_a_table_has_the_cells_of_its_header(work):
    fractions = {COPY: 1.0, OURS: 0.9, EAGER: None}
    results, text = published(
        work,
        measurements=measured(measurement(LARGE, fractions), measurement(ROW, fractions)),
        small_batch={"bfloat16": {OURS: {"host_us": 20.0}, EAGER: {"error": "x | y"}}},
        steps=[{"name": "build", "outcome": "failed: a | b", "seconds": 1.0}],
        **{"checks-large": [{"step": "large", "name": "n", "passed": False, "detail": "d"}]},
    )
    same_width(text)
    assert "| (8192, 4096) | 201.3 µs | 201.3 µs (100%) | 223.7 µs (90%) | out of memory |" in text
    assert "1.000 TB/s" in text
    assert "- large: n: d" in text
    assert json.loads((work / "results" / "some-gpu.json").read_text()) == json.loads(
        json.dumps(results)
    )


def test_nothing_is_published_before_the_device_is_known(work):
    gpu_results.write_part(work, "steps", [{"name": "build", "outcome": "passed", "seconds": 9.0}])
    gpu_results.publish(work, work / "results")
    assert not (work / "results").exists()


def test_what_was_not_measured_has_no_figure(work):
    results, text = published(work)
    assert {t["met"] for t in results["targets"]} == {None}
    assert {t["measured"] for t in results["targets"]} == {"(not run)"}
    assert "## Measurements" not in text
    assert "%" not in text
    assert "TB/s" not in text


def test_a_report_cut_short_keeps_what_was_found(work):
    fast = {OURS: 0.95}
    (work / "results").mkdir(parents=True)
    (work / "measurements.json.new").write_text("{")  # it was ended while it wrote
    results, text = published(
        work,
        measurements=measured(measurement(LARGE, fast)),
        steps=[{"name": "correctness", "outcome": "ran out of time", "seconds": 80.0}],
        **{"checks-correctness": [{"step": "correctness", "name": "n", "passed": True}]},
    )
    targets = targets_of(results)
    copied = targets["≥ 90 % of the copy rate at every C ≥ 4,096, bfloat16"]
    assert (copied["measured"], copied["met"]) == ("95% at C = 128,256, the lowest of 1", None)
    checked = targets["loss and gradient within the promised error of float64"]
    assert (checked["measured"], checked["met"]) == ("1 of 1 (ran out of time)", None)
    assert "(4096, 128256)" in text
    failed = gpu_report.failures(results["steps"], results)
    assert failed == ["correctness: ran out of time"]


def test_copies_go_where_they_are_wanted(work, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "not" / "yet"))
    published(work)
    assert {p.name for p in (tmp_path / "not" / "yet").iterdir()} == {
        "some-gpu.json",
        "some-gpu.md",
    }


def test_the_plot_is_drawn_from_results_alone(work, tmp_path):
    results = {"environment": {}, "measurements": []}
    assert not gpu_plot.plot(results, tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()
    fractions = {COPY: 1.0, OURS: 0.9, EAGER: None, "something else": 0.2, CROSS_ENTROPY: 0.5}
    results |= measured(
        *(measurement(s, fractions, d) for s in (LARGE, ROW) for d in ("bfloat16", "float32"))
    )
    assert gpu_plot.plot(results, tmp_path / "some.png")
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")


# --- the steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "summary"),
    [
        ("========= ERROR SUMMARY: 0 errors", "0 errors"),
        (
            "x\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
            "0 hazards displayed (0 errors, 0 warnings)",
        ),
        ("Error: the device is not supported", None),
    ],
)
def test_the_line_that_a_sanitizer_ends_with(text, summary):
    assert gpu_report.sanitizer_summary(text) == summary


def test_a_build_without_the_cuda_kernels_has_failed(work, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    commands = []
    monkeypatch.setattr(gpu_report, "run_logged", lambda *a: commands.append(a) or 0)
    report = gpu_report.Report(gpu_report.parse([]), work, work / "results")
    gpu_results.write_part(tmp_path / "kdkernels", "_build", {"cpu": "", "cuda": "no nvcc found"})
    assert report.build(60.0) == "failed: no nvcc found"
    gpu_results.write_part(tmp_path / "kdkernels", "_build", {"cpu": "", "cuda": ""})
    assert report.build(60.0) == "passed"
    command, *_, environment = commands[0]
    assert command[1:] == ["setup.py", "build_ext", "--inplace"]
    assert environment == {"KDKERNELS_CUDA": "1"}


def test_a_dry_run_leaves_the_results_alone(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(gpu_report.tempfile, "mkdtemp", lambda **_: str(tmp_path))
    monkeypatch.setattr(
        gpu_report, "all_steps", lambda report, *_: folders.append(report.folder) or []
    )
    assert gpu_report.main(["--dry-run"]) == 0
    assert folders == [tmp_path / "results"]


@pytest.mark.parametrize("name", ["jsd", "a top-k teacher, bucket"])
def test_objectives_are_compared_with_the_reference(name, monkeypatch):
    batch = gpu_objectives.make(5, 100, torch.float32, "cpu")
    assert gpu_objectives.compare(name, batch, "cpu")[0]
    step = gpu_objectives._step

    def off(batch, backend, options):
        loss, grad = step(batch, backend, options)
        return loss, grad * (1 + 1e-5 * (backend == "cpu"))

    monkeypatch.setattr(gpu_objectives, "_step", off)
    assert not gpu_objectives.compare(name, batch, "cpu")[0]


def test_the_example_of_timm_is_a_check_where_timm_loads(work, monkeypatch):
    work.mkdir()
    load = gpu_checks.importlib.import_module
    ended = subprocess.CompletedProcess([], 1, "what failed\n1 failed in 2 s\n")
    monkeypatch.setattr(gpu_checks.subprocess, "run", lambda *a, **k: ended)

    def outcome(import_module):
        monkeypatch.setattr(gpu_checks.importlib, "import_module", import_module)
        passed = gpu_checks.timm_example(work)
        (check,) = gpu_results.read_part(work, "checks-timm", [])
        assert passed is (check["passed"] is not False)
        return check["passed"], check["detail"]

    def operators_differ(name):
        if name == "timm.task":
            raise RuntimeError("operator torchvision::nms does not exist")
        return load(name)

    passed, reason = outcome(operators_differ)
    assert passed is None
    assert "timm.task does not load" in reason
    assert "torchvision::nms" in reason
    assert outcome(lambda name: None) == (False, "1 failed in 2 s")
    ended.returncode = 0
    assert outcome(lambda name: None)[0] is True


def test_a_step_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu_report.parse(["--only", "build,misspelt"])
    assert "no such step: misspelt" in capsys.readouterr().err


# --- the script -----------------------------------------------------------------------------------

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@needs_bash
def test_the_script_parses():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


@needs_bash
def test_without_a_gpu_the_script_says_so_and_starts_nothing(tmp_path):
    listing = tmp_path / "nvidia-smi"  # in the place of one that might find a GPU
    listing.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    listing.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "none"),
    }
    done = subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no GPU is visible" in done.stderr
    assert "Nothing was built or measured" in done.stderr
    assert not done.stdout
