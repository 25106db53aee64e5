import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from braindecode_vis.base.checks import DataError
from braindecode_vis.encoders.parcels import PlaceEmbedding, check_architecture, read_encoder
from braindecode_vis.encoders.parcels_config import ParcelsConfig
from braindecode_vis.encoders.signal import Signal
from braindecode_vis.training.pretraining_model import Mask, PretrainingBatch, SelfSupervised

NETWORKS = ("Vis", "Vis", "Default", "Default", "Cont", "Vis")
SIGNAL = Signal(("parcel", "time"), (6, 8), ("01",), networks=NETWORKS)
TINY = ParcelsConfig(patch_times=4, width=8, depth=2, n_heads=2, mlp_ratio=2, projector_hidden=5)
NOBODY = torch.zeros(3, dtype=torch.int64)


def tune(**changes):
    return ParcelsConfig(**{**TINY.model_dump(), **changes})


def make_autoencoder(config=TINY, signal=SIGNAL, normalisation="patch"):
    return SelfSupervised(
        config.build_encoder(signal),
        decoder_width=8,
        decoder_depth=1,
        normalisation=normalisation,
    ).eval()


def reconstruct(model, data, order, n_visible):
    mask = Mask(order, n_visible, n_visible)
    return model.decoder(model.encoder(data, order[:, :n_visible]), mask, model.encoder.n_patches)


def compute_error(model, data, order, n_visible):
    return model(PretrainingBatch(data), Mask(order, n_visible, n_visible))["masked"]


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_one_vector_per_trial_and_one_per_network(pooling):
    network = tune(pooling=pooling).build(SIGNAL, 7).eval()
    data = torch.randn(3, 6, 8)
    assert network(data, NOBODY).shape == (3, 7)
    tokens = network.forward_tokens(data, NOBODY)
    assert tokens.shape == (3, 3, 7)
    grid = network.encoder(data)[:, 1:].reshape(3, 6, 2, 8)
    rows = grid[:, [2, 3]].mean(dim=(1, 2))  # Default, the second network in order of appearance
    torch.testing.assert_close(tokens[:, 1], network.projector(rows))


def test_parameters_equal_the_hand_count():
    signal = Signal(("parcel", "time"), (400, 20), ("01",), networks=("Vis",) * 200 + ("Default",) * 200)
    network = ParcelsConfig(patch_times=5).build(signal, 1024)
    w = 256
    embeddings = (5 * w + w) + 400 * w + 2 * w + 4 * w + w  # patch, parcel, network, time, extra token
    block = 2 * 2 * w + (w * 3 * w + 3 * w) + (w * w + w) + (w * 4 * w + 4 * w) + (4 * w * w + w)
    projector = 2 * w + (w * 1024 + 1024) + (1024 * 1024 + 1024)
    assert count(network) == embeddings + 6 * block + 2 * w + projector


def test_attention_equals_the_plain_formula():
    block = TINY.build_encoder(SIGNAL).blocks[0]
    tokens = torch.randn(2, 5, 8)
    q, k, v = block.qkv(tokens).split(8, dim=-1)
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(dim=-1)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(block._attend(tokens), block.out(torch.cat(heads, dim=-1)))


def test_patches_are_stretches_of_one_parcel_standardised_by_its_statistics():
    encoder = TINY.build_encoder(SIGNAL)
    encoder.mean[:], encoder.std[:] = torch.arange(6.0)[:, None], 2.0
    data = torch.randn(3, 6, 8)
    patches = encoder.cut_patches(data)
    torch.testing.assert_close(patches[1, 2 * 4 + 1], (data[1, 4, 4:] - 4) / 2)
    place = encoder.place()
    expected = encoder.place.parcel.weight[4] + encoder.place.time.weight[1] + encoder.place.network.weight[0]
    torch.testing.assert_close(place[9], expected)  # networks in alphabetical order: Cont, Default, Vis


