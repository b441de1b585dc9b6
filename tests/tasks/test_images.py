"""Images: each source against a file made here, enlargement against a plain loop, and the draw of a few."""

import gzip
import math
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from limbeck import assets, seeding
from limbeck.tasks import images


def grey(labels, held=None, side=2):
    """Images whose first pixel is their row."""
    pixels = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, side, side)
    return images.Images(pixels.clone(), torch.tensor(labels), torch.tensor(held or [False] * len(labels)))


def test_mnist_is_read_from_a_table_whose_last_column_is_the_digit(tmp_path, monkeypatch):
    rows = np.random.Generator(np.random.Philox(0)).integers(0, 256, (3, 785))
    rows[:, -1] = [7, 0, 7]
    with gzip.open(tmp_path / "mnist_5k.csv.gz", "wt") as file:
        np.savetxt(file, rows, fmt="%d", delimiter=",")
    monkeypatch.setattr(assets, "path", {"mnist": tmp_path}.__getitem__)
    loaded = images.load("mnist")
    assert loaded.labels.tolist() == [7, 0, 7]
    assert not loaded.held.any()
    values = loaded.select(torch.tensor([2]))
    assert values.shape == (1, 1, 28, 28)
    np.testing.assert_allclose(values.numpy().ravel(), rows[2, :784] / 255, rtol=1e-6)


