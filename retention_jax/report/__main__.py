"""One page of everything a results folder holds.

    python -m retention_jax.report --results=runs/recall/eval --output=report.html

reads results.json and the traces of `python -m retention_jax.report.trace` (*.trace.npz), and writes a page that
needs no network, and beside it the figures as PNG files, report_*.png. How the page looks, and what its console says:

    python -m http.server 8000 --bind 127.0.0.1 &
    chromium --headless=new --no-sandbox --hide-scrollbars --enable-logging=stderr --window-size=1280,2600 \
        --virtual-time-budget=15000 --screenshot=report.png http://127.0.0.1:8000/report.html 2>&1 | grep CONSOLE

and once more with --blink-settings=preferredColorScheme=0, for dark pages. The server's log has one request.
"""

import functools
import pathlib
import re
from collections.abc import Sequence

from absl import app, flags

from retention_jax.evaluation import plots
from retention_jax.report import figures, page, results
from retention_jax.report.results import Results
from retention_jax.runtime import command, files


def define_flags(values: flags.FlagValues) -> None:
    """Not at import, so that tests can have flags of their own."""
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    text("results", None, "Folder with results.json, *.trace.npz, or both.")
    text("output", None, "HTML file to write; its folder also gets the figures.")
    text("title", "Retention under a budget", "Heading of the page.")
    flags.DEFINE_integer(
        "most_entries",
        2_000_000,
        "Entries (layer x head x token) of a trace that the page holds; of larger ones it shows fewer heads.",
        lower_bound=1,
        flag_values=values,
    )
    flags.mark_flags_as_required(["results", "output"], flag_values=values)


def write_figures(found: Results, output: pathlib.Path) -> list[pathlib.Path]:
    """Draws every figure beside the page; names are the page's, then what is drawn."""

    def path(*parts: object) -> pathlib.Path:
        return output.with_name(re.sub(r"[^\w.-]+", "_", "_".join(map(str, (output.stem, *parts)))) + ".png")

    written = []
    for task in dict.fromkeys(row.task for row in found.rows):
        mine = [row for row in found.rows if row.task == task]
        for name, draw in (("quality", plots.quality), ("memory", plots.memory)):
            files.write_atomically(path(name, task), functools.partial(draw, mine))
            written.append(path(name, task))
    for group in found.groups:
        first = group[0]
        of = (first.policy, first.budget, first.length)
        for name, draw in (
            ("heads", functools.partial(figures.heads, group)),
            ("kept", functools.partial(figures.kept, first)),
        ):
            files.write_atomically(path(name, *of), draw)
            written.append(path(name, *of))
    return written


def main(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    output = pathlib.Path(values.output).expanduser()
    if output.suffix != ".html":
        raise ValueError(f"--output must end in .html, got {values.output}")
    found = results.read(pathlib.Path(values.results).expanduser())
    output.parent.mkdir(parents=True, exist_ok=True)
    html = page.build(found, values.title, values.most_entries)
    files.write_atomically(output, lambda temporary: temporary.write_text(html, encoding="utf-8"))
    for path in (output, *write_figures(found, output)):
        print(path)


if __name__ == "__main__":
    command.run(main, define_flags)
