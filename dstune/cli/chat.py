"""Talk to a model in the terminal."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="an exported directory or a hub id")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument(
        "--template", default="auto", help="chat template for a model without one (chatml, a .jinja file)"
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:1, …")


def run(args: argparse.Namespace) -> int:
    from dstune import api

    return api.chat(
        args.model,
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        template=args.template,
        dtype=args.dtype,
        device=args.device,
        as_json=args.json,
    )
