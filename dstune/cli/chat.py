"""Talk to a model in the terminal."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="an exported directory or a hub id")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")


def run(args: argparse.Namespace) -> int:
    from dstune import api

    return api.chat(
        args.model,
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        as_json=args.json,
    )
