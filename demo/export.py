"""Write a checkpoint's weights in half precision, without momentum copies and queues.

    python -m demo.export --checkpoint output/pretrain/model.pth --output configs/miniature/model.safetensors
"""

import argparse
import sys
from pathlib import Path

from safetensors.torch import save_file

from models.pretrained import read_source

LEFT_OUT = ("_m.", "queue", "decoder.cls.predictions.decoder.")  # twins and queues start anew, the LM head is tied


def main() -> int:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    state = {key: value for key, value in read_source(args.checkpoint).items() if not any(x in key for x in LEFT_OUT)}
    save_file({key: value.half().contiguous().clone() for key, value in state.items()}, args.output)
    print(f"wrote {args.output}: {Path(args.output).stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
