"""What both scripts share: options, errors of one line, results that are whole or absent."""
import argparse
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

from data import make_toy
from data.images import real
from patchae import METHODS, UserError

ATTEMPTS = 1000    # our choice: of two processes, one wins long before
MOST_BATCH = 1024  # our choice: more images at once than any machine can use
RESULTS = re.compile(  # what a results folder holds
    r"(checkpoint|train|defects|scores|result|overview|nearest)\.(pt|csv|png)|heatmaps"
    rf"|({'|'.join(METHODS)}|predictions)(-.*)?")
SIGNS = {"checkpoint.pt", "train.csv", "scores.csv", "result.csv"}  # one of them is in each
SYSTEM_FILES = re.compile(  # what systems and programs put into any folder
    r"\.DS_Store|\._.*|\.directory|Thumbs\.db|desktop\.ini|@eaDir|~\$.*|\.~lock.*"
    r"|\.part-.*|\.before-.*", re.IGNORECASE)
OUT_OF_MEMORY = re.compile("out of memory|not enough memory|allocate memory")  # as torch says it


@contextmanager
def whole(path):
    """Yield a temporary path; in the end the file or folder made there takes the place of `path`.

    After an error or Ctrl-C all that was at `path` is there as before. If the process is killed
    between two renamings, an old folder is left beside it, as .before-NAME-….
    UserError where something cannot be written.
    """
    mark = f".part-{platform.node()}@"  # no host name has an @
    target = real(path)  # a link to a folder elsewhere stays one
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target, mark)
        with tempfile.TemporaryDirectory(prefix=f"{mark}{os.getpid()}-", dir=target.parent,
                                         ignore_cleanup_errors=True) as folder:
            unfinished = Path(folder, target.name)
            yield unfinished
            replace(target, unfinished)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


def check_writable(out):
    """Make the folder of --out. UserError now, not after hours, where nothing can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error}); choose another") from error


def check_replaceable(folder, out):
    """UserError if a folder that would be replaced holds anything else than results at its top.

    OSError if it is no folder.
    """
    names = {path.name for path in (folder.iterdir() if folder.exists() else ())
             if not SYSTEM_FILES.fullmatch(path.name)}
    foreign = sorted(name for name in names if not RESULTS.fullmatch(name) or not names & SIGNS)
    if foreign:
        raise UserError(f"--out {out}: {folder} holds other files than results ({foreign[0]}) and "
                        "would be replaced; move them, or choose another --out")


def replace(path, new):
    """Rename what is at `path` aside and `new` to `path`; then remove the old, or put it back."""
    if path.is_dir() and not new.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    for attempt in range(ATTEMPTS):  # again if another process puts its own result there meanwhile
        aside = path.with_name(f".before-{path.name}-{os.getpid()}-{attempt}")
        try:
            if path.is_dir():  # a file is replaced in one step
                with suppress(FileNotFoundError):
                    path.rename(aside)
            new.replace(path)
            shutil.rmtree(aside, ignore_errors=True)
            return
        except BaseException as error:  # Ctrl-C, too
            if aside.exists() and not path.exists():
                aside.rename(path)
                raise
            if (not isinstance(error, OSError) or not path.is_dir() or not new.exists()
                    or attempt == ATTEMPTS - 1):
                raise


def remove_leftovers(path, mark):
    """Remove what killed processes of this machine left beside `path`."""
    for part in path.parent.glob(f"{mark}*"):
        try:
            if os.name == "posix":  # on Windows this would end the process in place of asking
                os.kill(int(part.name.removeprefix(mark).split("-")[0]), 0)
        except ProcessLookupError:
            shutil.rmtree(part, ignore_errors=True)
        except (OSError, ValueError, OverflowError):
            pass  # a process of another user, or a name that is not ours
    old = re.compile(rf"\.before-{re.escape(path.name)}-\d+-\d+")
    for aside in path.parent.iterdir() if path.exists() else ():
        if old.fullmatch(aside.name):
            shutil.rmtree(aside, ignore_errors=True)


class Parser(argparse.ArgumentParser):
    """argparse, but a command line that it cannot read is a UserError, as all bad input is."""

    def error(self, message):
        """Raise a UserError in place of printing the usage."""
        raise UserError(f"{message}; --help lists the options")


def folder_name(text):
    """The type of an option: a folder's name, without the slash that completion puts behind it."""
    return text.rstrip("/\\")


def make_parser(description):
    """The parser of a script, and its group "data and results" that both scripts have."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("data and results")
    add = group.add_argument
    add("--data", type=Path, metavar="ROOT", help="data set: a folder with NAME/train/good")
    add("--category", type=folder_name, nargs="+", default=[], metavar="NAME",
        help="its categories, or: all")
    add("--demo", action="store_true",
        help="use the toy set, which is drawn if it is not there, and the settings of the demo")
    add("--out", type=Path, default=Path("runs"), help="results go to OUT/NAME (default: runs)")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"),
        help="auto takes cuda if there is one, else the CPU (default: auto)")
    add("--batch-size", type=int, metavar="N",
        help="images scored at once; decides speed and memory only (default: 1 on a CPU, else 8)")
    return parser, group


def parse_args(parser, argv):
    """Parse the command line. --demo fills in the toy set; UserError for what cannot be read."""
    args = parser.parse_args(argv)
    if args.demo:
        args.data = args.data or make_toy.ROOT
        args.category = args.category or sorted(make_toy.CATEGORIES)
    if args.batch_size is not None and not 1 <= args.batch_size <= MOST_BATCH:
        raise UserError(f"--batch-size {args.batch_size}: must be from 1 to {MOST_BATCH}")
    return args


def exit_code(work, *arguments):
    """What work(*arguments) returns, or 0. After bad input or a full disk one line on stderr, 2."""
    try:
        return work(*arguments) or 0
    except (UserError, OSError) as error:  # an OSError names its file itself
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        name = f"{arguments[0]}: " if arguments else ""
        message = (f"{name}out of memory ({error!r:.99}); use --memory-fraction 0.1 in train.py, "
                   "--batch-size 1, or a smaller --image-size")
    print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


def run(main):
    """End the process with the exit code of main; 130 after Ctrl-C. Any console shows any name.

    Each line is there at once, also in a file or a pipe.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not, and shows any name
            stream.reconfigure(errors="replace", line_buffering=True)  # a log file grows, too
    warnings.filterwarnings("ignore", module="PIL")  # of odd EXIF data and of many pixels
    try:
        sys.exit(exit_code(main))
    except KeyboardInterrupt:
        print("\ninterrupted; no file is half-written", file=sys.stderr)
        sys.exit(130)
