"""What is compared with peers: the same task on the same input, once as this package does it and once as others do.

A row is a function that makes the input and returns a `Work`, and its line in `ROWS` at the end. Peers are imported
when their turn comes, so that a table can be made without them. Where nobody publishes a package for a step, the peer
is the recipe that published scripts share, written out here.
"""

# ruff: noqa: C408  # sizes read better as keywords

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from measuring import Row, Work, compare_arrays

LEAVE_ONE_OUT = "scikit-learn RidgeCV (leave-one-out)"
AS_ONE_OUT = (
    "chooses the penalty by leaving out single trials, which takes one decomposition and lets trials of one picture "
    "stand on both sides. Ours leaves out folds, as a nested choice does; the peer with the same folds is himalaya."
)
SINGLE = "scikit-learn Ridge in single precision"
#: Penalties by their number: one, those of the shipped configurations, and those of `RidgeConfig`.
ALPHAS = {
    1: (1000.0,),
    5: (1e2, 1e3, 1e4, 1e5, 1e6),
    11: tuple(float(10**e) for e in np.linspace(1, 6, 11)),
}

# --- ridge ------------------------------------------------------------------------------------------------


def make_ridge(folder: Path, trials: int, features: int, targets: int, penalties: int) -> Work:
    """Fit and predict 64 new trials of single precision, from z-scores on; peers solve in double if not said."""
    from sklearn.preprocessing import StandardScaler

    from braindecode_vis.base.arrays import Embeddings, Responses
    from braindecode_vis.base.seeds import make_generator
    from braindecode_vis.encoders.ridge import RidgeConfig
    from braindecode_vis.preprocessing.splits import make_inner_folds

    rng = np.random.default_rng(0)
    data = rng.standard_normal((trials + 64, features), dtype=np.float32)
    weights = rng.standard_normal((features, targets), dtype=np.float32) / np.sqrt(features)
    values = data @ weights + rng.standard_normal((trials + 64, targets), dtype=np.float32)
    data, new, values = data[:trials], data[trials:], values[:trials]
    ids = np.arange(trials).astype(str).astype(object)

    def wrap(rows: np.ndarray, names: np.ndarray) -> Responses:
        columns = {"subject": "1", "session": "1", "run": "1", "repetition": 0, "split": "train"}
        table = pd.DataFrame({"stimulus_id": names, **columns})
        return Responses.from_checked(rows, ("trial", "voxel"), table, "au", {})

    responses, asked = wrap(data, ids), wrap(new, np.array([f"new{n}" for n in range(64)], object))
    alphas, nested = ALPHAS[penalties], penalties > 1
    folds = make_inner_folds(ids, n_folds=5, generator=make_generator(0, "ridge", "inner_folds"))

    def ours() -> tuple[float, np.ndarray]:
        encoder = RidgeConfig(alphas=alphas).build(seed=0)
        encoder.fit(responses, Embeddings(values, ids, "toy"))
        return encoder.fitted.alpha, encoder.predict(asked).vectors

    def fit(model: Any, precision: str = "float64") -> tuple[float, np.ndarray]:
        mean = values.mean(0)
        scaler = StandardScaler().fit(data)
        model.fit(
            scaler.transform(data).astype(precision, copy=False),
            (values - mean).astype(precision, copy=False),
        )
        chosen = getattr(model, "best_alphas_", getattr(model, "alpha_", alphas[0]))
        asked = scaler.transform(new).astype(precision, copy=False)
        return float(np.ravel(chosen)[0]), model.predict(asked) + mean

    def himalaya() -> Any:
        from himalaya.kernel_ridge import KernelRidge, KernelRidgeCV
        from himalaya.ridge import Ridge, RidgeCV

        dual = trials <= features
        if not nested:
            return partial(fit, KernelRidge(alpha=alphas[0]) if dual else Ridge(alpha=alphas[0]))
        # One penalty for all targets and the very folds of ours.
        settings = {"alphas": alphas, "cv": [(fold.train, fold.test) for fold in folds]}
        kind = KernelRidgeCV if dual else RidgeCV
        return partial(fit, kind(solver_params={"local_alpha": False}, **settings))

    def sklearn() -> Any:
        from sklearn.linear_model import Ridge, RidgeCV

        return partial(fit, RidgeCV(alphas=alphas) if nested else Ridge(alpha=alphas[0], solver="cholesky"))

    def single() -> Any:
        from sklearn.linear_model import Ridge

        return partial(fit, Ridge(alpha=alphas[0]), "float32")

    if nested:
        return Work(ours, {"himalaya": himalaya, LEAVE_ONE_OUT: sklearn}, _compare_fits)
    peers = {"himalaya": himalaya, "scikit-learn Ridge (Cholesky)": sklearn, SINGLE: single}
    return Work(ours, peers, _compare_fits)


