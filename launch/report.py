"""`keel report RUN`: one HTML page about a run, or about the difference of two."""

from pathlib import Path

from launch import arguments
from launch.runs import find_run

HELP = "write a page about a run, or compare two"
USAGE = f"""
keel report RUN [--out FILE]
keel report A B [--out FILE]

{HELP}: one HTML file with everything in it, which needs no network.

  RUN, A, B    a run's folder, or its name under runs/
  --out FILE   where the page goes; default: report.html in the run's folder, or A-vs-B.html beside B
"""


def main(argv: list[str]) -> int:
    """Write the page and say where it is."""
    given = arguments.parse(argv, {"--out": str}, USAGE)
    if len(given.words) not in (1, 2):
        raise ValueError(f"RUN = {' '.join(given.words)}: expected one run to report on, or two to compare")
    folders = [find_run(word) for word in given.words]
    from trainer.report.compare import comparison
    from trainer.report.page import page
    from trainer.report.read import Folder

    runs = [Folder(folder).read() for folder in folders]
    if len(runs) == 1:
        html, place = page(runs[0]), folders[0] / "report.html"
    else:
        html, place = comparison(*runs), folders[1].parent / f"{runs[0].name}-vs-{runs[1].name}.html"
    target = Path(given.flags["--out"] or place)
    if not target.absolute().parent.is_dir():
        raise ValueError(f"--out = {target}: expected a file in a folder that exists")
    target.write_text(html, encoding="utf-8")
    print(target)
    return 0
