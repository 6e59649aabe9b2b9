"""What came out of a demo run: tables, plots and the model card.

    cells = [Cell("SAMerging", seed=0, accuracies={"r8": 0.91, ...}, seconds=12.0, peak_bytes=1 << 29), ...]
    rich.print(accuracy_table(cells))                            # one row per method, mean ± deviation over seeds
    markdown_table(cells)                                        # the same as Markdown, for the README and the card
    plot_accuracies(cells, "accuracies.png")
    write_card(folder / "README.md", base=..., method="SAMerging", config={...}, cells=cells, seed=0)

Rows and columns come in the order in which methods and tasks first appear in ``cells``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from samerge_ext.checkpoints.saving import atomic_write
from samerge_ext.reports.plots import colour_map, plot_figure, save_figure

if TYPE_CHECKING:  # an optional dependency
    from rich.table import Table

LICENCES = (
    "The backbone, all-MiniLM-L6-v2, is Apache-2.0. The experts were fine-tuned on corpora that are not part of this "
    "folder; some of them state no licence (Reuters-21578, 20 Newsgroups, Rotten Tomatoes snippets, tweets), so look "
    "at their terms before you use these weights for anything but research."
)


# Methods whose means are 0 and 100 % of the gap that merging has to close.
FLOOR, CEILING = "Task Arithmetic, λ = 0.3", "experts"


@dataclass(frozen=True)
class Cell:
    """One method at one seed.

    accuracies: task → share of its test texts classified correctly.
    seconds: what the method took, without the evaluation; None where nothing was computed (pretrained, experts).
    peak_bytes: peak memory of the method, None where not measured.
    """

    method: str
    seed: int
    accuracies: dict[str, float]
    seconds: float | None = None
    peak_bytes: int | None = None

    @property
    def mean(self) -> float:
        """Mean over tasks, each counting the same."""
        return mean(self.accuracies.values())


def spread(values: Sequence[float | None], factor: float = 1.0, decimals: int = 1) -> str:
    """Mean ± sample standard deviation (n − 1), as text; the value alone where there is one, "–" for none."""
    known = [value * factor for value in values if value is not None]
    if not known:
        return "–"
    deviation = f" ± {stdev(known):.{decimals}f}" if len(known) > 1 else ""
    return f"{mean(known):.{decimals}f}{deviation}"


def by_method(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """method → its cells, one per seed. Two cells of one method and seed raise ValueError."""
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        held = grouped.setdefault(cell.method, [])
        if cell.seed in {other.seed for other in held}:
            raise ValueError(f"two results of {cell.method} for seed {cell.seed}")
        held.append(cell)
    return grouped


def tasks_of(cells: Sequence[Cell]) -> list[str]:
    """The tasks of all cells; a cell that lacks one raises ValueError, since its mean would not compare."""
    tasks = list(cells[0].accuracies)
    for cell in cells:
        if set(cell.accuracies) != set(tasks):
            raise ValueError(f"{cell.method}, seed {cell.seed}: accuracies of {sorted(cell.accuracies)}, not of {sorted(tasks)}")
    return tasks


def gaps_closed(cells: Sequence[Cell]) -> dict[tuple[str, int], float]:
    """(method, seed) → how far its mean goes from FLOOR's to CEILING's; of seeds that have both, with a gap between them."""
    means = {(cell.method, cell.seed): cell.mean for cell in cells}
    closed = {}
    for (method, seed), found in means.items():
        floor, ceiling = means.get((FLOOR, seed)), means.get((CEILING, seed))
        if floor is not None and ceiling is not None and ceiling > floor:
            closed[method, seed] = (found - floor) / (ceiling - floor)
    return closed


def table_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of text: method, accuracy in % per task, their mean, the share in % of the gap that it closes where that
    is known, seconds, the highest peak memory in MiB."""
    tasks, gaps = tasks_of(cells), gaps_closed(cells)
    rows = []
    for method, held in by_method(cells).items():
        accuracies = [spread([cell.accuracies[task] for cell in held], 100) for task in tasks]
        peaks = [cell.peak_bytes for cell in held if cell.peak_bytes is not None]
        rows.append(
            [
                method,
                *accuracies,
                spread([cell.mean for cell in held], 100),
                *([spread([gaps.get((method, cell.seed)) for cell in held], 100)] if gaps else []),
                spread([cell.seconds for cell in held]),
                f"{max(peaks) / 2**20:.0f}" if peaks else "–",
            ]
        )
    return ["method", *tasks, "mean", *(["gap closed"] if gaps else []), "seconds", "peak MiB"], rows


