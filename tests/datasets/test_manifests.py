import pytest

from braindecode_vis.checks import ConfigError
from braindecode_vis.config import list_kinds
from braindecode_vis.datasets.manifests import (
    Manifest,
    ManifestFile,
    check_files,
    read_manifest,
    read_manifests,
)
from braindecode_vis.store import hash_file


def test_every_data_set_has_a_manifest():
    assert set(list_kinds("dataset")) <= set(read_manifests())


def test_an_unknown_data_set_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"must be one of .*digits69.*did you mean 'digits69'"):
        read_manifest("digit69")


def test_files_are_compared_with_the_manifest(tmp_path):
    (tmp_path / "good.bin").write_bytes(b"12345")
    (tmp_path / "short.bin").write_bytes(b"123")
    (tmp_path / "other.bin").write_bytes(b"54321")
    digest = hash_file(tmp_path / "good.bin")
    names = ("good.bin", "short.bin", "other.bin", "absent.bin")
    manifest = Manifest(
        name="toy", title="Toy", modality="eeg", subjects=1, stimuli="none", summary="", citation="", licence="CC0",
        source={"url": "example.org"}, files=tuple(ManifestFile(path=n, bytes=5, sha256=digest) for n in names),
    )  # fmt: skip
    findings = check_files(tmp_path, manifest)
    assert [finding.ok for finding in findings] == [True, False, False, False]
    assert "truncated: 3 of 5 bytes" in findings[1].message
    assert "not the published file: sha256" in findings[2].message
    assert "is missing; published as url example.org" in findings[3].message
