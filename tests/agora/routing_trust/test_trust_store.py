"""Calibrators are kept per version, and damage is noticed."""

from pathlib import Path

import pytest

from agora.errors import ConfigError, InvalidRequest
from agora.routing.trust import Calibrator, CalibratorStore, Version, fit_calibrator
from agora.routing.trust.sealed import read_sealed, write_sealed

V1 = Version(expert="finance", adapter="fin@v1", base="smollm2-135m")
V2 = Version(expert="finance", adapter="fin@v2", base="smollm2-135m")
BARE = Version(expert="finance", adapter=None, base="smollm2-135m")


@pytest.fixture(scope="module")
def calibrator() -> Calibrator:
    return fit_calibrator([{"s": float(i % 7)} for i in range(60)], [i % 7 > 2 for i in range(60)])


@pytest.fixture
def store(tmp_path: Path) -> CalibratorStore:
    return CalibratorStore(tmp_path / "calibrators")


def test_what_is_put_is_found(store: CalibratorStore, calibrator: Calibrator) -> None:
    store.put(V1, calibrator)
    found = store.get(V1)
    assert found.calibrator == calibrator
    assert not found.reason


@pytest.mark.parametrize("other", [V2, BARE, Version(expert="finance", adapter="fin@v1", base="another-model")])
def test_another_version_is_not_calibrated_by_it(
    store: CalibratorStore, calibrator: Calibrator, other: Version
) -> None:
    store.put(V1, calibrator)
    found = store.get(other)
    assert found.calibrator is None
    assert "fin@v1" in found.reason
    assert other.words in found.reason
    assert "no longer counts" in found.reason


def test_a_rolled_back_version_finds_its_own_again(store: CalibratorStore, calibrator: Calibrator) -> None:
    other = fit_calibrator([{"s": float(i % 5)} for i in range(60)], [i % 5 > 1 for i in range(60)])
    store.put(V1, calibrator)
    store.put(V2, other)
    assert store.get(V1).calibrator == calibrator
    assert store.get(V2).calibrator == other


def test_an_expert_whose_name_begins_alike_is_another(store: CalibratorStore, calibrator: Calibrator) -> None:
    store.put(Version(expert="finance.uk", adapter=None, base="m"), calibrator)
    assert store.get(BARE).reason == "finance has not been calibrated"


def test_putting_again_replaces_and_leaves_nothing_behind(store: CalibratorStore, calibrator: Calibrator) -> None:
    for _ in range(3):
        store.put(V1, calibrator)
    assert [p.name for p in store.folder.iterdir()] == [V1.file]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
        lambda raw: b"\x00\xff" + raw,
        lambda raw: raw.replace(b'"intercept":', b'"intercept":1'),
        lambda raw: raw.replace(b"fin@v1", b"fin@v3"),
        lambda raw: b"[1, 2]",
        lambda raw: b"[" * 100_000,
        lambda raw: b'{"sha256": "x", "body": NaN}',
    ],
)
def test_damage_is_a_clear_error(store: CalibratorStore, calibrator: Calibrator, damage) -> None:  # type: ignore[no-untyped-def]
    store.put(V1, calibrator)
    path = store.folder / V1.file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"damaged.*agora calibrate") as caught:
        store.get(V1)
    assert str(path) in str(caught.value)


def test_whole_but_no_calibrator(store: CalibratorStore, calibrator: Calibrator) -> None:
    store.put(V1, calibrator)
    path = store.folder / V1.file
    body = read_sealed(path)
    write_sealed(path, {**body, "format": 99})
    with pytest.raises(ConfigError, match="format 99"):
        store.get(V1)
    write_sealed(path, {**body, "calibrator": {"weights": []}})
    with pytest.raises(ConfigError, match="is not a calibrator"):
        store.get(V1)


def test_a_write_that_fails_leaves_the_old_file(store: CalibratorStore, calibrator: Calibrator) -> None:
    store.put(V1, calibrator)
    path = store.folder / V1.file
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_sealed(path, {"x": float("nan")})
    assert path.read_bytes() == before
    assert [p.name for p in store.folder.iterdir()] == [V1.file]


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path, calibrator: Calibrator) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        CalibratorStore(tmp_path / "file").put(V1, calibrator)


def test_an_expert_name_is_no_path() -> None:
    with pytest.raises(InvalidRequest, match="must match"):
        Version(expert="../../etc/passwd", adapter=None, base="m")


def test_damage_to_another_versions_file_harms_nobody(store: CalibratorStore, calibrator: Calibrator) -> None:
    store.put(V1, calibrator)
    store.put(V2, calibrator)
    (store.folder / V1.file).write_bytes(b"torn")
    assert store.get(V2).calibrator == calibrator
    assert "fin@v2" in store.get(BARE).reason
