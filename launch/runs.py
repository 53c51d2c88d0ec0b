"""Finding a run: its folder, or its name under `runs/`; and the folder of a crash."""

import difflib
from pathlib import Path

CONFIG_FILE = "config.yaml"


def find_run(word: str, runs_dir: Path = Path("runs")) -> Path:
    """Folder of a run named by its path or by its name under `runs_dir`; raises ValueError naming the nearest."""
    for folder in (Path(word), runs_dir / word):
        if word and (folder / CONFIG_FILE).is_file():
            return folder
    names = sorted(path.parent.name for path in runs_dir.glob(f"[!.]*/{CONFIG_FILE}"))
    close = difflib.get_close_matches(word, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    there = f"{runs_dir}/ has {', '.join(names)}" if names else f"{runs_dir}/ has none yet"
    raise ValueError(f"RUN = {word}: expected the folder of a run or its name ({there}){hint}")


def find_crash(word: str) -> Path:
    """A crash folder; raises ValueError where there is none."""
    folder = Path(word)
    if not word or not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"--replay = {word}: expected a crash folder, such as RUN/crashes/step-000123")
    return folder
