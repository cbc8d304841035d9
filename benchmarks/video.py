"""Grouping a clip's features as VQToken does, beside scikit-learn and faiss, from the same centroids for the same rounds.

32 frames of 729 unit vectors of width 896 into 32 clusters. Every library gets the same initial centroids and a fixed number
of rounds; the share of ids that agree with ours is reported with the times, which are the best of several runs that take turns.

    python benchmarks/video.py [--out video.json] [--rounds 20] [--repeats 3]
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from tokenzoo.kernels import kmeans

FRAMES, PATCHES, DIM, CLUSTERS = 32, 729, 896, 32


def features(seed: int = 0) -> torch.Tensor:
    """Unit vectors `[N, D]` around 64 directions, so loosely that no library is done before the last round."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(64, DIM, generator=generator)
    chosen = torch.randint(64, (FRAMES * PATCHES,), generator=generator)
    return F.normalize(0.1 * directions[chosen] + torch.randn(FRAMES * PATCHES, DIM, generator=generator), dim=-1)


def ours(rows: torch.Tensor, initial: torch.Tensor, rounds: int, *, spherical: bool = True) -> np.ndarray:
    """Ids by `tokenzoo.kernels.kmeans`."""
    found = kmeans(rows, CLUSTERS, iterations=rounds, spherical=spherical, initial=initial, keep_empty=True)
    return found.ids.numpy()


def scikit_learn(rows: torch.Tensor, initial: torch.Tensor, rounds: int) -> np.ndarray:
    """Ids by `sklearn.cluster.KMeans` (Lloyd), which knows Euclidean distances only."""
    from sklearn.cluster import KMeans

    model = KMeans(CLUSTERS, init=initial.numpy(), n_init=1, max_iter=rounds, tol=0, algorithm="lloyd", copy_x=False)
    model.fit(rows.numpy())
    if model.n_iter_ != rounds:
        raise SystemExit(f"scikit-learn stopped after {model.n_iter_} of {rounds} rounds: the times cannot be compared")
    return model.labels_


def faiss(rows: torch.Tensor, initial: torch.Tensor, rounds: int) -> np.ndarray:
    """Ids by `faiss.Kmeans`, spherical, without its subsampling of the vectors."""
    import faiss

    model = faiss.Kmeans(DIM, CLUSTERS, niter=rounds, spherical=True, max_points_per_centroid=len(rows))
    model.train(rows.numpy(), init_centroids=initial.numpy())
    return model.index.search(rows.numpy(), 1)[1][:, 0]


def main() -> None:
    """Runs them in turns and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rows = features()
    initial = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:CLUSTERS]].contiguous()
    methods: dict[str, Callable[..., np.ndarray]] = {
        "tokenzoo, spherical": ours,
        "faiss, spherical": faiss,
        "tokenzoo, euclidean": functools.partial(ours, spherical=False),
        "scikit-learn, euclidean": scikit_learn,
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    ids = {}
    for _ in range(options.repeats):
        for name, method in methods.items():
            start = time.perf_counter()
            ids[name] = method(rows, initial, options.rounds)
            seconds[name].append(time.perf_counter() - start)
    report = {
        "vectors": [len(rows), DIM],
        "clusters": CLUSTERS,
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "methods": {
            name: {
                "seconds": round(min(times), 4),
                "same_ids": float((ids[name] == ids[f"tokenzoo, {name.split()[-1]}"]).mean()),
            }
            for name, times in seconds.items()
        },
    }
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