def test_digits_are_enlarged_to_mnists_box_by_bilinear_interpolation():
    loaded, source = images.load("digits"), load_digits()
    assert loaded.labels.tolist() == source.target.tolist()
    values = loaded.select(torch.tensor([11]))[0, 0]
    inner = values[4:24, 4:24]
    assert values.shape == (28, 28)
    assert values.sum().item() == pytest.approx(inner.sum().item()), "the frame is black"
    small = source.images[11] / 16
    for y, x in ((0, 0), (3, 9), (10, 10), (19, 6)):
        place = [min(max((i + 0.5) * 0.4 - 0.5, 0), 7) for i in (y, x)]
        (top, left), (down, right) = map(math.floor, place), (i % 1 for i in place)
        low, far = min(top + 1, 7), min(left + 1, 7)
        upper = (1 - right) * small[top, left] + right * small[top, far]
        lower = (1 - right) * small[low, left] + right * small[low, far]
        assert inner[y, x].item() == pytest.approx((1 - down) * upper + down * lower, abs=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_packed_or_not_and_their_second_part_is_held(tmp_path, packed):
    for part, labels in (("train", [3, 1]), ("t10k", [0, 2, 1])):
        pixels = bytes(range(len(labels))) + bytes(len(labels) * 783)
        contents = {
            f"{part}-labels-idx1-ubyte": struct.pack(">II", 2049, len(labels)) + bytes(labels),
            f"{part}-images-idx3-ubyte": struct.pack(">IIII", 2051, len(labels), 28, 28) + pixels,
        }
        for name, content in contents.items():
            if packed:
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (tmp_path / name).write_bytes(content)
    loaded = images.load(f"idx/{tmp_path}")
    assert loaded.labels.tolist() == [3, 1, 0, 2, 1]
    assert loaded.held.tolist() == [False, False, True, True, True]
    assert loaded.pixels[:, 0, 0, 1].tolist() == [1, 0, 1, 0, 0]
    assert loaded.pixels[2, 0, 0, :4].tolist() == [0, 1, 2, 0]


def picture(file, colours, size):
    """A picture of vertical stripes, saved."""
    width, height = size
    file.parent.mkdir(parents=True, exist_ok=True)
    stripes = np.repeat(np.array(colours, dtype=np.uint8), width // len(colours), axis=0)
    Image.fromarray(np.broadcast_to(stripes, (height, width, 3)).copy()).save(file)


def test_pictures_of_a_folder_are_cut_to_their_centre_and_its_val_part_is_held(tmp_path):
    red, green, blue = [255, 0, 0], [0, 255, 0], [0, 0, 255]
    picture(tmp_path / "train" / "ant" / "0.png", [red, green, blue], (96, 32))
    picture(tmp_path / "train" / "bee" / "0.png", [blue], (32, 64))
    picture(tmp_path / "val" / "ant" / "0.png", [red], (32, 32))
    picture(tmp_path / "val" / "bee" / "0.png", [blue], (32, 32))
    loaded = images.load(f"folder/{tmp_path}", side=8)
    assert loaded.labels.tolist() == [0, 1, 0, 1]
    assert loaded.held.tolist() == [False, False, True, True]
    assert loaded.pixels.shape == (4, 3, 8, 8)
    assert loaded.pixels[0, :, 4, 4].tolist() == green
    assert loaded.pixels[0, 1, :, 1:-1].eq(255).all(), "the outer stripes are cut away"
    assert loaded.pixels[1, :, 4, 4].tolist() == blue


def test_a_folder_whose_parts_have_other_classes_is_refused(tmp_path):
    picture(tmp_path / "train" / "ant" / "0.png", [[0, 0, 0]], (8, 8))
    (tmp_path / "val" / "bee").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"the same in each; got \[\['ant'\], \['bee'\]\]"):
        images.load(f"folder/{tmp_path}")
    with pytest.raises(ValueError, match="expected a folder a class in"):
        images.load(f"folder/{tmp_path}/none")


def test_hidden_files_and_folders_are_no_data(tmp_path):
    for part in ("train", "val"):
        picture(tmp_path / part / "ant" / "0.png", [[255, 0, 0]], (8, 8))
        picture(tmp_path / part / "bee" / "0.png", [[0, 0, 255]], (8, 8))
    before = images.load(f"folder/{tmp_path}", side=4)
    picture(tmp_path / "train" / ".ipynb_checkpoints" / "0-checkpoint.png", [[9, 9, 9]], (8, 8))
    picture(tmp_path / "train" / "ant" / ".ipynb_checkpoints" / "0-checkpoint.png", [[9, 9, 9]], (8, 8))
    picture(tmp_path / "train" / "ant" / ".hidden.png", [[9, 9, 9]], (8, 8))
    for file in ("train/.DS_Store", "train/ant/.DS_Store", "val/bee/._0.png"):
        (tmp_path / file).write_bytes(b"no picture")
    after = images.load(f"folder/{tmp_path}", side=4)
    assert torch.equal(after.pixels, before.pixels)
    assert torch.equal(after.labels, before.labels)
    assert after.classes == 2


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    picture(tmp_path / "ant" / "0.png", [[255, 0, 0]], (64, 64))
    (tmp_path / "bee").mkdir()
    with pytest.raises(ValueError, match=r"expected pictures in .*bee, got none"):
        images.load(f"folder/{tmp_path}")
    whole = (tmp_path / "ant" / "0.png").read_bytes()
    for content in (b"", b"text", whole[:20], whole[:-30]):
        (tmp_path / "bee" / "1.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"1\.png: expected a picture, got what PIL cannot read"):
            images.load(f"folder/{tmp_path}")
    (tmp_path / "bee" / "1.png").unlink()
    (tmp_path / "bee" / "more").mkdir()
    with pytest.raises(ValueError, match=r"more: expected a picture"):
        images.load(f"folder/{tmp_path}")


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="received the data set 'svhn', expected mnist, digits"):
        images.load("svhn")


def test_some_classes_are_numbered_in_the_order_given_with_their_own_images():
    chosen = grey([2, 0, 1, 2], held=[False, False, False, True]).only([2, 0])
    assert chosen.labels.tolist() == [0, 1, 0]
    assert chosen.pixels[:, 0, 0, 0].tolist() == [0, 1, 3]
    assert chosen.held.tolist() == [False, False, True]
    with pytest.raises(ValueError, match=r"received the classes \[0, 5\], expected none of \[5\]"):
        grey([0, 1]).only([0, 5])


def test_a_draw_has_as_many_of_each_class_from_those_allowed_and_depends_on_its_stream_alone(global_generators):
    labels = torch.tensor([0, 1] * 30)
    among = torch.arange(60) >= 20
    before = global_generators()
    draws = [images.choose(labels, among, 4, seeding.generator(0, "draw", number)) for number in range(20)]
    assert global_generators() == before
    for rows in draws:
        assert labels[rows].tolist() == [0] * 4 + [1] * 4
        assert len(set(rows.tolist())) == 8
        assert among[rows].all()
    assert torch.equal(draws[3], images.choose(labels, among, 4, seeding.generator(0, "draw", 3)))
    assert len({tuple(rows.tolist()) for rows in draws}) == 20
    assert set(torch.cat(draws).tolist()) == set(range(20, 60)), "every image allowed can come"
    with pytest.raises(ValueError, match="at least 21 images of class 0 to draw from, got 20"):
        images.choose(labels, among, 21, seeding.generator(0, "draw"))
