"""Let a job fail if a checkpoint strays too far from its source, for text or for any medium.

python examples/compare_checkpoints.py MODEL OUT --data held-out.jsonl --most 0.1

`morphoquant compare` prints and draws the same figures. A and B may also be two checkpoints of one model.
"""

import argparse
import sys
from pathlib import Path

from calibration.compare.run import compare_models
from morphoquant_vllm.errors import MorphoQuantError


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare two forms of a model, and fail if they differ too much.")
    parser.add_argument("first", type=Path, help="the measure: usually the 16-bit source")
    parser.add_argument("second", type=Path, help="the judged form: usually its checkpoint")
    parser.add_argument("--data", type=Path, action="append", required=True, help="other data than for calibration")
    parser.add_argument("--most", type=float, default=0.1, help="largest mean KL divergence, in nats")
    parser.add_argument("--max-samples", type=int, help="samples, evenly spaced (default: all)")
    arguments = parser.parse_args()

    try:
        found = compare_models(arguments.first, arguments.second, arguments.data, max_samples=arguments.max_samples)
    except MorphoQuantError as error:
        sys.exit(f"error: {error}")
    for name, row in found["modalities"].items():
        print(
            f"{name:8} KL {row['divergence']:.4f}  the same token {row['agreement']:.1%}  "
            f"perplexity {row['first_perplexity']:.3f} -> {row['second_perplexity']:.3f}"
        )
    print("largest error of a block:", f"{max(found['blocks']):.4f}")
    far = [name for name, row in found["modalities"].items() if row["divergence"] > arguments.most]
    if far:
        sys.exit(f"error: the KL divergence is above {arguments.most} for {', '.join(far)}")


if __name__ == "__main__":
    main()
