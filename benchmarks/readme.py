"""The part of the README that is generated from a report: a table and a plot."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu_results import TRAIN, Results, in_order, table
from benchmarks.markdown import duration
from benchmarks.results import (
    COMPILED,
    COPY,
    CROSS_ENTROPY,
    EAGER,
    EMPTY_STEP,
    FUSED,
    INPLACE,
    LABELS,
    TEMPERATURE,
    seconds,
    shape_of,
    stem,
    threads,
)
from benchmarks.targets import LARGE, Ratio

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
README_COLUMNS = [FUSED, INPLACE, EAGER, COMPILED, CROSS_ENTROPY, COPY, EMPTY_STEP]
README_RATIOS = [(EAGER, FUSED), (COMPILED, FUSED), (FUSED, COPY)]


def readme_section(results: Results, folder: str) -> str:
    """The generated part of the README: machine and versions, a table and a plot."""
    measured = in_order(results["measurements"])
    chosen = [m for m in measured if _shown(m, "float32")]
    chosen += [m for m in measured if _shown(m, "bfloat16") and shape_of(m) in LARGE]
    ratios = [f"{LABELS[over]} / {LABELS[under]}" for over, under in README_RATIOS]
    rows = []
    for m in chosen:
        times = [_plain(seconds(m, name)) for name in README_COLUMNS]
        shares = [_share(Ratio(*pair).of(m)) for pair in README_RATIOS]
        rows.append([f"{shape_of(m)} {m['dtype']}", *times, *shares])
    header = ["(rows, classes)", *(LABELS[n] for n in README_COLUMNS), *ratios]
    name = f"{folder}/{stem(results['environment'])}"
    return "\n\n".join(
        [
            f"Forward + backward, T = {TEMPERATURE:g}, medians of one run. {one_line(results)}",
            table(header, rows),
            *_with_huge_pages(measured),
            f"![How many times faster than PyTorch, by shape]({name}-speedup.png)",
            f"[All figures, the memory and the curves]({name}.md), and how they were measured.",
        ]
    )


def _with_huge_pages(measured: list[Results]) -> list[str]:
    """The comparison that is fairest to PyTorch, of the first large shape, if it was made."""
    for m in measured:
        if not _shown(m, "float32", huge_pages=True) or shape_of(m) not in LARGE:
            continue
        ratios = [
            f"{LABELS[over]} {_share(ratio)}"
            for over in (EAGER, COMPILED, CROSS_ENTROPY)
            if (ratio := Ratio(over, FUSED).of(m))
        ]
        return [
            "PyTorch's large tensors are fresh memory in each step, and page faults a good part of "
            "its times. With huge pages for all (`THP_MEM_ALLOC_ENABLE=1`), as multiples of "
            f"kdkernels at {shape_of(m)} in float32: {', '.join(ratios)}."
        ]
    return []


def _shown(m: Results, dtype: str, huge_pages: bool = False) -> bool:
    wanted = (dtype, TEMPERATURE, TRAIN, huge_pages)
    return (m["dtype"], m["temperature"], m["direction"], m["huge_pages"]) == wanted


def _plain(s: float | None) -> str:
    return "" if s is None else duration(s)


def _share(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}×" if ratio >= 3 else f"{ratio:.2f}×"


def one_line(results: Results) -> str:
    """Machine and versions."""
    known = results["environment"]
    parts = [threads(known), known.get("kernels", "")]
    versions = ", ".join(f"{n} {known[n]}" for n in ("torch", "kdkernels", "Python") if n in known)
    machine = ", ".join([known.get("device", "unknown device"), *filter(None, parts)])
    return f"{machine}; {versions}."


def replace_between_markers(text: str, section: str) -> str:
    """``text`` with ``section`` between the markers, which stay.

    Raises:
        ValueError: not exactly one pair of markers in their order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"expected one pair of markers, {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{section}\n\n{END}{after}"


def rewrite_readme(readme: Path, results: Results, folder: str) -> None:
    text = readme.read_text(encoding="utf-8")
    section = readme_section(results, folder)
    readme.write_text(replace_between_markers(text, section), encoding="utf-8")
