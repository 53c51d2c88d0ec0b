"""Makes the pictures of docs/report.md from a finished run: `.venv/bin/python docs/pictures.py RUN`.

The page is photographed by a headless Chromium, the only thing needed beside Keel (on Debian: `apt install chromium`).
The terminal's picture is the text of `keel status` as it stood three quarters through the run, as SVG.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import timedelta
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch.runs import find_run  # noqa: E402
from trainer.report.page import page  # noqa: E402
from trainer.report.read import Folder, Run  # noqa: E402
from trainer.report.schedule import last_step_at  # noqa: E402
from trainer.report.terminal import view  # noqa: E402

PICTURES = Path(__file__).resolve().parent / "pictures"
SHOTS = (
    ("report", "", 1280, 1640, 1),
    ("report-health", "section:not(#health), h1, .lead, footer { display: none } h2 { margin-top: 0 }", 1280, 1640, 0),
    ("report-phone", "", 500, 1400, 1),
)
"""Name, style that hides what the picture is not about, width and height in pixels, 1 for light and 0 for dark."""
LIMIT_BYTES = 400_000
COLOURS = {"1": "#ffffff", "2": "#7a838d", "31": "#f28b82", "32": "#58c08b", "33": "#e0b04a", "36": "#6fb0ee"}
CELL_X, CELL_Y, MARGIN = 8.0, 19.0, 18.0


def main(argv: list[str]) -> int:
    """Write all pictures of the run named on the command line."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if len(argv) != 1 or browser is None:
        print("usage: docs/pictures.py RUN, with chromium on the path", file=sys.stderr)
        return 2
    run = Folder(find_run(argv[0])).read()
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "status.svg").write_text(as_svg(view(at_three_quarters(run), colours=True)), encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        html, whole = Path(folder) / "report.html", page(run)
        for name, style, width, height, light in SHOTS:
            html.write_text(whole.replace("</style>", f"{style}</style>", 1), encoding="utf-8")
            target = PICTURES / f"{name}.png"
            options = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=1000"]
            options += [f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={light}"]
            options += [f"--user-data-dir={folder}/profile", f"--screenshot={target}"]
            subprocess.run([browser, *options, f"file://{html}"], check=True, capture_output=True)
            print(f"{target.relative_to(ROOT)} {target.stat().st_size} bytes")
            assert target.stat().st_size < LIMIT_BYTES, "a picture of a page is small"
    return 0


def at_three_quarters(run: Run) -> Run:
    """The run as it was a second after a step three quarters through it."""
    rows = run.rows[: 3 * len(run.rows) // 4]
    was = replace(run, rows=rows, state="running", history=run.history[:-1])
    ended = last_step_at(was)
    assert ended is not None
    saved = [one for one in run.checkpoints if one.step <= was.step]
    return replace(was, now=ended.astimezone() + timedelta(seconds=1), checkpoints=saved)


def as_svg(text: str) -> str:
    """Text with colours of a terminal as a picture, every piece at its column."""
    lines = text.split("\n")
    width = max(len(re.sub(r"\033\[\d+m", "", line)) for line in lines) * CELL_X + 2 * MARGIN
    height = len(lines) * CELL_Y + 2 * MARGIN
    parts = []
    for number, line in enumerate(lines):
        column, colour = 0, "#d5dae0"
        for piece in re.split(r"(\033\[\d+m)", line):
            if piece.startswith("\033"):
                colour = COLOURS.get(piece[2:-1], "#d5dae0")
            elif piece:
                x, y = MARGIN + column * CELL_X, MARGIN + (number + 0.72) * CELL_Y
                parts.append(
                    f'<text x="{x:.0f}" y="{y:.1f}" fill="{colour}" textLength="{len(piece) * CELL_X:.0f}" '
                    f'lengthAdjust="spacingAndGlyphs" xml:space="preserve">{escape(piece)}</text>'
                )
                column += len(piece)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, \'DejaVu Sans Mono\', monospace" font-size="13">'
        f'<rect width="100%" height="100%" rx="8" fill="#14171b"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
