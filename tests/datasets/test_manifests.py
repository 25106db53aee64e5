import pytest

from braindecode_vis.base.checks import ConfigError, DataError
from braindecode_vis.base.store import hash_file
from braindecode_vis.config import list_kinds
from braindecode_vis.datasets.manifests import (
    Manifest,
    ManifestFile,
    check_files,
    check_level,
    check_root,
    find_manifest,
    read_manifest,
    read_manifests,
)


def test_every_data_set_has_a_manifest():
    assert set(list_kinds("dataset")) <= set(read_manifests())


def test_a_manifest_is_read_from_the_file_of_its_name():
    """All 26 were parsed to learn of one, half a second of every run and of every mistyped name."""
    assert all(name == manifest.name for name, manifest in read_manifests().items())
    assert find_manifest("a_kind_of_mine").title == "a_kind_of_mine"


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


@pytest.mark.parametrize("name", [name for name, held in read_manifests().items() if held.root_holds])
def test_a_root_a_level_too_high_or_too_low_is_told(name, tmp_path):
    manifest = read_manifest(name)
    # Some readers look a few folders deeper themselves, where that is not too high.
    deeper = max(n for n in range(4) if "*/" * n + manifest.root_holds[0] in manifest.root_holds)
    above = tmp_path / "shelf"
    root = above.joinpath(*["floor"] * deeper, "right")
    sign = root / manifest.root_holds[0].replace("[-_]", "-").replace("*", "01")
    sign.mkdir(parents=True)
    (sign / "deeper").mkdir()
    assert check_root(root, manifest) == root
    with pytest.raises(
        DataError, match=f"a level too high: .*pass --root {above / root.parts[len(above.parts)]}"
    ):
        check_level(above, manifest)
    inside = root / "inside"
    inside.mkdir()
    with pytest.raises(DataError, match=f"a level too low: .* is in {root}; pass --root {root}"):
        check_root(inside, manifest)
    (inside / "more").mkdir()
    with pytest.raises(DataError, match=f"2 levels too low: .*pass --root {root}"):
        check_root(inside / "more", manifest)
    # Elsewhere nothing is known, and the reader says what it misses.
    (tmp_path / "empty/one/two").mkdir(parents=True)
    assert check_root(tmp_path / "empty", manifest)


def test_every_data_set_with_a_root_says_what_lies_in_it():
    without = {name for name, held in read_manifests().items() if held.needs_files and not held.root_holds}
    # The volumes of BOLD5000 are looked for anywhere below the root.
    assert without == {"bold5000_betas"}