def accuracy_table(cells: Sequence[Cell], title: str = "Accuracy on the test texts, %") -> Table:
    """The table for a terminal."""
    return rich_table(*table_rows(cells), title)


def markdown_table(cells: Sequence[Cell]) -> str:
    """The table as GitHub Markdown."""
    return markdown(*table_rows(cells))


def rich_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    """A ``rich.table.Table``; the mean column is bold. No column is ever cut, however narrow the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, width=sum(widths) + 3 * len(widths))
    for name in header:
        style = "bold" if name == "mean" else None
        table.add_column(name, justify="left" if name == "method" else "right", style=style, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as GitHub Markdown."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows]) + "\n"


def plot_accuracies(cells: Sequence[Cell], path: str | Path) -> None:
    """Bars per task and for the mean, one colour per method; whiskers are standard deviations over seeds."""
    grouped, tasks = by_method(cells), tasks_of(cells)
    figure, axes = plot_figure(width=1.2 + 1.3 * (len(tasks) + 1), height=4)
    colours = colour_map("viridis")
    width = 0.85 / len(grouped)
    for i, (method, held) in enumerate(grouped.items()):
        series = [[cell.accuracies[task] for cell in held] for task in tasks] + [[cell.mean for cell in held]]
        places = [place + (i - (len(grouped) - 1) / 2) * width for place in range(len(series))]
        deviations = [stdev(values) for values in series] if len(held) > 1 else None
        colour = colours(i / max(len(grouped) - 1, 1))
        axes.bar(places, [mean(values) for values in series], width, yerr=deviations, label=method, color=colour)
    axes.set_xticks(range(len(tasks) + 1), [*tasks, "mean"])
    axes.set_ylabel("accuracy on test texts")
    axes.set_ylim(0, 1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    save_figure(figure, path)


def write_card(
    path: str | Path,
    *,
    base: str,
    method: str,
    config: Mapping[str, object],
    descriptions: Mapping[str, Sequence[str]],
    cells: Sequence[Cell],
    images: Sequence[str] = (),
) -> None:
    """A model card in Markdown, with the metadata block that model hubs read.

    base: the pretrained model's name. config: what the method ran with (JSON values). descriptions: task → the class
    descriptions of its head. cells: results to show. images: plots in the same folder.
    """
    metadata = ["---", f"base_model: {base}", "library_name: transformers", "license: other", "tags: [merge, samerge_ext]", "---"]
    tasks = [f"- **{task}**, {len(classes)} classes: {'; '.join(classes)}" for task, classes in descriptions.items()]
    sections = [
        "\n".join(metadata),
        f"# {base} merged by {method}",
        f"One encoder made of {len(descriptions)} experts, each fine-tuned from `{base}` on one task, by {method}. "
        "A text is embedded by the mean of the last hidden states, scaled to unit length; a task's logits are 20 times "
        "the products with its class prototypes, which are the pretrained encoder's embeddings of these descriptions:",
        "\n".join(tasks),
        "## Accuracy\n\nIn per cent on test texts that neither training nor merging has seen.",
        markdown_table(cells).strip(),
        *[f"![{Path(image).stem}]({image})" for image in images],
        "## Configuration\n\n```json\n" + json.dumps(dict(config), indent=2, ensure_ascii=False) + "\n```",
        "## Licence\n\n" + LICENCES,
    ]
    with atomic_write(path, "w") as file:
        file.write("\n\n".join(sections) + "\n")
