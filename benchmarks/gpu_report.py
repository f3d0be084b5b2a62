"""The steps of ``benchmarks/gpu_report.sh``, in their order, each in a process of its own.

A step that fails, crashes or outlasts its time does not end the others. Each leaves what it found
in the work folder, and after each the results are published again.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu_results import Results, copy_out, publish, read_part, stem, write_part

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 465.0
LEAST_SECONDS = 5.0  # a step with less is not worth starting
TOOL = "benchmarks.gpu_report"


class Step(NamedTuple):
    name: str
    seconds: float  # its share of the time, when nothing before it ran over
    at_least: float = 0.0  # what follows is worth less without it: it may run over its share
    decides: bool = True  # whether its failure is a failure of the report


# What is wrong need not be fast: checks come first, but for the sanitizers, which take their time.
STEPS = [
    Step("build", 70, at_least=200),
    Step("info", 12, at_least=60),
    Step("correctness", 70),
    Step("objectives", 45),
    Step("large", 18),
    Step("streams", 16),
    Step("timm", 15),
    Step("measure", 150, decides=False),
    Step("small-batch", 16, decides=False),
    Step("memcheck", 30),
    Step("racecheck", 30),
    Step("initcheck", 25),
    Step("profile", 25, decides=False),
    Step("plot", 4, decides=False),
]
SANITIZERS = ("memcheck", "racecheck", "initcheck")
GPU_BACKENDS = ["cuda", "triton"]
CPU_BACKENDS = ["cpu", "reference"]  # in their place in the dry run


def allowance(step: Step, later: list[Step], seconds_left: float) -> tuple[float, float]:
    """(what a step should take, when it is ended), both in seconds.

    The time that is left is shared out in proportion, so that a step that ran over costs all those
    after it alike, and one that was quick leaves them more.
    """
    fair = step.seconds * seconds_left / (step.seconds + sum(s.seconds for s in later))
    limit = min(max(1.15 * fair, step.at_least), seconds_left - LEAST_SECONDS * len(later))
    return min(fair, limit), limit


# --- running a step -------------------------------------------------------------------------------


def run_logged(command: list[str], limit: float, log: Path, environment: dict[str, str]) -> int:
    """Run a command for ``limit`` seconds at most, its output shown and kept; its exit status.

    The output goes by way of a file: a pipe would stay open as long as any process it started.
    """
    with open(log, "w") as sink, open(log, errors="replace") as source:
        process = subprocess.Popen(
            ["timeout", "-k", "5", f"{limit:.1f}", *command],
            cwd=ROOT,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )
        while True:
            ended = process.poll() is not None
            print(source.read(), end="", flush=True)
            if ended:
                return process.returncode
            time.sleep(0.1)


def outcome_of(status: int) -> str:
    if status == 124:  # by `timeout`
        return "ran out of time"
    if status in (137, -9):  # by its -k, or by the system
        return "killed: out of time or memory"
    return "passed" if status == 0 else "failed"


class Report:
    """One run: where it works and what it may use."""

    def __init__(self, options: argparse.Namespace, work: Path, folder: Path) -> None:
        self.options, self.work, self.folder = options, work, folder

    def log(self, name: str) -> Path:
        return self.work / f"{name}.log"

    def run(self, name: str, command: list[str], limit: float, **environment: str) -> str:
        """The outcome of a command."""
        return outcome_of(run_logged(command, limit, self.log(name), environment))

    def python(self, step: str, seconds: float) -> list[str]:
        """The command that makes a step of this package, in a process of its own."""
        command = [sys.executable, "-m", TOOL, "--step", step, "--seconds", f"{seconds:.1f}"]
        command += ["--work", str(self.work), "--results", str(self.folder)]
        return command + (["--dry-run"] if self.options.dry_run else [])

    def perform(self, step: Step, seconds: float, limit: float) -> str:
        """The outcome of a step: passed, failed, ran out of time, or why it was skipped."""
        special: dict[str, Callable[[float], str]] = {
            "build": self.build,
            "profile": self.profile,
            **{tool: lambda limit, tool=tool: self.sanitize(tool, limit) for tool in SANITIZERS},
        }
        if step.name in special:
            return special[step.name](limit)
        return self.run(step.name, self.python(step.name, seconds), limit)

    def build(self, limit: float) -> str:
        """In place, for the GPUs that are visible; nothing of the environment is touched."""
        if self.options.dry_run:
            return "skipped: dry run"
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        outcome = self.run("build", command, limit, KDKERNELS_CUDA="1")
        # A build without the CUDA kernels is none that setup.py would fail for.
        reason = read_part(ROOT / "kdkernels", "_build", {}).get("cuda")
        return f"failed: {reason}" if outcome == "passed" and reason else outcome

    def sanitize(self, tool: str, limit: float) -> str:
        command = self.python("small-shapes", limit)
        if not self.options.dry_run:
            if not shutil.which("compute-sanitizer"):
                return "skipped: no compute-sanitizer on the PATH"
            driver, command = command, ["compute-sanitizer", "--tool", tool]
            command += ["--target-processes", "application-only", "--error-exitcode", "9", *driver]
        # Without a cache every tensor is an allocation of its own, with guarded ends.
        outcome = self.run(tool, command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        if not self.options.dry_run and outcome in ("passed", "failed"):
            summary = sanitizer_summary(self.log(tool).read_text(errors="replace"))
            clean = outcome == "passed" and summary is not None and not re.search("[1-9]", summary)
            check = {"step": tool, "name": tool, "passed": clean}
            write_part(self.work, f"checks-{tool}", [check | {"detail": summary or "no summary"}])
            outcome = "passed" if clean else "failed"
        return outcome

    def profile(self, limit: float) -> str:
        """Nsight Compute on the kernel of the rows; its tables go to the results."""
        command = self.python("profiled", limit)
        if not self.options.dry_run:
            if not shutil.which("ncu"):
                return "skipped: no ncu on the PATH"
            # The clocks are left as they are found.
            ncu = ["ncu", "--profile-from-start", "off", "--clock-control", "none"]
            ncu += ["--kernel-name", "regex:rows_kernel", "--metrics", ",".join(METRICS)]
            command = [*ncu, *(f"--section={name}" for name in SECTIONS), *command]
        outcome = self.run("profile", command, limit)
        text = self.log("profile").read_text(errors="replace")
        lines = [line for line in text.splitlines() if not line.startswith("==PROF==")]
        name = f"{stem(read_part(self.work, 'environment', {}))}-ncu.txt"
        (self.folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return outcome


# What a kernel waits for: memory, issue slots, one unit, or too few warps.
SECTIONS = [
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
]
METRICS = ["dram__bytes_read.sum", "dram__bytes_write.sum"]  # three arrays, or more


def sanitizer_summary(text: str) -> str | None:
    """The line with which compute-sanitizer ends: its counts of errors, hazards and warnings."""
    found = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)$", text, re.MULTILINE)
    return "; ".join(line.strip() for line in found) or None


# --- the steps that are this package's own --------------------------------------------------------


def own_step(options: argparse.Namespace) -> int:
    """What ``--step`` names, in this process."""
    if options.step == "plot":
        return 0 if draw(options.work, options.results) else 1
    # Here and not above: these steps need torch, the process that starts them does not.
    from benchmarks import gpu_checks, gpu_objectives, gpu_timing

    plan = plan_for(options)
    device, backends, work = plan.device, plan.backends, options.work
    largest = 1500 if options.dry_run else 1 << 30
    huge = (60, 40) if options.dry_run else (17000, 131072)
    profiled = plan.shapes[:1] if options.dry_run else [(4096, 128256), (8192, 4096)]
    steps: dict[str, Callable[[], Any]] = {
        "info": lambda: info(work, device, backends),
        "warm-compiler": lambda: gpu_timing.warm_compiler(plan),
        "warm-kernels": lambda: gpu_timing.warm_kernels(plan, largest, options.part),
        "correctness": lambda: gpu_checks.correctness(
            work, device, backends, largest, options.seconds
        ),
        "measure": lambda: gpu_timing.measure(work, plan, options.seconds),
        "small-batch": lambda: gpu_timing.small_batches(work, plan),
        "small-shapes": lambda: gpu_checks.small_shapes(device, backends, largest),
        "objectives": lambda: gpu_objectives.objectives(work, device, backends, options.seconds),
        "large": lambda: gpu_checks.large(work, device, backends, huge),
        "streams": lambda: gpu_checks.streams(work, device, backends, [100, 4096, 128256]),
        "timm": lambda: gpu_checks.timm_example(work),
        "profiled": lambda: gpu_checks.profiled(device, backends, profiled),
    }
    return 1 if steps[options.step]() is False else 0


def draw(work: Path, folder: Path) -> bool:
    from benchmarks.gpu_plot import plot

    results = publish(work, folder)
    name = stem(results["environment"])
    drawn = plot(results, folder / f"{name}.png")
    copy_out(folder, name)
    return drawn


def plan_for(options: argparse.Namespace) -> Any:
    from benchmarks import gpu_timing

    device, backends, shapes, folder = "cuda", GPU_BACKENDS, gpu_timing.SHAPES, options.results
    plan = gpu_timing.Plan(device, backends, shapes, "inductor", 1 << 32, 8.0, 6.0, folder)
    if options.dry_run:
        shapes = [(16, 5000), (128, 100), (32, 300)]
        plan = gpu_timing.Plan("cpu", CPU_BACKENDS, shapes, "eager", 1 << 22, 0.3, 0.2, folder)
    # One that cannot run is a failed check of `info`; the others are measured all the same.
    from kdkernels.backends import BACKENDS

    able = [b for b in plan.backends if b in BACKENDS and BACKENDS[b].unavailable() is None]
    return plan._replace(backends=able)


def info(work: Path, device: str, able: list[str]) -> bool:
    """What the report was made on, and whether the backends it is about can run."""
    import torch

    import kdkernels
    from benchmarks.gpu_checks import Checks
    from kdkernels import backends
    from kdkernels.__main__ import info as print_info

    # First of all: without it no results are published.
    write_part(work, "environment", environment(torch, kdkernels.__version__, device))
    print_info()
    checks = Checks(work, "info")
    reasons = {name: text for name, _, text in backends.report()}
    for name in CPU_BACKENDS if device == "cpu" else GPU_BACKENDS:
        checks.record(name, name in able, reasons.get(name, "this version has no such backend"))
    return checks.all_passed()


def environment(torch: Any, version: str, device: str) -> dict[str, str]:
    """Device, versions, commit and date."""
    found = {"device": "CPU, a dry run", "driver": "none", "memory": "", "multiprocessors": ""}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found = {
            "device": properties.name,
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "multiprocessors": f"{properties.multi_processor_count}, "
            f"L2 {properties.L2_cache_size / 2**20:.0f} MiB",
        }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = "not installed"
    commit = os.environ.get("KDKERNELS_COMMIT") or output("git", "rev-parse", "HEAD")
    changed = output("git", "status", "--porcelain", "--untracked-files=no")
    if commit != "unknown" and changed not in ("", "unknown"):
        commit += ", with changes"
    return found | {
        "torch": torch.__version__,
        "CUDA": f"{torch.version.cuda} of torch, nvcc {nvcc_release()}",
        "kdkernels": version,
        "Python": platform.python_version(),
        "commit": commit,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def output(*command: str) -> str:
    """The first line that a command prints, or "unknown"."""
    try:
        text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = text.stdout.splitlines()
    return "unknown" if text.returncode else (lines[0].strip() if lines else "")


def nvcc_release() -> str:
    try:
        text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    found = re.search(r"release ([\d.]+)", text.stdout)
    return found[1] if found else "unknown"


# --- all steps ------------------------------------------------------------------------------------


def all_steps(report: Report, steps: list[Step], seconds: float) -> list[Results]:
    """Every step in its turn; what became of them."""
    begin = time.monotonic()
    # Steps of an earlier run with --only stay in the report.
    done = [s for s in read_part(report.work, "steps", []) if s["name"] not in _names(steps)]
    warming = start_warming(report) if "measure" in _names(steps) else []
    try:
        for i, step in enumerate(steps):
            if step.name == "measure":
                stop(warming)  # it would be measured with
            started = time.monotonic()
            fair, limit = allowance(step, steps[i + 1 :], seconds - (started - begin))
            print(f"\n=== {step.name}, {limit:.0f} s at most", flush=True)
            outcome = "skipped: no time left"
            if limit >= LEAST_SECONDS:
                outcome = report.perform(step, fair, limit)
            done.append(
                {"name": step.name, "outcome": outcome, "seconds": time.monotonic() - started}
            )
            print(f"=== {step.name}: {outcome}", flush=True)
            write_part(report.work, "steps", done)
            publish(report.work, report.folder)
    finally:
        stop(warming)
    return done


def _names(steps: list[Step]) -> list[str]:
    return [step.name for step in steps]


def start_warming(report: Report) -> list[subprocess.Popen[bytes]]:
    """torch.compile and Triton take their minutes while the GPU has nothing to do: in the build."""
    parts = max(1, min(8, (os.cpu_count() or 1) // 4))  # the build needs cores, too
    commands = [report.python("warm-compiler", 0)]
    for part in range(parts):
        commands.append([*report.python("warm-kernels", 0), "--part", str(part), str(parts)])
    with open(report.log("warm"), "w") as sink:
        return [
            subprocess.Popen(
                command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
            )
            for command in commands
        ]


def stop(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def failures(steps: list[Results], results: Results) -> list[str]:
    """Steps and checks that failed, or could not be made: without them nothing is shown to hold."""
    decisive = {step.name for step in STEPS if step.decides}
    ended = ("passed", "skipped: dry run")
    found = [
        f"{step['name']}: {step['outcome']}"
        for step in steps
        if step["name"] in decisive and step["outcome"] not in ended
    ]
    checks = [c for c in results["checks"] if c["passed"] is False]
    return found + [f"{c['step']}: {c['name']}: {c['detail']}" for c in checks]


def summary(steps: list[Results], results: Results, folder: Path) -> int:
    """What failed, and the targets; the exit status."""
    print("\n=== summary")
    for step in steps:
        print(f"{step['name']:<12} {step['outcome']}, {step['seconds']:.0f} s")
    for target in results["targets"]:
        met = {True: "met", False: "NOT MET", None: "not measured"}[target["met"]]
        print(f"{met:<12} {target['name']}, {target['of']}: {target['measured']}")
    failed = failures(steps, results)
    for line in failed:
        print(f"FAILED       {line}")
    print(f"results: {folder}")
    return 1 if failed else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_report.sh", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, without a build")
    parser.add_argument("--only", help=f"some of: {','.join(_names(STEPS))}")
    hidden = argparse.SUPPRESS
    parser.add_argument("--step", help=hidden)
    parser.add_argument("--seconds", type=float, default=60.0, help=hidden)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help=hidden)
    parser.add_argument("--work", type=Path, help=hidden)
    parser.add_argument("--results", type=Path, help=hidden)
    options = parser.parse_args(argv)
    if options.only:
        options.only = options.only.split(",")
        unknown = set(options.only) - set(_names(STEPS))
        if unknown:
            parser.error(f"no such step: {', '.join(sorted(unknown))}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.step:
        return own_step(options)
    work, folder = ROOT / "build" / "gpu_report", ROOT / "benchmarks" / "results"
    if options.dry_run:
        work = Path(tempfile.mkdtemp(prefix="gpu_report."))
        folder = work / "results"
    work.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    if not options.only:  # another run's findings are not this one's
        for part in work.glob("*.json"):
            part.unlink()
    # Without `info` nobody knows which device the results are of.
    steps = [s for s in STEPS if not options.only or s.name in (*options.only, "info")]
    seconds = float(os.environ.get("KDKERNELS_REPORT_SECONDS", SECONDS))
    done = all_steps(Report(options, work, folder), steps, seconds)
    return summary(done, publish(work, folder), folder)


if __name__ == "__main__":
    sys.exit(main())
