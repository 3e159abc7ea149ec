"""`strongroom quantize`: quantize and seal in one go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.commands import seal
from server.sealed.quantize import METHODS, quantize_source

if TYPE_CHECKING:
    import argparse

HELP: str = "quantize a model folder and seal the result, with no quantized plaintext left behind"
EPILOG: str = (
    "example: strongroom quantize ./Qwen3-Coder ./models/coder-w4 --method w4a16 --model-id coder "
    "--kms file:/etc/strongroom/kms.key --sign /etc/strongroom/sign.pem"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `quantize`: those of `seal`, and the method."""
    seal.configure(parser)
    parser.add_argument("--method", choices=METHODS, required=True, help="rounds to nearest, without calibration")


def run(args: argparse.Namespace) -> int:
    """Quantize, seal and print what was made."""
    args.lineage = [*args.lineage, f"quantized={args.method}"]
    return seal.seal_folder(args, lambda source: quantize_source(source, args.method))
