"""`keel VERB ...`: find the verb, run it, turn what a user can cause into one line and an exit code.

Importing this file and the verbs needs nothing but the standard library, so that help works before any set-up.
Exit codes: 0 done, 1 a run that failed, 2 something a user got wrong, 130 and 143 stopped by Ctrl-C or SIGTERM; all
else is the verb's own or a bug's traceback.
"""

import difflib
import errno
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

VERBS = ("train", "resume", "status", "report", "plan", "check", "config", "sample", "import", "export", "test")
FOLDERS = ("configs", "launch", "trainer", "model", "optim", "data", "tests")
COMPLAINT = re.compile(r".+? = .*: expected .+", re.DOTALL)
"""How an error that a user caused reads; another ValueError is a bug of ours and keeps its traceback."""


NO_ACCESS = {
    errno.ENOENT: "exists",
    errno.EACCES: "may be used",
    errno.EPERM: "may be used",
    errno.ENOTDIR: "is below folders only",
    errno.EISDIR: "is a file",
    errno.ENAMETOOLONG: "has a shorter name",
    errno.ELOOP: "is no circle of links",
}
"""What is wrong with a name that a user gave, by the system's number of it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        refuse_foreign_folders()
        return _dispatch(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        print("keel: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`keel config show | head`): nothing is wrong, and nothing can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None or error.errno not in NO_ACCESS:
            raise
        return _complain(f"file = {error.filename}: expected a file or folder that {NO_ACCESS[error.errno]}")
    except ValueError as error:
        if not COMPLAINT.fullmatch(str(error)):
            raise
        return _complain(str(error))


def checkout() -> Path:
    """The folder that holds `launch`, `configs` and the other five."""
    return Path(__file__).resolve().parent.parent


def refuse_foreign_folders() -> None:
    """Raise ValueError if one of our generic folder names is found elsewhere first: a package would hide our code."""
    root = checkout()
    for name in FOLDERS:
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [*(spec.submodule_search_locations or []), spec.origin]
        place = next((place for place in places if place), None)
        if place is not None and not os.path.realpath(place).startswith(f"{root}{os.sep}"):
            raise ValueError(
                f"{name} = {place}: expected the folder {root / name}; another package has its name: "
                "remove that, or start keel as ./keel in its own environment"
            )


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(_help())
        return 0
    verb = words[0]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"VERB = {verb}: expected one of {', '.join(VERBS)}{hint}")
    return importlib.import_module(f"launch.{verb}").main(words[1:])


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {importlib.import_module(f'launch.{verb}').HELP}" for verb in VERBS]
    return "\n".join(
        [
            "keel VERB [--flags] [KEY=VALUE ...]    pre-training in which every number can be checked",
            "",
            *lines,
            "",
            "keel VERB --help explains a verb. Exit codes: 0 done, 1 a run that failed, 2 a mistake in what was asked,",
            "130 and 143 stopped by Ctrl-C or SIGTERM.",
        ]
    )


def _complain(text: str) -> int:
    print(f"keel: error: {' '.join(text.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
