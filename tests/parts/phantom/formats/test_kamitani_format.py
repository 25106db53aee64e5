"""GOD phantom: read back with h5py, traps included."""

import h5py
import numpy as np
import pandas as pd
import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.datasets.kamitani import bdata
from braindecode_vis.parts.phantom.formats import kamitani_format


@pytest.fixture(scope="module")
def labels():
    names = ["n01518878_10042", "n01621127_19020", "n01443537_22563"]
    return pd.DataFrame(
        {
            "DataType": [1, 2, 3],
            "stimulus_id": [bdata.encode_stimulus_id(name) for name in names],
            "Run": [1, 1, 2],
            "Block": [1, 2, 1],
        }
    )


def write_subject(root, labels, **options):
    data = np.random.default_rng(0).standard_normal((3, 5))
    rois = {"ROI_V1": np.array([1, 1, 0, 0, 0], bool), "ROI_FFA": np.array([0, 0, 0, 1, 1], bool)}
    blocks = (data[i : i + 2] for i in (0, 2))
    path = kamitani_format.write_bdata(
        root / "Subject1.h5", blocks, labels, rois, voxel_xyz=np.ones((5, 3)) * 2, **options
    )
    return path, data


@pytest.mark.parametrize("naming, metadata", [("dataSet", "metaData"), ("dataset", "metadata")])
def test_bdata_reads_back_under_both_names(tmp_path, labels, naming, metadata):
    path, data = write_subject(tmp_path, labels, naming=naming)
    with h5py.File(path) as file:
        assert set(file) == {naming, metadata}
        matrix, group = file[naming][()], file[metadata]
        keys = group["key"].asstr()[()].tolist()
        value = dict(zip(keys, group["value"][()], strict=True))
        assert len(group["description"]) == len(keys)
    np.testing.assert_array_equal(matrix[:, value["VoxelData"] == 1], data)
    np.testing.assert_array_equal(matrix[:, value["ROI_FFA"] == 1], data[:, 3:])
    assert np.isnan(value["ROI_FFA"][5:]).all()
    assert value["ROI_FFA"][0] == 0
    assert matrix[:, value["DataType"] == 1].ravel().tolist() == [1, 2, 3]
    assert matrix[:, value["stimulus_id"] == 1].ravel().tolist() == labels["stimulus_id"].tolist()
    assert path.read_bytes() == write_subject(tmp_path / "b", labels, naming=naming)[0].read_bytes()


def test_stimulus_id_loses_its_zeros_and_six_decimals_bring_them_back(labels):
    assert str(labels["stimulus_id"][1]) == "1621127.01902"
    assert f"{labels['stimulus_id'][1]:.6f}".split(".")[1].lstrip("0") == "19020"
    assert bdata.encode_stimulus_id("n01518878_5958") == 1518878.005958
    with pytest.raises(DataError, match="six digits"):
        bdata.encode_stimulus_id("n01518878_1234567")


def test_image_features(tmp_path):
    rng = np.random.default_rng(0)
    features = {"cnn1": rng.standard_normal((3, 4)), "gist": rng.standard_normal((3, 2))}
    path = kamitani_format.write_image_features(
        tmp_path / "ImageFeatures.h5", features, image_ids=np.array([1.5, 2.5, np.nan]),
        category_ids=np.array([1, 2, 2]), feature_types=np.array([1, 2, 3]),
    )  # fmt: skip
    with h5py.File(path) as file:
        matrix = file["dataSet"][()]
        value = dict(zip(file["metaData/key"].asstr()[()], file["metaData/value"][()], strict=True))
    for name, block in features.items():
        np.testing.assert_array_equal(matrix[:, value[name] == 1], block)
    assert matrix[:, value["FeatureType"] == 1].ravel().tolist() == [1, 2, 3]
    np.testing.assert_array_equal(matrix[:, value["ImageID"] == 1].ravel(), [1.5, 2.5, np.nan])


def test_wrong_input_is_refused(tmp_path, labels):
    with pytest.raises(DataError, match="is missing the column"):
        write_subject(tmp_path, labels.drop(columns="Run"))
    with pytest.raises(ConfigError, match="did you mean"):
        write_subject(tmp_path, labels, naming="dataSets")
    with pytest.raises(DataError, match="announced with 4 samples"):
        write_subject(tmp_path, pd.concat([labels, labels.head(1)]))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_estimate(tmp_path, labels):
    path, _ = write_subject(tmp_path, labels)
    assert abs(path.stat().st_size - kamitani_format.estimate_bytes(3, 5, 2)) < 10_000