def test_the_encoder_never_sees_hidden_tokens():
    model = make_autoencoder()
    data = torch.randn(3, 6, 8)
    order = torch.rand(3, 12).argsort(dim=1)
    with torch.no_grad():
        before = reconstruct(model, data, order, 4)
        changed = data.clone()
        for row in range(3):
            for token in order[row, 4:].tolist():
                changed[row, token // 2, 4 * (token % 2) : 4 * (token % 2) + 4] += 100
        assert torch.equal(reconstruct(model, changed, order, 4), before)
        assert not torch.equal(compute_error(model, changed, order, 4), compute_error(model, data, order, 4))
        assert model.encoder(data, order[:, :4]).shape == (3, 5, 8)
        torch.testing.assert_close(
            model.encoder(data, torch.arange(12).expand(3, -1)), model.encoder(data), atol=1e-6, rtol=1e-5
        )


def test_the_loss_is_that_of_hidden_patches_normalised_one_by_one():
    model = make_autoencoder()
    data, order = torch.randn(2, 6, 8) * 3 + 1, torch.rand(2, 12).argsort(dim=1)
    predicted = reconstruct(model, data, order, 5)
    for row in range(2):
        errors = []
        for place, token in enumerate(order[row, 5:].tolist()):
            patch = data[row, token // 2, 4 * (token % 2) : 4 * (token % 2) + 4]
            target = (patch - patch.mean()) / patch.std(unbiased=False)
            errors.append((predicted[row, place] - target).square().mean())
        torch.testing.assert_close(compute_error(model, data, order, 5)[row], torch.stack(errors).mean())
    plain = make_autoencoder(normalisation="parcel")
    assert torch.equal(plain.make_targets(data), plain.encoder.cut_patches(data))


def test_predictions_of_a_token_do_not_depend_on_the_order_of_the_others():
    model = make_autoencoder()
    data = torch.randn(1, 6, 8)
    order = torch.arange(12)[None]
    shuffled = torch.cat([order[:, [2, 0, 3, 1]], order[:, 4:].flip(1)], dim=1)
    a, b = reconstruct(model, data, order, 4), reconstruct(model, data, shuffled, 4)
    torch.testing.assert_close(b.flip(1), a, atol=1e-5, rtol=1e-4)


def test_responses_without_time_have_one_token_per_parcel():
    signal = Signal(("parcel",), (6,), ("01",), networks=NETWORKS)
    network = tune(patch_times=None).build(signal, 7)
    assert network.encoder.n_tokens == 6
    assert network(torch.randn(3, 6), NOBODY).shape == (3, 7)


def test_times_in_seconds_are_waves_at_the_middle_of_each_patch():
    places = PlaceEmbedding(SIGNAL, 8, 2, networks=False, patch_times=4)
    n_periods = len(places.periods)
    with torch.no_grad():
        for parameter in places.parameters():
            parameter.zero_()
        places.time.weight[0, 1] = places.time.weight[1, n_periods + 2] = places.time.weight[2, -1] = 1.0
    intervals = np.array([0.5, 2.0])
    found = places(3, torch.tensor(intervals)).reshape(2, 6, 3, 8)
    middle = 4 * intervals[:, None] * np.array([0.5, 1.5, 2.5])
    sine = np.sin(2 * np.pi * middle / float(places.periods[1]))
    cosine = np.cos(2 * np.pi * middle / float(places.periods[2]))
    size = np.log10(4 * intervals)[:, None].repeat(3, axis=1)
    expected = np.stack([sine, cosine, size], axis=-1)[:, None].repeat(6, axis=1)
    np.testing.assert_allclose(found[..., :3].detach(), expected, atol=1e-3)  # angles of single precision
    assert not found[..., 3:].any()


def test_frozen_blocks_get_no_gradient():
    network = tune(freeze_depth=1).build(SIGNAL, 7)
    network(torch.randn(3, 6, 8), NOBODY).sum().backward()
    learning = {name for name, p in network.named_parameters() if p.grad is not None}
    assert not any(
        n.startswith(("encoder.embed", "encoder.place", "encoder.cls", "encoder.blocks.0")) for n in learning
    )
    assert any(n.startswith("encoder.blocks.1") for n in learning)
    assert any(n.startswith("projector") for n in learning)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_foreign_weights_are_renamed_and_reported(tmp_path, suffix):
    encoder = TINY.build_encoder(SIGNAL)
    state = {f"net.{k}": v + 1 for k, v in encoder.state_dict().items() if k not in ("mean", "std")}
    state["decoder.weight"] = torch.ones(2)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 3, "state_dict": state}, file)
    else:
        save_file(state, file)
    network = TINY.build_encoder(SIGNAL)
    report = read_encoder(network, file, key_map={"net.": ""}, ignore=("decoder.",))
    assert torch.equal(network.norm.weight, state["net.norm.weight"])
    assert report.loaded["net.norm.weight"] == "norm.weight"
    assert report.ignored == ("decoder.weight",)
    assert "renamed" in str(report)
    with pytest.raises(
        DataError, match=r"is missing .* norm.bias.* and has .* net.norm.bias|is missing .* and has"
    ):
        tune(pretrained=file).build(SIGNAL, 7)
    with pytest.raises(DataError, match=r"decoder\.weight"):
        read_encoder(network, file, key_map={"net.": ""})
    seven = TINY.build_encoder(Signal(("parcel", "time"), (7, 8), ("01",), networks=(*NETWORKS, "Vis")))
    with pytest.raises(DataError, match="shape"):
        read_encoder(seven, file, key_map={"net.": ""}, ignore=("decoder.",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"of a later version": 1}, None),
        ({"width": 9}, "pretrained with width = 9, but this one has 8"),
        ({"parcels": ["a", "c"]}, "number 1 was c and is b"),
        ({"parcels": []}, None),
        ({"parcels": ["a", "c", "d"]}, None),  # their number is that of another key
        ({"networks": ["Vis", "Cont"]}, "first difference at parcel 1"),
        ({"networks": []}, None),
        ({"networks": [], "network_embedding": True}, "first difference at parcel 0"),
        ({"networks": ["Vis", "Cont"], "network_embedding": True}, "first difference at parcel 1"),
    ],
)
def test_an_encoder_of_another_architecture_is_refused(changes, words, tmp_path):
    found = {"width": 8, "parcels": ["a", "b"], "networks": ["Vis", "Default"]}
    found["network_embedding"] = changes.get("network_embedding", False)
    if words is None:
        check_architecture(found | changes, found, tmp_path)
        return
    with pytest.raises(DataError, match=words):
        check_architecture(found | changes, found, tmp_path)