def _compare_fits(ours: tuple[float, np.ndarray], theirs: tuple[float, np.ndarray]) -> float | str:
    if not np.isclose(ours[0], theirs[0]):
        return f"penalty {ours[0]:.3g}, not {theirs[0]:.3g}"
    return compare_arrays(np.ravel(ours[1]), np.ravel(theirs[1]))


# --- retrieval --------------------------------------------------------------------------------------------


def _make_vectors(queries: int, gallery: int, features: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return query and gallery vectors, and the gallery row of each query."""
    rng = np.random.default_rng(0)
    items = rng.standard_normal((gallery, features), dtype=np.float32)
    target = rng.integers(0, gallery, queries)
    asked = 0.05 * items[target] + rng.standard_normal((queries, features), dtype=np.float32)
    return asked.astype(np.float32), items, target


def make_ranks(folder: Path, queries: int, gallery: int, features: int) -> Work:
    """Rank the true item of every query among the whole gallery."""
    from braindecode_vis.base.arrays import Embeddings
    from braindecode_vis.scoring.retrieval import compute_ranks

    asked, items, target = _make_vectors(queries, gallery, features)
    ids = np.array([f"s{i:06d}" for i in range(gallery)], dtype=object)
    left, right = Embeddings(asked, ids[target], "toy"), Embeddings(items, ids, "toy")

    def sort() -> np.ndarray:
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (asked, items))
        order = np.argsort(-(a @ b.T), axis=1)
        return np.argmax(order == target[:, None], axis=1) + 1

    return Work(
        lambda: compute_ranks(left, right, device="cpu").ranks,
        {"matrix product and argsort": lambda: sort},
        lambda a, b: float(np.mean(a != b)),
    )


def make_top(folder: Path, queries: int, gallery: int, features: int) -> Work:
    """Find the ten most similar items of every query, exactly, as `Decoder.retrieve` does."""
    from braindecode_vis.base.arrays import find_largest
    from braindecode_vis.scoring.retrieval import BLOCK_QUERIES

    asked, items, _ = _make_vectors(queries, gallery, features)
    blocks = [slice(start, start + BLOCK_QUERIES) for start in range(0, queries, BLOCK_QUERIES)]

    def faiss_flat() -> Any:
        import faiss

        faiss.omp_set_num_threads(1)
        index = faiss.IndexFlatIP(features)
        index.add(items)
        return lambda: index.search(asked, 10)[1]

    return Work(
        lambda: np.concatenate([find_largest(asked[block] @ items.T, 10) for block in blocks]),
        {"faiss flat": faiss_flat},
        lambda a, b: float(np.mean(a != b)),
    )


# --- pictures ---------------------------------------------------------------------------------------------


def make_pixel_metrics(folder: Path, pairs: int, side: int, names: tuple[str, ...]) -> Work:
    """Compare colour pictures at 425 pixels (resized to 256 first), from uint8 to one value per pair and metric."""
    import torch
    from scipy.ndimage import gaussian_filter
    from torchvision.transforms.functional import resize

    from braindecode_vis.scoring.metrics.image import GREY_WEIGHTS, compute_image_metrics

    rng = np.random.default_rng(0)
    truth, decoded = rng.integers(0, 256, (2, pairs, side, side, 3), dtype=np.uint8)
    truth = gaussian_filter(truth, (0, 4, 4, 0))  # with edges and surfaces, as pictures have them
    decoded = (0.7 * truth + 0.3 * decoded).astype(np.uint8)

    def enlarge(images: np.ndarray) -> Any:
        planes = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 255
        for size in (256, 425):
            planes = resize(planes, [size, size], antialias=True)
        return planes

    def ours() -> np.ndarray:
        return np.stack(list(compute_image_metrics(names, truth, decoded, protocol="425").values()))

    def torchmetrics() -> Any:
        from torchmetrics.functional import pearson_corrcoef
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim

        weights = torch.tensor(GREY_WEIGHTS).view(1, 3, 1, 1)

        def compare() -> np.ndarray:
            a, b, found = enlarge(truth), enlarge(decoded), []
            for name in names:
                if name == "pixcorr":
                    found.append(pearson_corrcoef(a.flatten(1).T, b.flatten(1).T))
                else:
                    grey = ((x * weights).sum(1, keepdim=True) for x in (a, b))
                    found.append(ssim(*grey, sigma=1.5, data_range=1.0, reduction="none"))
            return torch.stack(found).numpy()

        return compare

    def pair_by_pair() -> Any:
        from skimage.color import rgb2gray
        from skimage.metrics import structural_similarity

        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}

        def compare_pair(one: np.ndarray, other: np.ndarray) -> list[float]:
            a, b = (enlarge(x[None])[0].numpy().transpose(1, 2, 0) for x in (one, other))
            measures = {
                "pixcorr": lambda: np.corrcoef(a.ravel(), b.ravel())[0, 1],
                "ssim": lambda: structural_similarity(rgb2gray(a), rgb2gray(b), **settings),
            }
            return [measures[name]() for name in names]

        return lambda: np.transpose([compare_pair(*pair) for pair in zip(truth, decoded, strict=True)])

    loop = "numpy, pair by pair" if names == ("pixcorr",) else "scikit-image, pair by pair"
    return Work(ours, {"torchmetrics": torchmetrics, loop: pair_by_pair})


def make_suite(folder: Path, pairs: int) -> Work:
    """Two-way identification by two layers of AlexNet (random weights, which cost as much as real ones).

    The loop is that of published evaluation scripts: each image goes through the network by itself, and every decoded
    one is correlated with every seen one by a call of its own.
    """
    import torch
    import torchvision

    from braindecode_vis.scoring.metrics.feature_networks import NETWORKS
    from braindecode_vis.scoring.metrics.suite import MetricSuiteConfig, compute_suite

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    truth, decoded = rng.integers(0, 256, (2, pairs, 64, 64, 3), dtype=np.uint8)
    decoded = (0.3 * truth + 0.7 * decoded).astype(np.uint8)
    torch.save(torchvision.models.alexnet().state_dict(), folder / "alexnet.pth")
    config = MetricSuiteConfig(
        networks=("alexnet",),
        weights={"alexnet": folder / "alexnet.pth"},
        pixels=False,
        semantic_ways=(),
        device="cpu",
    )
    layers = ("alexnet-2", "alexnet-5")

    def ours() -> np.ndarray:
        values = compute_suite(truth, decoded, config).values
        return np.stack([values[f"two_way_identification@{layer}"] for layer in layers])

    def read(network: Any, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            second = network.features[:5](NETWORKS["alexnet"].prepare(image[None], "cpu"))
            return second.numpy().ravel(), network.features[5:12](second).numpy().ravel()

    def loop() -> np.ndarray:
        network = torchvision.models.alexnet().eval()  # both read the weights anew
        network.load_state_dict(torch.load(folder / "alexnet.pth"))
        seen, made, found = [read(network, x) for x in truth], [read(network, x) for x in decoded], []
        for layer in (0, 1):
            table = np.array([[np.corrcoef(a[layer], b[layer])[0, 1] for b in made] for a in seen])
            own = np.diag(table)
            found.append((table < own[None]).sum(axis=0) / (pairs - 1))
        return np.stack(found)

    return Work(ours, {"one image and one pair at a time": lambda: loop}, _compare_means)


def _compare_means(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(np.mean(ours, axis=-1) - np.mean(theirs, axis=-1)).max())


def make_permutations(folder: Path, queries: int, resamples: int) -> Work:
    """Permutation test and bootstrap interval; draws differ, so that their spreads are compared."""
    from braindecode_vis.scoring.metrics.identification import make_identification_table
    from braindecode_vis.scoring.uncertainty import bootstrap_interval, permutation_test

    rng = np.random.default_rng(0)
    scores, values = rng.standard_normal((queries, queries)), rng.random(queries)

    def ours() -> np.ndarray:
        tested = permutation_test(make_identification_table(scores, 2), n_permutations=resamples)
        interval = bootstrap_interval(values, n_boot=resamples)
        return np.array([np.std(tested.null), interval.high - interval.low])

    def loop() -> np.ndarray:
        rows, null, means = np.arange(queries), [], []
        for _ in range(resamples):
            column = scores[rows, rng.permutation(queries)][:, None]
            null.append(np.mean((scores < column).sum(axis=1) / (queries - 1)))
            means.append(np.mean(values[rng.integers(0, queries, queries)]))
        return np.array([np.std(null), np.subtract(*np.percentile(means, [97.5, 2.5]))])

    return Work(ours, {"a loop in numpy": lambda: loop})


def make_embedding(folder: Path, kind: str, images: int) -> Work:
    """Embed pictures of 500 pixels: ours against the library's transform and network in a loop, in batches of 16."""
    import torch
    from PIL import Image

    from braindecode_vis.embeddings.efficientnet import (
        EfficientNetConfig,
        find_packaged_weights,
        rename_weights,
    )
    from braindecode_vis.embeddings.openclip import OpenClipConfig
    from braindecode_vis.embeddings.torchvision_models import TorchvisionConfig

    settings = {"weights": "random", "device": "cpu", "batch_size": 16}
    if kind == "openclip":
        encoder: Any = OpenClipConfig(
            architecture="ViT-B-32", pretrained="laion2b_s34b_b79k", **settings
        ).build()
    elif kind == "torchvision":
        encoder = TorchvisionConfig(architecture="resnet50", **settings).build()
    else:
        encoder = EfficientNetConfig(device="cpu").build()
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (images, 25, 25, 3), dtype=np.uint8)
    pictures = [np.asarray(Image.fromarray(picture).resize((500, 500))) for picture in coarse]
    encoder.encode(pictures[:1])  # reads the weights

    def loop_of_library() -> Any:
        if kind == "efficientnet-lite0":
            import timm
            from timm.data import create_transform

            network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
            state = torch.load(find_packaged_weights(), map_location="cpu", weights_only=True)
            network.load_state_dict(rename_weights(state, network.state_dict()))
            network.reset_classifier(0)
            plain = dict(input_size=(3, 224, 224), interpolation="bicubic", crop_pct=1.0)
            transform = create_transform(**plain, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
        else:
            network = deepcopy(encoder.load().network).to(memory_format=torch.contiguous_format)
        if kind == "openclip":
            from open_clip import image_transform

            transform = image_transform(224, is_train=False)
        elif kind == "torchvision":
            from torchvision.models import ResNet50_Weights

            transform = ResNet50_Weights.IMAGENET1K_V2.transforms()
            network.fc = torch.nn.Identity()

        def embed() -> np.ndarray:
            rows = []
            with torch.inference_mode():
                for start in range(0, images, 16):
                    batch = [transform(Image.fromarray(x)) for x in pictures[start : start + 16]]
                    rows.append(network(torch.stack(batch)).numpy())
            return np.concatenate(rows)

        return embed

    peer = {"openclip": "open_clip", "torchvision": "torchvision", "efficientnet-lite0": "timm"}[kind]
    return Work(lambda: encoder.encode(pictures), {f"{peer} in a loop": loop_of_library})


# --- networks ---------------------------------------------------------------------------------------------


def make_network(folder: Path, kind: str, trials: int, channels: int, times: int) -> Work:
    """One forward and backward pass in training mode, with the same weights."""
    import torch
    from torch.nn import functional

    from braindecode_vis.encoders.atm_config import AtmSConfig, TSConvConfig
    from braindecode_vis.encoders.signal import Signal

    torch.manual_seed(0)
    subjects = tuple(f"{number + 1:02d}" for number in range(10))
    signal = Signal(
        ("channel", "time"), (channels, times), subjects, times=np.arange(times) / 250, sfreq=250.0
    )
    network = {"tsconv": TSConvConfig(), "atm_s": AtmSConfig(unknown_probability=0.0)}[kind].build(
        signal, 1024
    )
    data, subject = torch.randn(trials, channels, times), torch.arange(trials) % 10

    def convolve(net: Any, maps: Any) -> Any:
        """The layers of NICE in the published order."""
        part, projector = net.convolution, net.projector
        maps = functional.avg_pool2d(part.temporal(maps.unsqueeze(1)), (1, part.pool), (1, part.stride))
        maps = functional.elu(part.temporal_norm(maps))
        maps = part.mixing(part.dropout(functional.elu(part.spatial_norm(part.spatial(maps)))))
        expanded = functional.linear(maps.flatten(1), projector.expand.weight, projector.expand.bias)
        return projector.norm(expanded + projector.residual(expanded))

    def attend(net: Any) -> Any:
        """The encoder of iTransformer as ATM's code has it: scores in a tensor, convolutions as feed-forward part."""
        token = net.subject_tokens(subject).unsqueeze(1)
        tokens = net.dropout(torch.cat([token, net.value_embedding.layer(data)], dim=1))
        for layer in net.layers:
            query, key, value = (
                part(tokens).view(trials, channels + 1, layer.n_heads, -1)
                for part in (layer.query, layer.key, layer.value)
            )
            scores = torch.einsum("blhe,bshe->bhls", query, key) * query.shape[-1] ** -0.5
            weights = layer.dropout(torch.softmax(scores, dim=-1))
            attended = torch.einsum("bhls,bshd->blhd", weights, value).contiguous()
            tokens = tokens + layer.dropout(layer.out(attended.flatten(2)))
            inner = tokens = layer.norm_attention(tokens)
            inner = functional.conv1d(
                inner.transpose(1, 2), layer.widen.weight.unsqueeze(2), layer.widen.bias
            )
            inner = layer.dropout(functional.gelu(inner))
            inner = functional.conv1d(inner, layer.narrow.weight.unsqueeze(2), layer.narrow.bias)
            tokens = layer.norm_feedforward(tokens + layer.dropout(inner.transpose(1, 2)))
        return net.norm(tokens)[:, 1:]

    forwards = {
        "ours": lambda: network(data, subject),
        "published": lambda: convolve(network, attend(network) if kind == "atm_s" else data),
    }

    def go(name: str) -> np.ndarray:
        network.zero_grad(set_to_none=True)
        answers = forwards[name]()
        answers.square().mean().backward()
        return np.stack([answers.detach().mean(0).numpy(), network.projector.expand.bias.grad.numpy()])

    def compare(*results: np.ndarray) -> float:
        """Compare means of outputs and a gradient without dropout, whose draws come in another order."""
        network.eval()
        found = [go(name) for name in forwards]
        network.train()
        return max(compare_arrays(a, b) for a, b in zip(*found, strict=True))

    peer = {"layers as published, in torch": lambda: partial(go, "published")}
    return Work(partial(go, "ours"), peer, compare)


def make_training(folder: Path, kind: str, trials: int, channels: int, batch: int) -> Work:
    """Three epochs from arrays to fitted weights, against a bare loop: indexing, forward, loss, backward, step."""
    from training import BareLoop, make_config, make_task

    task, config = make_task(trials, channels, 250, 1024), make_config(kind, batch, 3, "cpu", "fp32")

    def loop() -> None:
        bare = BareLoop(config, *task, "cpu")
        for _ in range(3):
            bare.time_epoch(batch)

    return Work(
        lambda: config.build(seed=0).fit(*task),
        {"bare loop in torch": lambda: loop},
        lambda ours, theirs: "as many updates, other draws",
    )


# --- recordings -------------------------------------------------------------------------------------------


def make_preprocessing(folder: Path, concepts: int, test_images: int) -> Work:
    """One raw session of THINGS-EEG2 in memory to the store; see `eeg_session`."""
    from eeg_session import make_root, run_ours, run_usual

    from braindecode_vis.datasets.things_eeg2.dataset import ThingsEeg2Config
    from braindecode_vis.preprocessing.meeg import find_positions

    make_root(folder / "root", concepts, test_images, 20)
    source = ThingsEeg2Config(root=folder / "root", sessions=(1,)).open_epochs()
    samples = [part.read(0, part.n_samples) for part in source.parts]
    find_positions(source)
    parts = [
        replace(part, read=lambda a, b, x=data: x[:, a:b])
        for part, data in zip(source.parts, samples, strict=True)
    ]
    held = replace(source, parts=tuple(parts))

    def compare(ours: np.ndarray, usual: np.ndarray) -> float:
        a, b = ours[..., :225], usual[..., :225]  # the FFT of the usual recipe bends the end of each epoch
        return float(np.sqrt(np.mean((a - b) ** 2)) / b.std())

    return Work(
        partial(run_ours, held, folder),
        {"MNE, scikit-learn": lambda: partial(run_usual, source, samples)},
        compare,
    )


def make_mvnn(folder: Path, trials: int, variant: str) -> Work:
    """Covariance of noise with the shrinkage of Ledoit and Wolf, of 63 channels and 250 times."""
    from sklearn.discriminant_analysis import _cov

    from braindecode_vis.preprocessing.whitening import fit_mvnn

    rng = np.random.default_rng(0)
    mixing = (np.eye(63) + 0.3 * rng.standard_normal((63, 63))).astype(np.float32) * 1e-5
    epochs = np.matmul(mixing, rng.standard_normal((trials, 63, 250)).astype(np.float32))
    images = np.arange(trials) // 2

    def loop() -> np.ndarray:
        exact = epochs.astype(np.float64)
        if variant == "epochs":
            return np.mean([_cov(epoch.T, shrinkage="auto") for epoch in exact], axis=0)
        pairs = exact.reshape(-1, 2, 63, 250)
        return np.mean([_cov(pair[:, :, t], shrinkage="auto") for pair in pairs for t in range(250)], axis=0)

    return Work(
        lambda: fit_mvnn(epochs, images, variant=variant).covariance, {"scikit-learn in a loop": lambda: loop}
    )


SHAPE, N_VOXELS = (81, 104, 83), 15_724  # of NSD


def make_masking(folder: Path, trials: int) -> Work:
    """One session of single-trial betas in NSD's volumes to the voxels of a mask, in percent."""
    from braindecode_vis.datasets.sources.fmri_volumes import MaskedVolumes, read_volume_header

    path, mask = folder / "betas.nii.gz", write_session(folder / "betas.nii.gz", trials)

    def ours() -> np.ndarray:
        header = read_volume_header(path)
        return MaskedVolumes(header, mask, divide_by=300)(0, header.n_volumes)

    def nilearn() -> Any:
        import nibabel
        from nilearn.masking import apply_mask

        image = nibabel.Nifti1Image(mask.astype(np.uint8), nibabel.load(path).affine)
        return lambda: apply_mask(str(path), image) / 300

    def nibabel_() -> Any:
        import nibabel

        return lambda: (nibabel.load(path).get_fdata()[mask].T / 300).astype(np.float32)

    return Work(ours, {"nilearn apply_mask": nilearn, "nibabel get_fdata": nibabel_})


def write_session(path: Path, n_trials: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Write noise of the spread of real betas, zero outside an ellipsoid, and return a mask of NSD's share."""
    from braindecode_vis.parts.phantom.formats.file_writers import write_volumes

    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    brain = (grid**2).sum(axis=0) < 0.8
    noise = (rng.standard_normal((*shape, 8)) * 500).astype(np.int16)
    mask, inside = np.zeros(shape, bool), np.flatnonzero(brain)
    n_voxels = round(N_VOXELS * np.prod(shape) / np.prod(SHAPE))
    mask.ravel()[inside[np.argsort(grid[1].ravel()[inside])[:n_voxels]]] = True
    volumes = (
        np.where(brain, np.roll(noise[..., trial % 8], trial, axis=0), np.int16(0))
        for trial in range(n_trials)
    )
    affine = np.diag([1.8, 1.8, 1.8, 1])
    write_volumes(path, volumes, shape=shape, n_volumes=n_trials, affine=affine, dtype=np.int16)
    return mask


def make_lss(folder: Path, trials: int, volumes: int, voxels: int) -> Work:
    """One amplitude per trial by least squares separate, of a run in memory."""
    from braindecode_vis.preprocessing.glm import (
        fit_trials,
        make_drifts,
        make_nuisance_basis,
        make_regressors,
    )

    rng = np.random.default_rng(0)
    times = np.arange(volumes) * 2.0
    onsets = np.sort(rng.choice(np.arange(5, volumes - 15), trials, replace=False)) * 2.0
    events = pd.DataFrame({"onset": onsets, "duration": 2.0})
    series = 1000 + rng.standard_normal((volumes, voxels))

    def ours() -> np.ndarray:
        basis = make_nuisance_basis(make_drifts(times, drift="cosine"))
        return fit_trials(series, make_regressors(events, times), basis)

    def nilearn() -> Any:
        from nilearn.glm.first_level import make_first_level_design_matrix, run_glm

        def fit(trial: int) -> np.ndarray:
            kinds = np.where(np.arange(trials) == trial, "this", "others")
            design = make_first_level_design_matrix(
                times,
                events.assign(trial_type=kinds),
                hrf_model="glover",
                drift_model="cosine",
                high_pass=1 / 128,
            )
            labels, results = run_glm(series, design.to_numpy(), noise_model="ols")
            return results[labels[0]].theta[list(design.columns).index("this")]

        return lambda: np.stack([fit(trial) for trial in range(trials)])

    return Work(ours, {"nilearn, a model per trial": nilearn})


def make_by_voxel(folder: Path, runs: int, volumes: int, voxels: int) -> Work:
    """Estimates of single trials whose model is chosen by voxel, of runs in memory; every picture is in two runs."""
    from braindecode_vis.preprocessing.glm import make_drifts, make_nuisance_basis
    from braindecode_vis.preprocessing.glm_by_voxel import RunModel, choose_by_voxel, estimate_by_choices

    rng = np.random.default_rng(0)
    times, onsets = 2.0 * np.arange(volumes), np.arange(2, volumes - 8, 4)
    order = int(np.floor(volumes / 60 + 0.5))
    basis = make_nuisance_basis(make_drifts(times, drift="polynomial", order=order))
    shown = [rng.permutation(len(onsets)) for _ in range(runs)]
    models = [
        RunModel.make(
            pd.DataFrame(
                {"onset": 2.0 * onsets, "duration": 2.0, "stimulus_id": names.astype(str), "session": "1"}
            ),
            times, basis, basis,
        )
        for names in shown
    ]  # fmt: skip
    patterns = 2 + rng.standard_normal((len(onsets), voxels))
    patterns[:, voxels // 5 :] = 0  # a fifth of the voxels sees the pictures
    series = [
        (
            1000 + 10 * (model.courses[7] @ patterns[names])
            + 10 * rng.standard_normal((volumes, voxels)) + 5 * rng.standard_normal((volumes, 1))
        ).astype(np.float32)
        for model, names in zip(models, shown, strict=True)
    ]  # fmt: skip

    def ours() -> np.ndarray:
        centred = [run - run.mean(axis=0) for run in series]
        mean = np.mean([run.mean(axis=0) for run in series], axis=0)
        choices = choose_by_voxel(models, lambda run, chosen: centred[run][:, chosen], mean)
        pairs = zip(centred, models, strict=True)
        return np.concatenate([estimate_by_choices(run, model, choices) for run, model in pairs])

    def glmsingle() -> Any:
        import contextlib
        import io

        from glmsingle.glmsingle import GLM_single

        designs = [np.zeros((volumes, len(onsets))) for _ in shown]
        for design, names in zip(designs, shown, strict=True):
            design[onsets, names] = 1
        options = {"wantfileoutputs": [0] * 4, "wantmemoryoutputs": [0, 0, 0, 1]}

        def fit() -> np.ndarray:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                found = GLM_single(dict(options)).fit(
                    designs, [run.T.copy() for run in series], 2.0, 2.0, str(folder / "out"), None
                )
            return found["typed"]["betasmd"].reshape(voxels, -1).T

        return fit

    return Work(ours, {"GLMsingle": glmsingle})


# --- the table --------------------------------------------------------------------------------------------


def _shapes(
    penalties: int, *shapes: tuple[int, int], counts: tuple[int, ...] = (1, 1024)
) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"trials": n, "features": p, "targets": targets, "penalties": penalties}
        for n, p in shapes
        for targets in counts
    )


def _ridge(name: str, title: str, penalties: int, *shapes: tuple[int, int]) -> Row:
    return Row(
        name, title, make_ridge, "{trials} x {features} -> {targets}",
        tiny=dict(trials=40, features=12, targets=3, penalties=penalties),
        quick=_shapes(penalties, (400, 1200), (500, 450), (1200, 250), counts=(256,)),
        full=_shapes(penalties, *shapes),
        large=_shapes(penalties, (5400, 9000), (5400, 3145), (16_540, 1700)),
        tolerance=1e-4,  # our weights are kept in single precision
        aside={LEAVE_ONE_OUT: AS_ONE_OUT},
    )  # fmt: skip


def _pixels(name: str, title: str, names: tuple[str, ...]) -> Row:
    return Row(
        name, title, make_pixel_metrics, "{pairs} pairs of {side} px",
        tiny=dict(pairs=2, side=32, names=names), quick=(dict(pairs=3, side=425, names=names),),
        full=(dict(pairs=20, side=425, names=names),),
        tolerance=5e-3,  # torchmetrics counts windows at the border too; scikit-image does not
    )  # fmt: skip


TOWERS = ("openclip", "torchvision", "efficientnet-lite0")
ROWS = (
    _ridge("ridge", "Ridge, one penalty", 1, (2000, 1250), (1500, 4250), (3000, 2000), (8000, 1000)),
    _ridge(
        "ridge-five", "Ridge, one of 5 penalties by 5 inner folds", 5, (2000, 6000), (2000, 1250), (6000, 800)
    ),
    # As long as fifty fits, and in other packages longer.
    _ridge(
        "ridge-choice", "Ridge, one of 11 penalties by 5 inner folds", 11, (2000, 6000), (2000, 1250), (6000, 800)
    ),
    Row(
        "ranks", "Exact rank of the true item", make_ranks, "{queries} x {gallery}, {features} features",
        tiny=dict(queries=9, gallery=20, features=8), quick=(dict(queries=400, gallery=8000, features=512),),
        full=(dict(queries=2000, gallery=16_540, features=1024),),
        tolerance=1e-3,  # share of other ranks: argsort sees near ties in single precision
    ),
    Row(
        "top-10", "Exact ten most similar", make_top, "{queries} x {gallery}, {features} features",
        tiny=dict(queries=9, gallery=20, features=8), quick=(dict(queries=400, gallery=8000, features=512),),
        full=(dict(queries=2000, gallery=16_540, features=1024), dict(queries=200, gallery=73_000, features=768)),
        tolerance=1e-3,  # share of other items: near ties in single precision
    ),
    _pixels("pixcorr", "PixCorr at 425 px", ("pixcorr",)),
    _pixels("ssim", "SSIM at 425 px", ("ssim",)),
    _pixels("pixels", "PixCorr and SSIM at 425 px", ("pixcorr", "ssim")),
    Row(
        "suite", "Metric loop: two layers of AlexNet, two-way", make_suite, "{pairs} pairs",
        tiny=dict(pairs=3), quick=(dict(pairs=5),), full=(dict(pairs=60),), tolerance=5e-3,
    ),
    Row(
        "resampling", "Permutation test and bootstrap", make_permutations, "{queries} queries, {resamples} draws",
        tiny=dict(queries=20, resamples=1000), quick=(dict(queries=200, resamples=2000),),
        full=(dict(queries=200, resamples=10_000),), tolerance=0.15,  # random draws on both sides
    ),
    Row(
        "embedding", "Image embedding", make_embedding, "{kind}, {images} images of 500 px",
        tiny=dict(kind="torchvision", images=1),
        quick=tuple(dict(kind=kind, images=2) for kind in TOWERS),
        full=tuple(dict(kind=kind, images=32) for kind in TOWERS),
        tolerance=1e-3,  # other layouts of convolutions
    ),
    Row(
        "network", "Network, forward and backward", make_network, "{kind}, {trials} x {channels} x {times}",
        tiny=dict(kind="tsconv", trials=4, channels=5, times=120),
        quick=tuple(dict(kind=kind, trials=32, channels=63, times=250) for kind in ("tsconv", "atm_s")),
        full=tuple(dict(kind=kind, trials=128, channels=63, times=250) for kind in ("tsconv", "atm_s")),
        tolerance=1e-3,
    ),
    Row(
        "training", "Training, three epochs", make_training, "{kind}, {trials} trials, {channels} channels",
        tiny=dict(kind="eegproject", trials=40, channels=4, batch=16),
        quick=(dict(kind="eegproject", trials=512, channels=17, batch=128),),
        full=(
            dict(kind="eegproject", trials=16_540, channels=17, batch=1024),
            dict(kind="atm_s", trials=512, channels=63, batch=64),
        ),
        words="Training: trials are checked once, which three epochs bear here and fifty there. Trials in memory that "
        "are not scaled are used where they lie, and so are targets if no image is held out; others are scaled and "
        "copied once.",
    ),
    Row(
        "preprocessing", "Raw EEG to whitened trials", make_preprocessing,
        "{concepts} concepts, {test_images} test images",
        tiny=dict(concepts=2, test_images=2), quick=(dict(concepts=10, test_images=5),),
        full=(dict(concepts=60, test_images=20),),
        tolerance=0.02,  # other filters against aliasing: share of the standard deviation
    ),
    Row(
        "mvnn", "Noise normalisation (MVNN)", make_mvnn, "{variant}, {trials} trials",
        tiny=dict(trials=4, variant="epochs"), quick=(dict(trials=200, variant="epochs"),),
        full=(dict(trials=1000, variant="epochs"), dict(trials=40, variant="time")), tolerance=1e-4,
    ),
    Row(
        "masking", "NSD betas to the voxels of a mask", make_masking, "{trials} trials of 81 x 104 x 83",
        tiny=dict(trials=1), quick=(dict(trials=12),), full=(dict(trials=150),),
        large=(dict(trials=750),), tolerance=1e-6,
    ),
    Row(
        "lss", "Single-trial amplitudes (LSS)", make_lss, "{trials} trials, {volumes} volumes, {voxels} voxels",
        tiny=dict(trials=3, volumes=60, voxels=4), quick=(dict(trials=20, volumes=200, voxels=2000),),
        full=(dict(trials=60, volumes=300, voxels=10_000),), tolerance=1e-6,
    ),
    Row(
        "by-voxel", "Single-trial amplitudes, model chosen by voxel (GLMsingle)", make_by_voxel,
        "{runs} runs, {volumes} volumes, {voxels} voxels",
        tiny=dict(runs=2, volumes=60, voxels=60), quick=(dict(runs=2, volumes=120, voxels=400),),
        full=(dict(runs=2, volumes=150, voxels=5000),), large=(dict(runs=4, volumes=300, voxels=50_000),),
        tolerance=0.05,  # a voxel whose two best fractions are equally good may take the other one
    ),
)  # fmt: skip
