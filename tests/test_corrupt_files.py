"""Every kind of file that is read, cut, emptied, changed in one byte or put in another's place: an error, no number.

An error is a ValueError with the file's path. A changed byte may leave a file that reads well: then it reads as before,
or its checksum stands elsewhere (dvc.lock for records, claims and params; a notebook's digest). The long form, with
LIMBECK_TORTURE=1, changes every file at many more places.
"""

import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import struct

import pytest
import torch
import yaml
from torch import nn

from limbeck import assets, digests, measurements, params, paths, records
from limbeck.exhibits import claims
from limbeck.experiments.ledger import Ledger
from limbeck.tasks import images, meanings
from limbeck.training import resume

LONG = os.environ.get("LIMBECK_TORTURE") == "1"
FLIPS, CUTS = (2000, 100) if LONG else (25, 6)


def damaged(whole, *, flips=FLIPS, seed=0):
    """A file's bytes emptied, cut at some places, and with one bit of some bytes changed; each with what was done."""
    source = random.Random(seed)
    yield "emptied", b""
    for place in sorted({1, len(whole) // 2, *(source.randrange(1, len(whole)) for _ in range(CUTS))}):
        yield f"cut to {place}", whole[:place]
    for place in sorted({source.randrange(len(whole)) for _ in range(flips)}):
        yield f"byte {place}", bytes([*whole[:place], whole[place] ^ (1 << source.randrange(8)), *whole[place + 1 :]])


def attempt(read, file, *, by=None):
    """What is read, or None for an error that names the file; any other error fails."""
    try:
        return read()
    except ValueError as error:
        assert str(by or file.name) in str(error), error
        return None


def check(file, read, *, watched=False, by=None, flips=FLIPS):
    """Damage a file in every way; where it still reads, it must read as before, or a checksum must watch over it."""
    whole, before = file.read_bytes(), read()
    assert before is not None
    for what, content in damaged(whole, flips=flips):
        file.write_bytes(content)
        after = attempt(read, file, by=by)
        assert after is None or equal(after, before) or (watched and content), (file, what)
    file.write_bytes(whole)
    assert equal(read(), before)


def equal(one, other):
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A tree with copies of what is damaged here."""
    for name in ("DATA", "PARAMS", "RESULTS", "NOTEBOOKS"):
        monkeypatch.setattr(paths, name, tmp_path / name.lower())
    for name in ("params", "data/claims", "data/assets.yaml", "data/awaiting.yaml", "notebooks/sinkd"):
        place, copy = paths.ROOT / name, tmp_path / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if place.is_dir() else shutil.copy)(place, copy)
    for name in ("default/sinkd", "bench/sinkd"):
        shutil.copytree(paths.ROOT / "results" / name, tmp_path / "results" / name)
    return tmp_path


def locked():
    """The md5 of each file that dvc.lock knows."""
    stages = yaml.safe_load((paths.ROOT / "dvc.lock").read_text())["stages"].values()
    return {one["path"]: one.get("md5") for s in stages for one in (*s.get("deps", ()), *s.get("outs", ()))}


def test_records(copied):
    name = "results/default/sinkd/fig_permutation.jsonl"
    file, other = copied / name, copied / "results/default/sinkd/fig_toy_divergences.jsonl"
    assert hashlib.md5(file.read_bytes()).hexdigest() == locked()[name]
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:2]))
    check(file, lambda: records.read("sinkd", "fig_permutation", "default"), watched=True)
    shutil.copy(other, file)
    assert attempt(lambda: records.read("sinkd", "fig_permutation", "default"), file) is None


def test_a_cut_between_lines_leaves_whole_records_and_the_lock_tells(copied):
    """As after a kill, when the ledger runs what is missing; dvc.lock has the sum of the whole."""
    name = "results/default/sinkd/fig_permutation.jsonl"
    lines = (copied / name).read_bytes().splitlines(keepends=True)
    (copied / name).write_bytes(b"".join(lines[:-1]))
    assert len(records.read("sinkd", "fig_permutation", "default")) == len(lines) - 1
    assert hashlib.md5((copied / name).read_bytes()).hexdigest() != locked()[name]


def test_exhibits(copied):
    file = copied / "results/default/sinkd/fig_permutation.json"
    check(file, lambda: records.read_exhibit(file), watched=True)
    shutil.copy(copied / "results/default/sinkd/table_encoder.json", file)
    assert attempt(lambda: records.read_exhibit(file), file) is None


def test_rows_of_measurements(copied):
    file = min((copied / "results/bench/sinkd").glob("*.jsonl"))
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:1]))
    check(file, lambda: measurements.read("sinkd", file.stem, "bench").to_dict(), watched=True)


def test_claims(copied):
    file = copied / "data/claims/sinkd.yaml"
    file.write_text("\n- id".join(file.read_text().split("\n- id")[:3]) + "\n")
    assert len(claims.load("sinkd")) > 1
    check(file, lambda: claims.load("sinkd"), watched=True)
    file.write_text((copied / "params/sinkd.yaml").read_text())
    assert attempt(lambda: claims.load("sinkd"), file) is None


def test_params(copied):
    file = copied / "params/kdrl.yaml"
    content = yaml.safe_load(file.read_text())
    kept = dict(list(content.items())[:2]) | {"shared": content["shared"]}
    file.write_text(yaml.safe_dump(kept))

    def read():
        return {
            (name, p): params.section("kdrl", name, p) for name, ps in params.experiments("kdrl").items() for p in ps
        }

    for what, changed in damaged(file.read_bytes()):
        file.write_bytes(changed)
        try:
            read()  # another number is another hash: its cells are stale
        except ValueError as error:
            assert "kdrl.yaml" in str(error) or "must be one of" in str(error), (what, error)


def test_the_manifest_and_awaiting(copied):
    file = copied / "data/assets.yaml"
    check(file, assets.manifest, watched=True, by="assets.yaml")
    shutil.copy(copied / "params/sinkd.yaml", file)
    assert attempt(assets.manifest, file) is None
    waiting = copied / "data/awaiting.yaml"
    waiting.write_text("default/sinkd/x:\n  commit: abc\n  reason: none\n")
    check(waiting, lambda: records.awaiting() or None, watched=True)


def test_an_asset(copied, monkeypatch):
    folder = copied / "data/raw/mine"
    folder.mkdir(parents=True)
    content = bytes(range(256)) * 4
    (folder / "a.bin").write_bytes(content)
    member = assets.Member("a.bin", len(content), hashlib.sha256(content).hexdigest())
    mine = assets.Asset("mine", "mine==1", "mine-1.whl", 1, "0" * 64, "wheel", "MIT", "here", {"a.bin": member})
    monkeypatch.setattr(assets, "manifest", lambda: {"mine": mine})
    check(folder / "a.bin", lambda: [file.read_bytes() for file in assets.path("mine").iterdir()], by="mine")


def test_notebooks(copied):
    file = copied / "notebooks/sinkd/fig_permutation.ipynb"
    check(file, lambda: (digests.of_notebook(file), digests.cells(file))[1], watched=True, flips=FLIPS // 5)
    whole = digests.of_notebook(file)
    shutil.copy(copied / "notebooks/sinkd/table_encoder.ipynb", file)
    assert digests.of_notebook(file) != whole


def test_states_and_weights(tmp_path):
    weights = {"weight": nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))}
    optimiser = torch.optim.AdamW(weights.values(), lr=0.1)
    weights["weight"].square().sum().backward()
    optimiser.step()
    state, left = tmp_path / "run" / "state.safetensors", tmp_path / "left.safetensors"
    resume.save(state, weights, optimiser, {"step": 1, "curve": {"loss/a": [0.5]}})
    resume.write_tensors(left, weights)
    flips = len(state.read_bytes())
    source = random.Random(1)

    def read():
        fresh = {"weight": nn.Parameter(torch.zeros(4, 3))}
        told = resume.load(state, fresh, torch.optim.AdamW(fresh.values()))
        return {"told": told, "weight": fresh["weight"].detach()}

    check(state, read)
    check(left, lambda: resume.read_tensors(left, like=weights))
    whole = state.read_bytes()
    for place in source.sample(range(flips), min(flips, 40 * FLIPS)):
        state.write_bytes(bytes([*whole[:place], whole[place] ^ 1, *whole[place + 1 :]]))
        after = attempt(read, state)
        assert after is None or equal(after, {"told": after["told"], "weight": weights["weight"].detach()})
        assert after is None or after["told"] == {"step": 1, "curve": {"loss/a": [0.5]}}
    shutil.copy(left, state)
    assert attempt(read, state) is None


def test_the_list_of_what_is_settled(copied):
    ledger = Ledger("sinkd", "fig_permutation", "smoke")
    file = ledger.checkpoints / "settled.json"
    records.replace_text(file, json.dumps(["a" * 64, "b" * 64]))
    for what, content in damaged(file.read_bytes()):
        file.write_bytes(content)
        known = attempt(ledger.settled, file)
        assert known is None or len(known & {"a" * 64, "b" * 64}) >= 1, what  # an unknown hash is run again


def test_images_and_meanings_of_ones_own(tmp_path):
    pixels, labels = bytes(range(256)) * 49, bytes(range(10)) + bytes(6)
    for part in ("train", "t10k"):
        images_file, labels_file = (tmp_path / f"{part}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
        images_file.write_bytes(gzip.compress(struct.pack(">IIII", 2051, 16, 28, 28) + pixels, mtime=0))
        labels_file.write_bytes(gzip.compress(struct.pack(">II", 2049, 16) + labels, mtime=0))

    def read():
        loaded = images.load(f"idx/{tmp_path}")
        return {"pixels": loaded.pixels, "labels": loaded.labels}

    check(images_file, read, by="t10k")
    check(labels_file, read, by="t10k")
    shutil.copy(labels_file, images_file)
    assert attempt(read, images_file) is None
    for part in ("train", "validation", "test"):
        row = {"meaning": f"the {part}", "texts": ["one", "two"]}
        (tmp_path / f"{part}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    check(tmp_path / "test.jsonl", lambda: meanings.splits(str(tmp_path), [-1] * 3, seed=0), watched=True)


BOMBS = {
    "depth": b"[" * 100_000,
    "depth of mappings": b'{"a":' * 100_000,
    "digits": b'{"a": ' + b"9" * 100_000 + b"}",
    "overflow": b'{"a": 1e999}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "twice": b'{"a": 1, "a": 2}',
    "bytes": b"\xff\xfe{}",
    "nothing": b"null",
    "code": b'{"__reduce__": ["os.system", "touch ran"]}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_record_from_a_stranger_is_refused_by_name(copied, name):
    file = copied / "results/default/sinkd/fig_permutation.jsonl"
    good = file.read_bytes().splitlines()[0]
    values = [BOMBS[name], good.replace(b'"params": {', b'"params": {"odd": ' + BOMBS[name] + b", ", 1)]
    for content in values[: 1 if name in ("nothing", "code") else 2]:
        file.write_bytes(content + b"\n")
        with pytest.raises(ValueError, match=r"fig_permutation\.jsonl, line 1: .*; delete it and run"):
            records.read("sinkd", "fig_permutation", "default")


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system [touch ran]",
        "a: !!python/name:os.system",
        "a: 1\na: 2",
        "a: .nan",
        "a: .inf",
        "[" * 2000,
        "a: *b",
        "\x00",
        "- 1",
        "3",
        "a: &x [*x]",
        "%YAML 9.9\n--- a",
    ],
)
def test_yaml_from_a_stranger_is_refused_by_name(copied, text):
    for file, read in {
        copied / "params/sinkd.yaml": lambda: params.experiments("sinkd"),
        copied / "data/claims/sinkd.yaml": lambda: claims.load("sinkd"),
        copied / "data/assets.yaml": assets.manifest,
        copied / "data/awaiting.yaml": records.awaiting,
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=file.name):
            read()
    assert not (paths.ROOT / "ran").exists()


def test_names_lead_nowhere_else(copied):
    for name in ("../../x", "/tmp/x", "..", ".", "", "a/b", "a\x00"):
        for parts in ((name, "x", "default"), ("sinkd", name, "default"), ("sinkd", "x", name)):
            with pytest.raises(ValueError, match=r"as a part of a path, expected letters"):
                records.path(*parts)
        with pytest.raises(ValueError, match=r"as a part of a path, expected letters"):
            records.write_exhibit("sinkd", name or "/", "default", claims=[], table=[])
        with pytest.raises(ValueError, match="as a name, expected letters"):
            assets.Asset(name, "r==1", "f.whl", 1, "0" * 64, "wheel", "MIT", "o", {})
        with pytest.raises(ValueError, match="as a name, expected letters"):
            assets.Asset("a", "r==1", name, 1, "0" * 64, "wheel", "MIT", "o", {})


def test_a_header_that_claims_much_takes_no_memory(tmp_path):
    """Four billion images, and a tensor of a terabyte, claimed by a hundred bytes each."""
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, 2**32 - 1, 28, 28) + bytes(100))
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    huge = tmp_path / "huge.safetensors"
    huge.write_bytes(struct.pack("<Q", len(header)) + header)
    longer = tmp_path / "longer.safetensors"
    longer.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="images-idx3"):
        images.load(f"idx/{tmp_path}")
    for file in (huge, longer):
        with pytest.raises(ValueError, match=f"{file.name}, which cannot be read"):
            resume.read_tensors(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes
