"""One class list for all spellings, and a clear message where labels do not match it."""

import pytest

from data_tools.class_names import label_ids, read_label_map
from i3d_gn.video_io.index import VideoRecord, write_index


def ids_of(labels, class_names=None, **options):
    where = [f"list:{i + 1}" for i in range(len(labels))]
    return label_ids(labels, where=where, class_names=class_names, source="SOURCE", **options)


def test_names_are_sorted():
    names, ids = ids_of(["yoga", "Zumba", "air drumming", "yoga"])
    assert names == ["Zumba", "air drumming", "yoga"]
    assert ids == [2, 0, 1, 2]


def test_label_map_determines_ids():
    names, ids = ids_of(["yoga", None, "abseiling"], ["yoga", "air drumming", "abseiling"])
    assert names == ["yoga", "air drumming", "abseiling"]
    assert ids == [0, -1, 2]


def test_spaces_and_underscores_are_equal():
    official = ["massaging person's head", "passing American football (in game)"]
    _, ids = ids_of(["passing_American_football_(in_game)", "massaging_person's_head"], official)
    assert ids == [1, 0]
    names, ids = ids_of(["air_drumming", "yoga", "air drumming"])
    assert names == ["air drumming", "yoga"]
    assert ids == [0, 1, 0]


def test_further_names_have_ids():
    assert ids_of(["yoga"], further_names=["abseiling", "yoga"]) == (["abseiling", "yoga"], [1])


def test_numbers_are_ids():
    assert ids_of([1, 0, None, -1]) == (["0", "1"], [1, 0, -1, -1])
    assert ids_of([1, 0], ["climbing", "blowing", "more"])[1] == [1, 0]
    assert ids_of([None, None]) == ([], [-1, -1])


@pytest.mark.parametrize(
    ("labels", "class_names", "message"),
    [
        (
            ["yoga", "Yogaa"],
            ["yoga", "abseiling"],
            r"class 'Yogaa' \(list:2\) is not one of the 2 of SOURCE, did you mean 'yoga'\?; "
            r"train and val must share one class list: pass the same complete --label-map",
        ),
        (["a", "b", "b", "c"], ["yoga"], r"class 'a' \(list:1\) .* and 2 more; train and val"),
        ([0, 2], ["x", "y"], r"label 2 \(list:2\) is not an id of the 2 classes of SOURCE"),
        ([-2], ["x", "y"], r"label -2 \(list:1\) is not an id"),
        ([0, "yoga"], None, r"all names or all ids, but list:1 has the id 0 and list:2"),
        (["a"], ["a b", "a_b"], r"SOURCE has the class 'a_b' twice, with ids 0 and 1"),
    ],
)
def test_labels_that_do_not_match(labels, class_names, message):
    with pytest.raises(ValueError, match=message):
        ids_of(labels, class_names)


def test_numbers_too_large_for_labels():
    """E.g. a time in the last column, which must not make a list of a billion names."""
    with pytest.raises(ValueError, match="label 1700000000 .* is it a label"):
        ids_of([1_700_000_000], None)


def test_label_map_file(tmp_path):
    path = tmp_path / "map.txt"
    path.write_bytes('\ufeffyoga\r\n\r\n "air drumming"\r\n'.encode())
    assert read_label_map(path) == ["yoga", "air drumming"]
    path.write_text("yoga\nyoga\n")
    with pytest.raises(ValueError, match=r"map.txt has the class 'yoga' twice"):
        read_label_map(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_label_map(path)
    with pytest.raises(ValueError, match="label map not found"):
        read_label_map(tmp_path / "none.txt")


def test_index_as_label_map(tmp_path):
    record = VideoRecord(
        path="a.mp4", label=1, num_frames=1, fps=25, duration_seconds=1, width=2, height=2
    )
    write_index(tmp_path / "i.parquet", [record], class_names=["b", "a"], root=tmp_path)
    assert read_label_map(tmp_path / "i.parquet") == ["b", "a"]


@pytest.mark.real_data
def test_kinetics_400_has_official_order_in_mixed_spellings(shared_data):
    official = read_label_map(shared_data / "kinetics400" / "label_map.txt")
    spelled = [name.replace(" ", "_") if i % 2 else name for i, name in enumerate(official)]
    assert sorted(spelled) != spelled
    names, ids = ids_of(spelled[::-1], None)
    assert names == spelled
    assert ids == list(range(400))[::-1]


@pytest.mark.real_data
def test_kinetics_400_label_map_in_another_order_is_refused(shared_data, tmp_path):
    names = read_label_map(shared_data / "kinetics400" / "label_map.txt")
    assert len(names) == 400
    names[3], names[4] = names[4], names[3]
    swapped = tmp_path / "names.txt"
    swapped.write_text("\n".join(name.replace(" ", "_") for name in names))
    with pytest.raises(ValueError, match="id 3 is 'applying_cream', expected 'applauding'"):
        read_label_map(swapped)
    swapped.write_text("\n".join(names[:399]))  # another data set, in any order
    assert len(read_label_map(swapped)) == 399
