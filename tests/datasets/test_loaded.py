"""Data sets that are read whole: each names a file that is missing or damaged, in the words of its layout."""

import shutil

import pytest

from braindecode_vis.base.checks import DataError
from braindecode_vis.datasets.loaded import LoadedSettings
from tests.parts.phantom.test_assemble import LOADERS
from tests.parts.phantom.tiny import make_tiny

LOADED = [form for form, (config, _) in LOADERS.items() if issubclass(config, LoadedSettings)]


@pytest.fixture(scope="module", params=LOADED)
def made(request, tmp_path_factory):
    return request.param, make_tiny(request.param, tmp_path_factory.mktemp("loaded") / "data")


def test_a_missing_or_damaged_file_is_named(made, tmp_path):
    form, root = made
    kind, options = LOADERS[form]
    hints = [file.hint for file in kind.files.files.values()]
    for place in kind(root=root, **options).find_files().values():
        copy = shutil.copytree(root, tmp_path / place.name)
        config, path = kind(root=copy, **options), copy / place.relative_to(root)
        path.write_bytes(b"x")
        with pytest.raises(DataError, match=f"{path.name} cannot be read as a"):
            config.write(tmp_path / "out", seed=0)
        assert [finding.ok for finding in config.check()].count(False) >= 1
        path.unlink()
        with pytest.raises(DataError) as missing:
            config.write(tmp_path / "out", seed=0)
        assert path.name in str(missing.value)
        assert any(hint in str(missing.value) for hint in hints)
