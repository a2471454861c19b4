"""Write a commented starter run file from a recipe."""

import argparse

from dstune.cli.output import emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", nargs="?", default=".", help="where to (default: here)")
    parser.add_argument("--recipe", default="quickstart", help="which one (default: quickstart)")
    parser.add_argument("--list", action="store_true", help="the recipes, a line each")


def run(args: argparse.Namespace) -> int:
    from dstune import api

    if args.list:
        recipes = api.recipes()
        emit(args, recipes, [f"{name:<24} {text}" for name, text in recipes.items()])
        return 0
    path = api.init(args.directory, args.recipe)
    emit(args, {"run_file": str(path)}, [f"wrote {path}", f"next: dstune train {path}"])
    return 0
