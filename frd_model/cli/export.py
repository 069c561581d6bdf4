"""`frd export`: a checkpoint as a file for ONNX, OpenVINO or torch."""

from __future__ import annotations

import argparse

from .arguments import UsageError, add_model_arguments, at_least, fraction, path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a file that `frd predict --checkpoint` takes, or `demo`"
    )
    parser.add_argument(
        "--out",
        type=path,
        required=True,
        metavar="FILE",
        help="the file to write: .onnx, .xml (OpenVINO) or .pt2",
    )
    parser.add_argument(
        "--to",
        choices=("onnx", "openvino", "torch-export", "aoti"),
        help="the format (default: what the ending of FILE says; for .pt2 torch-export or aoti must be given)",
    )
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
    parser.add_argument(
        "--int8",
        nargs="+",
        type=path,
        metavar="PHOTO",
        help="8-bit convolutions and matrix products for CPUs, calibrated on these photos or folders of photos",
    )
    parser.add_argument(
        "--max-error",
        type=fraction,
        metavar="E",
        help="--int8: the largest change of a photo's score or mean probability (default 0.05)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")


def run(args: argparse.Namespace) -> int:
    """Export, run and compare; status 1 if anything of it fails, and then nothing is written."""
    from frd_model.data.files import scan_images
    from frd_model.export import check_calibration, check_packages, check_writable, export_model, format_of
    from frd_model.exported import check_package, files_of
    from frd_model.quantize import MAX_ERROR
    from frd_model.weights import load_model, stored_metadata

    if args.max_error is not None and args.int8 is None:
        raise UsageError("--max-error goes with --int8, got none")
    there = [file for file in files_of(args.out) if file.exists()]
    if there and not args.overwrite:
        raise FileExistsError(f"{there[0]} exists; replace it with --overwrite, or choose another --out")
    to = format_of(args.out, args.to)
    check_packages(to)
    if to == "onnx":
        check_package("onnxruntime", "export", "export to onnx")
    photos = None if args.int8 is None else scan_images(args.int8, recursive=True).images
    if photos is not None:
        check_calibration(to, photos, not args.fixed)
    check_writable(args.out)
    model = load_model(args.checkpoint, model=args.model, preset=args.preset)
    done = export_model(
        model,
        args.out,
        to,
        dynamic=not args.fixed,
        size=args.size,
        opset=args.opset,
        metadata=stored_metadata(args.checkpoint),
        calibration=photos,
        max_error=MAX_ERROR if args.max_error is None else args.max_error,
    )
    sizes = "any batch and sides" if not args.fixed else f"1x3x{args.size}x{args.size}"
    size = sum(file.stat().st_size for file in files_of(done.path)) / 1e6
    print(f"{done.path}: {size:.1f} MB, {sizes}")
    for shape, deviation in done.checks.items():
        print(f"run at {'x'.join(map(str, shape))}: PyTorch's logits up to {deviation:.1e} of the largest")
    if done.int8 is not None:
        print(
            f"8 bits on {done.int8.photos} other photos change the mean probability of a photo by up to "
            f"{done.int8.map:.4f}, its score by up to {done.int8.score:.4f}, the marked pixels by up to "
            f"{100 * done.int8.marked:.2f} %"
        )
    return 0
