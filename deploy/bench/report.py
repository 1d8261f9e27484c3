"""The tables of ``spikeport bench neurons``, and its files."""

from __future__ import annotations

import json
from pathlib import Path

from ...converters.errors import UsageError
from .neurons import Cell, Results, cells_by
from .timing import FORWARD_BACKWARD_WORDS, FORWARD_WORDS, roofline

#: Title, attribute of an entry, words an element.
PASSES = (
    ("forward", "forward", FORWARD_WORDS),
    ("forward + backward", "forward_backward", FORWARD_BACKWARD_WORDS),
)


def names(cells: list[Cell]) -> list[str]:
    """The contestants of some cells, in their order."""
    return list(dict.fromkeys(e.name for cell in cells for e in cell.entries))


def tables(results: Results) -> str:
    """All tables, as text."""
    parts = [", ".join(f"{k} {v}" for k, v in results.machine.items())]
    for neuron, dtype, cells in cells_by(results):
        for title, attribute, words in PASSES:
            unit = "ms" if cells[0].copy is None else "ms (fraction of the roofline)"
            head = f"{neuron}, {dtype}, N = {cells[0].N}: {title}, {unit}"
            parts.append(f"{head}\n{_times(cells, attribute, words)}")
    parts.append("against the torch backend in float32, over all T\n" + _errors(results))
    parts.append("first call of both passes, s\n" + _first_calls(results))
    notes = [f"left out: {note}" for note in results.left_out]
    notes += [
        f"failed: {e.name}, {c.neuron}, {c.dtype}, T = {c.T}: {e.failure}"
        for c in results.cells
        for e in c.entries
        if e.failure is not None
    ]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def _times(cells: list[Cell], attribute: str, words: int) -> str:
    columns = names(cells)
    floor = [f"roofline, {words} words"] if cells[0].copy is not None else []
    rows = [["T", *columns, *floor]]
    for cell in cells:
        by_name = {e.name: e for e in cell.entries}
        row = [str(cell.T)]
        for name in columns:
            entry = by_name.get(name)
            ms = getattr(entry, attribute) if entry else None
            fraction = getattr(entry, f"{attribute}_fraction") if entry else None
            if ms is None:
                row.append("failed" if entry else "-")
            else:
                row.append(f"{ms:.4g}" + (f" ({fraction:.2f})" if fraction is not None else ""))
        if cell.copy is not None:
            row.append(f"{roofline(cell.copy, words):.4g}")
        rows.append(row)
    return _aligned(rows)


def _first_calls(results: Results) -> str:
    steps = sorted({c.T for c in results.cells})
    rows = [["neuron", "dtype", "contestant", *(f"T = {T}" for T in steps)]]
    for neuron, dtype, cells in cells_by(results):
        for name in names(cells):
            taken = {c.T: e.first_s for c in cells for e in c.entries if e.name == name}
            seconds = (taken.get(T) for T in steps)
            rows.append([neuron, dtype, name, *("-" if s is None else f"{s:.1f}" for s in seconds)])
    return _aligned(rows)


def _errors(results: Results) -> str:
    rows = [["neuron", "dtype", "contestant", "spikes that differ", "|h - threshold|", "gradient"]]
    for neuron, dtype, cells in cells_by(results):
        for name in names(cells):
            found = [
                e.errors
                for c in cells
                for e in c.entries
                if e.name == name and e.errors is not None
            ]
            if found:
                differing, spikes = sum(e.differing for e in found), sum(e.spikes for e in found)
                distance = max(e.distance for e in found)
                gradient = max(e.gradient for e in found)
                rows.append(
                    [
                        neuron,
                        dtype,
                        name,
                        f"{differing} of {spikes}",
                        f"{distance:.2g}",
                        f"{gradient:.2g}",
                    ]
                )
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows
    )


def prepare(folder: Path) -> None:
    """Make sure, before anything runs, that the results can be written.

    Raises:
        UsageError: matplotlib is not installed, or the folder cannot be made.
    """
    try:
        import matplotlib  # noqa: F401 -- whether it is there
    except ImportError as error:
        raise UsageError(
            "the bar charts need matplotlib, which is not installed: pip install 'spikeport[bench]'"
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be made: {error.strerror}") from error


def write(results: Results, folder: Path) -> list[Path]:
    """Write results.json and the two charts, each as PNG and SVG; the files."""
    path = folder / "results.json"
    path.write_text(json.dumps(results.to_dict(), indent=2) + "\n", encoding="utf-8")
    return [path, *_charts(results, folder)]


def _charts(results: Results, folder: Path) -> list[Path]:
    from matplotlib.figure import Figure

    groups = [*cells_by(results)]
    written = []
    for title, attribute, words in PASSES:
        figure = Figure(figsize=(7 * min(len(groups), 2), 5 * -(-len(groups) // 2) + 1))
        axes = figure.subplots(-(-len(groups) // 2), min(len(groups), 2), squeeze=False).flat
        for (neuron, dtype, cells), ax in zip(groups, axes, strict=False):
            columns = names(cells)
            width = 0.8 / len(columns)
            for i, name in enumerate(columns):
                bars = [
                    (at + (i - (len(columns) - 1) / 2) * width, getattr(e, attribute))
                    for at, cell in enumerate(cells)
                    for e in cell.entries
                    if e.name == name and getattr(e, attribute) is not None
                ]
                ax.bar([x for x, _ in bars], [ms for _, ms in bars], width, label=name)
            floor = {at: c.copy for at, c in enumerate(cells) if c.copy is not None}
            if floor:
                ax.hlines(
                    [roofline(copy, words) for copy in floor.values()],
                    [at - 0.45 for at in floor],
                    [at + 0.45 for at in floor],
                    colors="black",
                    label=f"roofline, {words} words an element",
                )
            ax.set_xticks(range(len(cells)), [str(cell.T) for cell in cells])
            ax.set(title=f"{neuron}, {dtype}, N = {cells[0].N}", xlabel="T", ylabel="time, ms")
            ax.set_yscale("log")
            ax.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
        for unused in axes:
            unused.set_visible(False)
        figure.suptitle(f"{title}, {results.machine['device']}")
        figure.tight_layout()
        for suffix in ("png", "svg"):
            written.append(folder / f"neurons_{attribute}.{suffix}")
            figure.savefig(written[-1], dpi=150)
    return written
