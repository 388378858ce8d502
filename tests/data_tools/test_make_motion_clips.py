"""The clips are real files, and only their motion depends on the class."""

import av
import numpy as np
import pytest

from data_tools.make_motion_clips import MOTIONS, render_clip
from i3d_gn import cli
from i3d_gn.video_io.decode import probe_video


def run(output, *arguments, workers=2):
    arguments = [str(output), *map(str, arguments), "--workers", str(workers)]
    return cli.main(["make-motion-clips", *arguments])


def decode(path):
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def shift_between(first, second):
    """(right, down) in pixels from one grayscale image to the other, by phase correlation."""
    window = np.outer(np.hanning(first.shape[0]), np.hanning(first.shape[1]))
    spectrum = [np.fft.fft2((p - p.mean()) * window) for p in (first, second)]
    cross = spectrum[1] * spectrum[0].conj()
    peak = np.fft.ifft2(cross / (np.abs(cross) + 1e-3 * np.abs(cross).max())).real
    down, right = np.unravel_index(peak.argmax(), peak.shape)
    wrapped = [
        (v + n // 2) % n - n // 2 for v, n in zip((right, down), peak.shape[::-1], strict=True)
    ]
    return np.array(wrapped)


def camera_motion(first, second):
    """The class of the motion, from the shifts in the four quarters of the image."""
    height, width = first.shape
    shifts, centers = [], []
    for top in (0, height // 2):
        for left in (0, width // 2):
            part = np.s_[top : top + height // 2, left : left + width // 2]
            shifts.append(shift_between(first[part], second[part]))
            centers.append((left - width / 4, top - height / 4))
    shifts, centers = np.array(shifts, float), np.array(centers)
    right, down = shifts.mean(0)
    # Clockwise rotation of the image, in pixels at the centers of the quarters.
    turning = np.mean(centers[:, 0] * shifts[:, 1] - centers[:, 1] * shifts[:, 0]) / np.hypot(
        *centers[0]
    )
    evidence = {
        "move_left": right,
        "move_right": -right,
        "move_up": down,
        "move_down": -down,
        "roll_counterclockwise": turning,
        "roll_clockwise": -turning,
    }
    return max(evidence, key=lambda motion: evidence[motion])


def test_clips_are_h264(motion_clips):
    files = sorted(motion_clips.glob("*/*/*.mp4"))
    assert [f.relative_to(motion_clips).parts[:2] for f in files] == [
        (split, motion) for split in ("train", "val") for motion in sorted(MOTIONS)
    ]
    for file in files:
        info = probe_video(file)
        assert (info.codec, info.num_frames, info.fps) == ("h264", 12, 25)
        assert (info.width, info.height) == (128, 96)
        with av.open(str(file)) as container:
            types = {int(frame.pict_type) for frame in container.decode(video=0)}
        assert types == {1, 2, 3}  # I, P and B


def test_motion_matches_the_class(motion_clips):
    for file in motion_clips.glob("*/*/*.mp4"):
        gray = decode(file).mean(-1)
        assert camera_motion(gray[2], gray[5]) == file.parent.name
        assert camera_motion(gray[5], gray[2]) != file.parent.name


def test_encoding_preserves_rendered_frames(motion_clips):
    key = (3, 1, list(MOTIONS).index("roll_clockwise"), 0)
    drawn = render_clip("roll_clockwise", num_frames=12, rng=np.random.default_rng(key))
    decoded = decode(motion_clips / "val" / "roll_clockwise" / "roll_clockwise_000.mp4")
    error = np.square(decoded.astype(float) - drawn).mean()
    assert 10 * np.log10(255**2 / error) > 30


def test_single_frames_are_independent_of_the_class():
    """First frames are equal for the same seed, and statistics of later ones agree."""
    first_frames = [
        render_clip(motion, num_frames=1, rng=np.random.default_rng(9))[0] for motion in MOTIONS
    ]
    for frame in first_frames[1:]:
        np.testing.assert_array_equal(frame, first_frames[0])

    def statistics(frame):
        gray = frame.mean(-1)
        gradients = [np.abs(np.diff(gray, axis=axis)).mean() for axis in (0, 1)]
        diagonals = [np.abs(gray[1:, 1:] - gray[:-1, :-1]), np.abs(gray[1:, :-1] - gray[:-1, 1:])]
        return [gray.mean(), gray.std(), *gradients, *(d.mean() for d in diagonals)]

    # Class means of a later frame, after motion, agree within their standard errors.
    per_class = np.array(
        [
            [
                statistics(render_clip(motion, num_frames=9, rng=np.random.default_rng((k, i)))[8])
                for i in range(25)
            ]
            for k, motion in enumerate(MOTIONS)
        ]
    )
    means, noise = per_class.mean(1), per_class.std(1).mean(0) / np.sqrt(25)
    assert np.all(np.abs(means - means.mean(0)) < 4 * noise)


def test_seed_determines_every_byte(tmp_path):
    options = ("--train-clips", 1, "--val-clips", 1, "--num-frames", 6)
    assert run(tmp_path / "a", *options) == 0
    assert run(tmp_path / "b", *options, workers=1) == 0
    assert run(tmp_path / "c", *options, "--seed", 1) == 0
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").glob("*/*/*.mp4")]
    assert len(files) == 12
    contents = [{(tmp_path / n / file).read_bytes() for file in files} for n in "abc"]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 12
    assert not contents[0] & contents[2]


def test_existing_clips_are_kept(tmp_path, capsys):
    options = ("--train-clips", 1, "--val-clips", 1, "--num-frames", 4)
    run(tmp_path, *options)
    file = tmp_path / "val" / "move_up" / "move_up_000.mp4"
    content = file.read_bytes()
    file.unlink()
    (file.parent / f".{file.name}.1.part").write_text("half")
    capsys.readouterr()
    assert run(tmp_path, *options) == 0
    assert "1 clips written, 11 already there" in capsys.readouterr().out
    assert file.read_bytes() == content
    assert list(file.parent.iterdir()) == [file]
    run(tmp_path, *options, "--seed", 1)
    assert "12 clips written, 0 already there" in capsys.readouterr().out
    assert file.read_bytes() != content


def test_invalid_arguments(tmp_path, capsys):
    assert run(tmp_path, "--seed", -1) == 2
    assert "the seed must be 0 or more, not -1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, "--train-clips", 0)
    assert "0 is not between 1 and" in capsys.readouterr().err
