"""The `dstune` command: finds the subcommand, and turns every outcome into its exit status."""

import argparse
import difflib
import importlib
import json
import sys
from collections.abc import Sequence
from types import ModuleType

from dstune import __version__, loggers
from dstune.cli.output import printable
from dstune.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, DstuneError

COMMANDS = {
    "init": "write a commented starter run file from a recipe",
    "prepare": "raw instruction files -> packed Arrow shards",
    "select": "choose training data by budget, and say why",
    "preview": "look at conversations with the trained tokens coloured",
    "plan": "what a run would do here: steps, batches, DeepSpeed config",
    "train": "prepare if needed, plan, train",
    "submit": "the same run as a Ray job or a Slurm batch",
    "status": "where a run stands, wherever it was submitted",
    "logs": "what its driver and workers said",
    "stop": "stop at the end of the step, with a checkpoint",
    "resume": "go on from the newest committed step, on any number of workers",
    "checkpoint": "list, verify and prune what is committed; import DeepSpeed's own",
    "export": "a Hugging Face directory from a checkpoint",
    "evaluate": "generate and score: exact match, F1, BLEU, ROUGE and others",
    "chat": "talk to a model",
    "worker": "what Ray, torchrun or srun start on each rank",
    "schema": "JSON Schema of the run file, for editors",
}
"""Every command a person types, with its line of help; the module of the same name in this package runs it."""

_HIDDEN = ("drive",)

_EPILOG = """\
exit status: 0 done, 1 failed, 2 wrong command or run file, 3 data refused, 4 does not fit, 75 stopped and resumable,
             130 Ctrl-C before there was anything to save
start with:  dstune init my-run && dstune train my-run/run.yaml"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else EXIT_USAGE
    if words[0] == "--version":
        print(f"dstune {__version__}")
        return 0
    name = words[0]
    if name not in COMMANDS and name not in _HIDDEN:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; see dstune --help"
        print(f"dstune: no command {name!r}{hint}", file=sys.stderr)
        return EXIT_USAGE
    return _run(name, importlib.import_module(f"dstune.cli.{name}"), words[1:])


def _overview() -> str:
    lines = "\n".join(f"  {name:<11} {text}" for name, text in COMMANDS.items())
    return (
        "usage: dstune COMMAND [--json] ...\n\n"
        "Instruction-tune language models with DeepSpeed ZeRO-3 on Ray, and resume exactly whatever happened.\n\n"
        f"{lines}\n\n`dstune COMMAND --help` says more.\n\n{_EPILOG}"
    )


def _run(name: str, command: ModuleType, words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"dstune {name}", description=command.__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout; logs stay on stderr")
    parser.add_argument("--verbose", action="store_true", help="more lines on stderr")
    command.add_arguments(parser)
    _refuse_unknown_options(parser, words)
    args = parser.parse_intermixed_args(words)
    loggers.configure(verbose=args.verbose)
    try:
        return command.run(args)
    except DstuneError as error:
        return _say(args, str(error), error.exit_status)
    except KeyboardInterrupt:
        return _say(args, "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_FAILED
    except OSError as error:
        if args.verbose:
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _say(args, f"{place}{error.strerror or error}", EXIT_FAILED)


def _refuse_unknown_options(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Ends with status 2 at an option that the command does not have: before argparse, which would first miss what was meant by it."""
    known = [name for action in parser._actions for name in action.option_strings]
    for word in words:
        name = word.partition("=")[0]
        # With a blank in it, it is some option's value.
        if not name.startswith("--") or " " in word or name in ("--", *known):
            continue
        near = difflib.get_close_matches(name, known, n=1)
        if near and "." not in name:
            parser.error(f"no option {name!r}; did you mean {near[0]!r}?")
        setting = "train.lr=1e-5" if "." in name else _setting(parser, name)
        parser.error(f"no option {name!r}; {f'settings have no dashes: {setting}' if setting else 'see --help'}")


def _setting(parser: argparse.ArgumentParser, option: str) -> str | None:
    """How the command is told what somebody put into an option that it lacks; None where it takes no settings, or none is called so."""
    if not any(action.dest == "overrides" for action in parser._actions):
        return None
    from dstune.config import names, schema

    key = option.removeprefix("--").replace("-", "_")
    alone = key in names.fields_at(schema.RunConfig, ()) and not names.fields_at(schema.RunConfig, (key,))
    found = [key] if alone else names.in_sections(schema.RunConfig, key)
    return " or ".join(f"{each}=…" for each in found) or None


def _say(args: argparse.Namespace, message: str, status: int) -> int:
    print(f"dstune: {printable(message)}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": message, "exit_status": status}, ensure_ascii=False))
    return status


if __name__ == "__main__":
    sys.exit(main())
