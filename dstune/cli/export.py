"""A Hugging Face directory from a run's checkpoint: safetensors, tokenizer, template, model card. Or plain fp32 weights."""

import argparse

from dstune.cli.output import add_run, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("out", nargs="?", help="a directory that is not there yet (default: the run's export/)")
    parser.add_argument(
        "--step", default="newest", help="a committed step, `best`, `newest` (default), or 0: before training"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: the run's")
    parser.add_argument("--weights", default="fp32", choices=("fp32", "ema"), help="ema: their average (train.ema)")
    parser.add_argument(
        "--merged", action="store_true", help="of a run with an adapter: the whole model, the adapter in it"
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of one safetensors file (default: 5GB)")
    parser.add_argument("--threads", type=int, metavar="N", help="output files written at a time (default: up to 4)")
    parser.add_argument(
        "--to",
        default="huggingface",
        choices=("huggingface", "deepspeed-fp32", "deepspeed-fp32-bin"),
        help="deepspeed-fp32: what DeepSpeed's zero_to_fp32.py gives, as safetensors; -bin: as pytorch_model.bin",
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="then upload it to the hub, privately; the token is HF_TOKEN"
    )
    parser.add_argument("--public", action="store_true", help="make the pushed repository for everybody to read")


def run(args: argparse.Namespace) -> int:
    from dstune import api

    words = ("step", "dtype", "weights", "to", "merged", "max_shard_size", "threads", "push", "public")
    out = api.export(args.run, args.out, **{word: getattr(args, word) for word in words})
    lines = [f"exported: {out}"]
    lines += [f"pushed: {args.push}"] if args.push else []
    lines += [f"next: dstune chat {out}"] if args.to == "huggingface" else []
    emit(args, {"export": str(out), "pushed": args.push}, lines)
    return 0
