"""`frd export`: a checkpoint as an ONNX file."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import add_model_arguments, at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a file that `frd predict --checkpoint` takes, or `demo`"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.onnx", help="the file to write")
    add_model_arguments(parser)
    parser.add_argument(
        "--size",
        type=at_least(1),
        default=512,
        metavar="N",
        help="side of the image that is checked (default 512)",
    )
    parser.add_argument(
        "--fixed", action="store_true", help="batch 1 and N x N only, instead of any batch and sides"
    )
    parser.add_argument(
        "--opset", type=at_least(1), metavar="N", help="ONNX operator version (default: torch's)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def run(args: argparse.Namespace) -> int:
    """Export, run and compare; status 1 if anything of it fails, and then nothing is written."""
    if args.out.exists() and not args.overwrite:
        raise FileExistsError(f"{args.out} exists; replace it with --overwrite, or choose another --out")
    from frd_model.export import check_packages, check_writable, export_onnx
    from frd_model.weights import load_model, stored_metadata

    check_packages("onnx", "onnxscript", "onnxruntime")
    check_writable(args.out)
    model = load_model(args.checkpoint, model=args.model, preset=args.preset)
    metadata = stored_metadata(args.checkpoint)
    done = export_onnx(
        model, args.out, dynamic=not args.fixed, size=args.size, opset=args.opset, metadata=metadata
    )
    sizes = "any batch and sides" if not args.fixed else f"1x3x{args.size}x{args.size}"
    print(f"{done.path}: {done.path.stat().st_size / 1e6:.1f} MB, {sizes}")
    for shape, deviation in done.checks.items():
        print(
            f"onnxruntime at {'x'.join(map(str, shape))}: PyTorch's logits up to {deviation:.1e} of the largest"
        )
    return 0
