"""Images per second of the two loaders, DALI and torch, in training (crop, flip, color) and in inference.

python benchmarks/loaders.py --annotations JSON --images DIR
"""

from __future__ import annotations

import argparse

from harness import again, arguments, compare, serve


def variant(args: argparse.Namespace) -> None:
    import torch

    from odtk.config import LoaderConfig
    from odtk.data.dataset import Dataset
    from odtk.data.loader import create_loader

    torch.set_num_threads(1)  # the loaders' own threads do the work
    kind, mode = args.variant.split("-")
    config = LoaderConfig(
        images=args.images,
        annotations=args.annotations,
        batch=args.batch,
        training=mode == "training",
        resize=args.resize,
        max_size=args.max_size,
        jitter=(args.resize, args.resize),
        loader=kind,
    )
    loader = create_loader(Dataset.load(args.annotations, args.images, training=True), config)
    batches = iter(loader)

    def step() -> int:
        nonlocal batches
        images = 0
        for _ in range(10):
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches)
            images += len(batch.images)
        return images

    serve(step)


def main() -> None:
    args = arguments(__doc__, rounds=5, batch=8).parse_args()
    if args.variant:
        return variant(args)
    for mode in ("training", "inference"):
        compare(
            f"loading for {mode}, {args.resize}×{args.max_size}, batch {args.batch}",
            {kind: again(f"{kind}-{mode}") for kind in ("torch", "dali")},
            rounds=args.rounds,
            report=args.report,
        )


if __name__ == "__main__":
    main()
