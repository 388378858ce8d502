"""One class list for all spellings, and a clear message where labels do not match it."""

import pytest

from data_tools.class_names import check_folders, label_ids, labels_from_folders
from data_tools.label_map import LabelMap, read_label_map
from i3d_gn.video_io.index import VideoRecord, write_index


def ids_of(labels, class_names=None, *, first_number=0, **options):
    where = [f"list:{i + 1}" for i in range(len(labels))]
    label_map = None if class_names is None else LabelMap(class_names, first_number)
    return label_ids(labels, where=where, label_map=label_map, source="SOURCE", **options)


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
    with pytest.raises(ValueError, match="label 1000000 "):
        ids_of([0, 1_000_000], None)
    assert len(ids_of([0, 999_999], None)[0]) == 1_000_000


def test_label_map_file(tmp_path):
    path = tmp_path / "map.txt"
    path.write_bytes('\ufeffyoga\r\n\r\n "air drumming"\r\n'.encode())
    assert read_label_map(path) == LabelMap(["yoga", "air drumming"])
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
    assert read_label_map(tmp_path / "i.parquet") == LabelMap(["b", "a"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 Archery\r\n2 Biking\r\n3 Diving\r\n", LabelMap(["Archery", "Biking", "Diving"], 1)),
        ("0 Archery\n2 Diving\n1 Biking\n", LabelMap(["Archery", "Biking", "Diving"])),
        ("1\tTai Chi\n2;Yo Yo\n", LabelMap(["Tai Chi", "Yo Yo"], 1)),
        # Names that begin with numbers, but do not count.
        ("2 Archery\n3 Biking\n", LabelMap(["2 Archery", "3 Biking"])),
        ("1 Archery\n3 Biking\n", LabelMap(["1 Archery", "3 Biking"])),
        ("1 Archery\nBiking\n", LabelMap(["1 Archery", "Biking"])),
        ("1 Archery\n1 Biking\n", LabelMap(["1 Archery", "1 Biking"])),
        ("0\n1\n", LabelMap(["0", "1"])),
    ],
)
def test_label_map_with_numbers(tmp_path, text, expected):
    (tmp_path / "classInd.txt").write_text(text)
    assert read_label_map(tmp_path / "classInd.txt") == expected


def test_label_map_in_json(tmp_path):
    path = tmp_path / "labels.json"
    path.write_text('{"Holding something": "1", "Bending something": 0}')
    assert read_label_map(path) == LabelMap(["Bending something", "Holding something"])
    for text in ('{"a": 1}', '{"a": 0, "b": 0}', '["a"]', "{", '{"a": "x"}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="labels.json is not a JSON of `name: id`"):
            read_label_map(path)


def test_label_map_that_is_not_text(tmp_path):
    (tmp_path / "map.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not a UTF-8 text file"):
        read_label_map(tmp_path / "map.txt")


def test_numbers_count_from_the_first_of_the_label_map():
    assert ids_of([1, 3, -1], ["a", "b", "c"], first_number=1)[1] == [0, 2, -1]
    with pytest.raises(ValueError, match=r"label 0 \(list:1\) is not an id"):
        ids_of([0], ["a", "b"], first_number=1)
    with pytest.raises(ValueError, match=r"label 3 \(list:1\) is not an id"):
        ids_of([3], ["a", "b"], first_number=1)


def test_numbers_from_one_need_a_label_map():
    """Neither a class 0 without videos nor ids shifted by one."""
    with pytest.raises(ValueError, match=r"numbers from 1 \(list:2\).*pass a --label-map"):
        ids_of([2, 1, None, -1], None)
    assert ids_of([2, 1], ["a", "b", "c"])[1] == [2, 1]
    # Of these, some are missing in any case.
    assert ids_of([3, 2], None) == (["0", "1", "2", "3"], [3, 2])


def test_classes_with_numbers_as_names():
    """Folders 0 to 10: sorted by value, and a number in a list is a name."""
    folders = [str(i) for i in range(11)]
    names, ids = ids_of(sorted(folders))
    assert names == folders
    assert ids == [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]
    assert ids_of([10, 2, 0], names)[1] == [10, 2, 0]
    # Also if the order or the first number of the label map is another.
    assert ids_of([10, 2], sorted(folders))[1] == [2, 3]
    assert ids_of([5, 7], ["5", "6", "7"])[1] == [0, 2]
    with pytest.raises(ValueError, match=r"label 0 \(list:1\) is not an id"):
        ids_of([0], ["5", "6", "7"])


def test_normal_forms_of_unicode_are_equal():
    composed, decomposed = "Caf\u00e9", "Cafe\u0301"
    assert ids_of([composed, decomposed, "B"]) == (["B", composed], [1, 1, 0])
    assert ids_of([decomposed], ["B", composed])[1] == [1]
    assert ids_of([composed], ["B", decomposed])[1] == [1]


def test_labels_from_class_folders():
    names = ["Archery", "Tai Chi"]
    assert labels_from_folders(["Archery/a.avi", "x/Tai_Chi/y/b.avi"], names) == names
    assert labels_from_folders(["Archery/a.avi", "b.avi"], names) is None
    assert labels_from_folders(["Archery.avi"], names) is None


def test_labels_that_contradict_folders():
    names, paths = ["Archery", "Biking", "Diving"], ["Archery/a.avi", "u/Biking/b.avi", "c.avi"]
    where = [f"list:{i + 1}" for i in range(3)]
    check_folders(paths, [0, 1, 0], where=where, class_names=names)
    check_folders(paths, [0, 2, 0], where=where, class_names=names)  # one of two: an exception
    check_folders(paths, [-1, -1, 0], where=where, class_names=names)
    check_folders(["1/a.avi"], [0], where=where[:1], class_names=["0", "1"])
    with pytest.raises(ValueError, match=r"Archery/a.avi \(list:1\) is labeled 'Biking'.* 1 more"):
        check_folders(paths, [1, 2, 0], where=where, class_names=names)


@pytest.mark.real_data
def test_kinetics_400_has_official_order_in_mixed_spellings(shared_data):
    official = read_label_map(shared_data / "kinetics400" / "label_map.txt").names
    spelled = [name.replace(" ", "_") if i % 2 else name for i, name in enumerate(official)]
    assert sorted(spelled) != spelled
    names, ids = ids_of(spelled[::-1], None)
    assert names == spelled
    assert ids == list(range(400))[::-1]


@pytest.mark.real_data
def test_kinetics_400_label_map_in_another_order_is_refused(shared_data, tmp_path):
    names = read_label_map(shared_data / "kinetics400" / "label_map.txt").names
    assert len(names) == 400
    names[3], names[4] = names[4], names[3]
    swapped = tmp_path / "names.txt"
    swapped.write_text("\n".join(name.replace(" ", "_") for name in names))
    with pytest.raises(ValueError, match="id 3 is 'applying_cream', expected 'applauding'"):
        read_label_map(swapped)
    swapped.write_text("\n".join(names[:399]))  # another data set, in any order
    assert len(read_label_map(swapped).names) == 399