def test_files_count_by_their_content(tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(TINY.build_encoder(SIGNAL).state_dict(), file)
    first = tune(pretrained=file).hashed_fields()
    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes(file.read_bytes())
    assert tune(pretrained=moved).hashed_fields() == first
    save_file(TINY.build_encoder(SIGNAL).state_dict(), file)
    assert tune(pretrained=file).hashed_fields() != first


def test_a_file_that_holds_code_is_never_run(tmp_path):
    file = tmp_path / "weights.pt"
    torch.save({"model": ParcelsConfig()}, file)
    with pytest.raises(DataError, match="only tensors"):
        tune(pretrained=file).build(SIGNAL, 7)


def test_bad_input_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="atlas"):
        TINY.build(Signal(("voxel",), (6,), ("01",)), 7)
    with pytest.raises(DataError, match="patches of 3"):
        tune(patch_times=3).build(SIGNAL, 7)
    nameless = Signal(("parcel", "time"), (6, 8), ("01",))
    with pytest.raises(DataError, match="network_embedding=false"):
        TINY.build(nameless, 7)
    network = tune(network_embedding=False).build(nameless, 7)
    with pytest.raises(DataError, match="no network names"):
        network.forward_tokens(torch.zeros(3, 6, 8), NOBODY)
    with pytest.raises(DataError, match="pretrained"):
        tune(pretrained=tmp_path / "none").build(SIGNAL, 7)
    with pytest.raises(ValidationError, match="n_heads"):
        ParcelsConfig(width=10, n_heads=4)
