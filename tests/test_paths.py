import pytest

from limbeck import paths


def test_what_is_hidden_or_lies_in_a_hidden_folder_is_not_listed(tmp_path):
    for name in ("b.json", "a.json", "in/c.json", ".d.json", ".in/e.json", "in/.f.json", "in/.g/h.json", "i.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shown = [file.relative_to(tmp_path).as_posix() for file in paths.visible(tmp_path, "**/*.json")]
    assert shown == ["a.json", "b.json", "in/c.json"]
    assert [file.name for file in paths.visible(tmp_path)] == ["a.json", "b.json", "i.txt", "in"]
    assert paths.visible(tmp_path / "none") == []


def test_a_folder_that_is_hidden_itself_is_listed(tmp_path):
    (tmp_path / ".home").mkdir()
    (tmp_path / ".home" / "a").touch()
    assert [file.name for file in paths.visible(tmp_path / ".home")] == ["a"]


@pytest.mark.parametrize("text", ["[NaN]", "[-Infinity]", '{"a": 1, "a": 1}', "[" * 100_000])
def test_json_is_read_strictly(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json: expected JSON"):
        paths.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["a: .nan", "a: -.inf", "a: 1\na: 1", "a: !!python/name:os.system"])
def test_yaml_is_read_strictly(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml: expected YAML"):
        paths.read_yaml(tmp_path / "a.yaml")
