"""Slow, obvious versions of what the package computes fast. Tests compare with these and with nothing else."""

import itertools
import math

import numpy as np
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity

#: Two ways to compute one thing agree to this share of its size. Kernels of a BLAS (Haswell, SkylakeX) and numbers of
#: threads add in other orders, which moves sums of thousands of doubles by 1e-13 and what took single precision on its
#: way by 1e-8; a wrong formula moves more than a millionth.
CLOSE = 1e-6


def assert_close(found, expected, *, scale=None, err_msg=""):
    """Compare at `CLOSE` of the largest expected value, or of `scale`, the size of what cancelled to it."""
    if scale is None:
        scale = np.abs(np.asarray(expected, dtype=np.float64)).max(initial=0.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE * scale, err_msg=err_msg)


def cosine_rank(query, gallery, true_row, tie=1e-10):
    """Return (candidates above, other candidates tied) from one double-precision cosine at a time."""

    def cosine(a, b):
        a, b = (np.asarray(v, dtype=np.float32).astype(np.float64).ravel() for v in (a, b))
        return a @ b / math.sqrt((a @ a) * (b @ b))

    similar = [cosine(query, row) for row in gallery]
    true = similar[true_row]
    above = sum(s > true + tie for s in similar)
    tied = sum(abs(s - true) <= tie for i, s in enumerate(similar) if i != true_row)
    return above, tied


def k_way(n_above, n_tied, size, k):
    """Return the mean over all places of a tied item of C(N - r, k - 1) / C(N - 1, k - 1), in exact integers."""
    places = range(n_above + 1, n_above + n_tied + 2)
    return sum(math.comb(size - r, k - 1) for r in places) / len(places) / math.comb(size - 1, k - 1)


def n_way(scores, n, allowed):
    """Return identification by enumerating every set of n - 1 distractors."""
    values = []
    for j in range(len(scores)):
        sets = list(itertools.combinations([i for i in range(len(scores)) if allowed[j][i]], n - 1))
        values.append(np.mean([all(scores[j, i] < scores[j, j] for i in chosen) for chosen in sets]))
    return np.array(values)


def pearson(a, b):
    """Return the Pearson correlation of two arrays."""
    return np.corrcoef(np.ravel(a).astype(float), np.ravel(b).astype(float))[0, 1]


def ssim(a, b, legacy=False):
    """Return scikit-image's SSIM of one pair of images between 0 and 1."""
    a, b = (rgb2gray(x) if x.shape[-1] == 3 else x[..., 0] for x in (a, b))
    return structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0,
        channel_axis=-1 if legacy else None,
    )  # fmt: skip


def resize_425(images, antialias=True):
    """Return images of shape (n, 425, 425, channels), resized by torchvision to 256 first."""
    import torch
    from torchvision.transforms.functional import resize

    planes = torch.from_numpy(np.asarray(images, dtype=np.float64).transpose(0, 3, 1, 2))
    for size in (256, 425):
        planes = resize(planes, [size, size], antialias=antialias)
    return planes.numpy().transpose(0, 2, 3, 1)


def permutation_p(table, n_permutations, rng):
    """Return the one-sided p-value of the diagonal mean from one shuffle at a time."""
    n = len(table)
    observed = np.mean([table[i, i] for i in range(n)])
    extreme = 0
    for _ in range(n_permutations):
        order = rng.permutation(n)
        extreme += np.mean([table[i, order[i]] for i in range(n)]) >= observed - 1e-12
    return (extreme + 1) / (n_permutations + 1)


def frechet(left, right):
    """Return the Frechet distance between Gaussians fitted to the rows of two embeddings (Heusel et al. 2017, FID)."""
    from scipy.linalg import sqrtm

    x, y = (rows.flat().astype(np.float64) for rows in (left, right))
    c1, c2 = (np.atleast_2d(np.cov(rows.T)) for rows in (x, y))
    root = np.real(sqrtm(c1 @ c2 + 1e-12 * np.eye(len(c1))))
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * np.trace(root))


def _nearest_rotation(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(source.T @ target, full_matrices=False)
    return left @ right


def align_by_hand(brains: dict[str, np.ndarray], n_components: int, n_iterations: int) -> np.ndarray:
    """Generalised Procrustes over principal components, subject after subject, shape (n_images, n_components)."""
    scores = {}
    for name in sorted(brains):
        _, _, axes = np.linalg.svd(brains[name], full_matrices=False)
        scores[name] = brains[name] @ axes[:n_components].T
    aligned: list[np.ndarray] = []
    for name in sorted(scores):
        mean = sum(aligned) / len(aligned) if aligned else scores[name]
        aligned.append(scores[name] @ _nearest_rotation(scores[name], mean) if aligned else scores[name])
    for _ in range(n_iterations):
        mean = sum(aligned) / len(aligned)
        aligned = [scores[name] @ _nearest_rotation(scores[name], mean) for name in sorted(scores)]
    return sum(aligned) / len(aligned)


def share_by_hand(brains: dict[str, np.ndarray], n_components: int, n_iterations: int) -> np.ndarray:
    """Shared response of orthonormal bases, renewed in turn from the start of `align_by_hand`."""
    shared = align_by_hand(brains, n_components, 0)
    for _ in range(n_iterations):
        bases = {name: _nearest_rotation(brains[name], shared) for name in brains}
        shared = sum(brains[name] @ bases[name] for name in brains) / len(brains)
    return shared
