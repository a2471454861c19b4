"""A Hugging Face directory from a run's checkpoint: safetensors, tokenizer, template, model card."""

import argparse

from dstune.cli.output import add_run, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("out", nargs="?", help="a directory that is not there yet (default: the run's export/)")
    parser.add_argument(
        "--step", default="newest", help="a committed step, `best`, `newest` (default), or 0: before training"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: the run's")
    parser.add_argument(
        "--merged", action="store_true", help="of a run with an adapter: the whole model, the adapter in it"
    )


def run(args: argparse.Namespace) -> int:
    from dstune import api

    out = api.export(args.run, args.out, step=args.step, dtype=args.dtype, merged=args.merged)
    emit(args, {"export": str(out)}, [f"exported: {out}", f"next: dstune chat {out}"])
    return 0
