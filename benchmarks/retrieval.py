"""Time of exact ranks and all k-way accuracies beside the time of the matrix product alone.

    python benchmarks/retrieval.py                                        # reduced, about a minute
    python benchmarks/retrieval.py --queries 16000 --gallery 16540        # full size

The product alone is measured in the same run, on the same blocks, into memory that is used again, which is the
fastest product this machine can do. Repetitions alternate and the best of each is compared.
"""

import argparse
import resource
import time

import numpy as np
import torch

from braindecode_vis.arrays import Embeddings, find_largest
from braindecode_vis.retrieval import BLOCK_GALLERY, BLOCK_QUERIES, compute_k_way_curve, compute_ranks


def _multiply(queries, gallery, buffer):
    for g in range(0, len(gallery), BLOCK_GALLERY):
        for q in range(0, len(queries), BLOCK_QUERIES):
            left, right = queries[q : q + BLOCK_QUERIES], gallery[g : g + BLOCK_GALLERY]
            shape = (len(left), len(right))
            torch.mm(left, right.T, out=buffer[: shape[0] * shape[1]].view(shape))


def _rank(queries, gallery, n_top):
    return compute_k_way_curve(compute_ranks(queries, gallery, n_top=n_top, device="cpu"))


def _pick(queries, gallery, n_top):
    """Return the most similar candidates alone, as `Decoder.retrieve` does, by blocks of queries."""
    return np.concatenate(
        [
            find_largest((queries[q : q + BLOCK_QUERIES] @ gallery.T).numpy(), n_top)
            for q in range(0, len(queries), BLOCK_QUERIES)
        ]
    )


def _compare_faiss(queries, gallery, n_top, repeats):
    """Print the time of the most similar candidates beside faiss's exact search, if it is installed."""
    try:
        import faiss
    except ImportError:
        print("faiss is not installed (pip install faiss-cpu), so its exact search was not timed")
        return
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(gallery.numpy())
    same = float((index.search(queries.numpy(), n_top)[1] == _pick(queries, gallery, n_top)).mean())
    times = np.array(
        [
            [_seconds(_pick, queries, gallery, n_top), _seconds(index.search, queries.numpy(), n_top)]
            for _ in range(repeats)
        ]
    )
    ratio = times[:, 0] / times[:, 1]
    print(
        f"top {n_top} alone {times[:, 0].min():.3f} s, faiss flat {times[:, 1].min():.3f} s, "
        f"median ratio {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f}), same items {same:.5f}"
    )


def _seconds(function, *args):
    start = time.process_time()
    function(*args)
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--gallery", type=int, default=16540)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--signal", type=float, default=0.05, help="share of the true item in a query")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    items = rng.standard_normal((args.gallery, args.features), dtype=np.float32)
    target = rng.integers(0, args.gallery, args.queries)
    noise = rng.standard_normal((args.queries, args.features), dtype=np.float32)
    ids = np.array([f"s{i:06d}" for i in range(args.gallery)], dtype=object)
    queries = Embeddings(np.float32(args.signal) * items[target] + noise, ids[target], "random")
    gallery = Embeddings(items, ids, "random")
    left, right = torch.from_numpy(queries.vectors), torch.from_numpy(items)
    buffer = torch.empty(BLOCK_QUERIES * BLOCK_GALLERY)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    product, ranks, listed = np.array(
        [
            [
                _seconds(_multiply, left, right, buffer),
                _seconds(_rank, queries, gallery, 0),
                _seconds(_rank, queries, gallery, 10),
            ]
            for _ in range(args.repeats)
        ]
    ).min(axis=0)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = f"{args.queries} queries x {args.gallery} candidates x {args.features} features, {args.threads} thread(s)"
    print(size)
    print(f"matrix product alone          {product:8.3f} s")
    print(f"ranks + every k-way           {ranks:8.3f} s   ratio {ranks / product:.2f}")
    print(f"ranks + every k-way + top 10  {listed:8.3f} s   ratio {listed / product:.2f}")
    _compare_faiss(left, right, 10, args.repeats)
    print(f"memory beyond the inputs      {(after - before) / 1024:8.0f} MB")


if __name__ == "__main__":
    main()
