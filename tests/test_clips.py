"""Files of clips and pictures, made here: frame i carries the number i in ten bars of black and
white, so what is read is compared with numbers, and with PyAV read frame by frame."""

import re
import struct
import zlib
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import av
import decord
import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (
    BadRecord, Limits, check_record, frame_indices, load_media, read_image, read_video)
from engine import clips, families
from lab import cold_start, toy
from prompt import Vision, fit

RATE, WIDTH, HEIGHT = 30, 168, 56


# ------------------------------------------------------------------------------------ making clips
def picture(number, width=WIDTH, height=HEIGHT):
    frame = np.full((height, width, 3), (90, 60, 40), np.uint8)
    for bit in range(10):
        frame[:height // 2, bit * width // 10:] = 255 * (number >> bit & 1)
    return frame


def number_in(frame):
    height, bar = frame.shape[0], frame.shape[1] / 10
    rows = slice(int(height * 0.12), int(height * 0.38))
    bars = [frame[rows, int((bit + 0.3) * bar):int((bit + 0.7) * bar)] for bit in range(10)]
    return sum(int(bar.mean() > 127) << bit for bit, bar in enumerate(bars))


def write_clip(path, codec="libx264", n=45, times=None, kind=None, pixels="yuv420p", gop=12,
               b_frames=None, turn=None, container=None, **options):
    """n frames at `times` (in 1/30 s; 0, 1, 2 .. unless given). turn: (degrees, mirrored)."""
    with av.open(str(path), "w", format=kind, options=container or {}) as file:
        stream = file.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, RATE)
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        if turn:
            stream.set_display_rotation(turn[0], hflip=turn[1])
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(picture(i))
            frame = frame.reformat(WIDTH, HEIGHT, pixels)
            frame.pts, frame.time_base = times[i] if times else i, Fraction(1, RATE)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def cut(source, path, start):
    """Without encoding: from the key frame before `start` seconds, which becomes time 0."""
    with av.open(str(source)) as file, av.open(str(path), "w") as out:
        stream = file.streams.video[0]
        copy, zero = out.add_stream_from_template(stream), int(start / stream.time_base)
        file.seek(zero, stream=stream)
        for packet in file.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - zero, packet.dts - zero, copy
                out.mux(packet)
    return path


def shown(path):
    """[(number, seconds after the first)] of all frames, by PyAV in order; damage is left out."""
    found = []
    with av.open(str(path)) as file:
        stream = file.streams.best("video")
        for packet in file.demux(stream):
            try:
                found += packet.decode()
            except av.error.InvalidDataError:
                pass
        return [(number_in(frame.to_ndarray(format="rgb24")), None if frame.pts is None else
                 float((frame.pts - found[0].pts) * stream.time_base)) for frame in found]


@pytest.fixture
def ways(monkeypatch):
    """The names of the ways in which clips were read, in turn."""
    taken = []

    def noting(clip):
        for times, way in ways_to_read(clip):
            taken.append(way.__name__)
            yield times, way

    ways_to_read = clips.ways_to_read
    monkeypatch.setattr(clips, "ways_to_read", noting)
    return taken


def spread(n, total):
    return torch.linspace(0, total - 1, n).round().long().tolist()


def check(path, numbers, timed=True):
    """A few frames and all of them are the right ones, and so are their times."""
    truth = shown(path)
    assert [number for number, _ in truth] == numbers
    for most in (2, 8, 64):
        frames, seconds = read_video(path, most, sample_fps=1000, stamped=True)
        places = frame_indices(len(numbers), 1, most)
        assert [number_in(frame) for frame in frames] == [numbers[i] for i in places]
        assert not timed or seconds == [truth[i][1] for i in places]


# ------------------------------------------------------------------------------------------- clips
X264, X265 = "preset=ultrafast:scenecut=0", "log-level=none:keyint=12:min-keyint=12"
OPEN, CLOSED = {"x264-params": f"{X264}:open-gop=1"}, {"x264-params": X264}
HEVC = {"codec": "libx265", "preset": "ultrafast"}
VP9 = {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": "8", "lag-in-frames": "8"}
DECORD, GROUPS, COUNTING = "by_decord", "by_groups", "by_counting"


@pytest.mark.parametrize("name, way, made", [
    ("a.mp4", DECORD, CLOSED | {"b_frames": 0}),
    ("a.mp4", DECORD, CLOSED | {"b_frames": 3}),
    ("a.mkv", DECORD, CLOSED | {"b_frames": 3, "gop": 250}),
    ("a.mov", DECORD, CLOSED | {"b_frames": 0, "gop": 1}),
    ("a.mp4", DECORD, CLOSED | {"b_frames": 2, "container": {"movflags": "frag_keyframe"}}),
    ("a.mp4", GROUPS, OPEN | {"b_frames": 3}),
    ("a.mkv", GROUPS, OPEN | {"b_frames": 3}),
    ("a.ts", GROUPS, OPEN | {"b_frames": 3}),
    ("a.ts", GROUPS, CLOSED | {"b_frames": 0}),
    ("a.flv", GROUPS, CLOSED | {"b_frames": 2}),
    ("a.avi", COUNTING, CLOSED | {"b_frames": 3}),      # their times are those of decoding
    ("a.h264", COUNTING, CLOSED | {"b_frames": 3}),     # without any times
    ("a.mkv", GROUPS, HEVC | {"x265-params": X265}),    # open GOPs are its default
    ("a.mp4", GROUPS, HEVC | {"x265-params": f"{X265}:open-gop=0", "pixels": "yuv420p10le"}),
    ("a.webm", GROUPS, VP9),
    ("a.webm", GROUPS, VP9 | {"container": {"live": "1"}}),                 # without a duration
    ("a.webm", GROUPS, VP9 | {"n": 1}),
    ("a.mkv", GROUPS, {"codec": "libvpx", "deadline": "realtime", "lag-in-frames": "8"}),
    ("a.mp4", GROUPS, {"codec": "libsvtav1", "preset": "12"}),
    ("a.ivf", COUNTING, {"codec": "libsvtav1", "preset": "12"}),
    ("a.avi", GROUPS, {"codec": "mpeg4", "b_frames": 2}),
    ("a.mp4", GROUPS, {"codec": "mpeg4", "b_frames": 2}),
    ("a.mpg", GROUPS, {"codec": "mpeg1video", "b_frames": 2}),
    ("a.mpg", GROUPS, {"codec": "mpeg2video", "b_frames": 0, "kind": "vob"}),
    ("a.ts", GROUPS, {"codec": "mpeg2video", "b_frames": 2}),
    ("a.wmv", COUNTING, {"codec": "wmv2"}),
    ("a.flv", GROUPS, {"codec": "flv"}),
    ("a.mov", GROUPS, {"codec": "mjpeg", "pixels": "yuvj420p"}),
    ("a.mov", GROUPS, {"codec": "prores_ks", "pixels": "yuv422p10le"}),
    ("a.gif", COUNTING, {"codec": "gif", "pixels": "rgb8"}),
    ("a.png", COUNTING, {"codec": "apng", "pixels": "rgb24", "kind": "apng"}),
    ("a.mp4", DECORD, CLOSED | {"n": 1}), ("a.mkv", DECORD, CLOSED | {"n": 2}),
    ("a.mp4", DECORD, CLOSED | {"pixels": "gray"}),
    ("a.mp4", DECORD, CLOSED | {"pixels": "yuv444p"}),
])
def test_the_frames_are_those_that_a_player_shows(tmp_path, ways, name, way, made):
    path = write_clip(tmp_path / name, **made)
    in_avi = name == "a.avi" and way == COUNTING        # PyAV's own times are in disorder there
    check(path, list(range(made.get("n", 45))), timed=not in_avi and name != "a.h264")
    assert ways == [way] * 3
    _, seconds = read_video(path, 45, 1000, stamped=True)
    assert seconds == pytest.approx([i / RATE for i in spread(len(seconds), made.get("n", 45))],
                                    abs=0.01 if way == COUNTING else 0.002)     # a GIF's, in 1/100


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize("made", [CLOSED, OPEN])
def test_a_clip_cut_without_encoding(tmp_path, ways, name, made):
    """From 0.9 s. An mp4 hides what comes before it; open GOPs begin with pictures of nothing."""
    source = tmp_path / ("whole.ts" if name == "a.ts" else "whole.mp4")
    write_clip(source, b_frames=3, **made)
    path = cut(source, tmp_path / name, 0.9)
    numbers = [number for number, _ in shown(path)]
    assert numbers == list(range(numbers[0], 45)) and 12 <= numbers[0] <= 36
    check(path, numbers)
    quick = DECORD if made is CLOSED else COUNTING      # those of nothing lost their times in mkv
    assert ways == [quick if name == "a.mkv" else GROUPS] * 3


def test_an_end_that_the_file_hides(tmp_path, ways):
    """An edit list of one second; decord would show all frames."""
    path = write_clip(tmp_path / "a.mp4", b_frames=2, **CLOSED)
    content = path.read_bytes()
    place = content.index(b"elst") + 12                 # after the version, flags and number
    path.write_bytes(content[:place] + struct.pack(">I", 1000) + content[place + 4:])
    numbers = [number for number, _ in shown(path)]
    assert 28 < len(numbers) < 32
    check(path, numbers)
    assert ways == [GROUPS] * 3


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi", "a.mpg"])
def test_a_file_that_ends_early_shows_what_it_has(tmp_path, ways, name):
    made = {"avi": {"codec": "mpeg4"}, "mpg": {"codec": "mpeg1video"}}.get(name[2:], CLOSED)
    extra = {"container": {"movflags": "faststart"}} if name == "a.mp4" else {}
    path = write_clip(tmp_path / name, b_frames=2, **made, **extra)
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 7 // 10])
    numbers = [number for number, _ in shown(path)]
    assert 15 < len(numbers) < 45
    check(path, numbers)
    if name == "a.mp4":                                 # a cut packet at its end: none is shown
        assert ways == [GROUPS] * 3


@pytest.mark.parametrize("gop, place", [(5, 28), (45, 20)])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.flv"])
def test_damage_inside_is_left_out(tmp_path, ways, name, gop, place):
    """A packet that shows nothing: where frames are missing, all are counted."""
    path = write_clip(tmp_path / name, b_frames=0, gop=gop, **CLOSED)
    with av.open(str(path)) as file:
        packet = bytes([packet for packet in file.demux(video=0)][place])
    content = path.read_bytes()
    assert content.count(packet) == 1
    path.write_bytes(content.replace(packet, packet[:4] + b"\xff" * (len(packet) - 4)))
    numbers = [number for number, _ in shown(path)]
    assert len(numbers) == 44
    for most in (4, 44):
        frames, _ = read_video(path, most, 1000)
        assert [number_in(frame) for frame in frames] == [numbers[i] for i in spread(most, 44)]
        assert ways[-1] == COUNTING


def test_damage_in_a_stream(tmp_path, ways):
    """A packet that FFmpeg knows to be damaged, and whose frame it shows all the same."""
    path = write_clip(tmp_path / "a.ts", b_frames=2, gop=45, **CLOSED)
    content, place = path.read_bytes(), 30 * 188
    while not any(packet.damaged for packet in clips.read_packets(path).packets):
        place += 188
        path.write_bytes(content[:place] + content[place + 188:])
    numbers = [number for number, _ in shown(path)]
    frames, _ = read_video(path, 44, 1000)
    assert [number_in(frame) for frame in frames] == numbers and ways == [COUNTING]


def test_a_stream_that_changes_its_size(tmp_path, monkeypatch):
    """Which a player shows in one window."""
    parts = [write_clip(tmp_path / "a.h264", n=4, **CLOSED).read_bytes()]
    monkeypatch.setitem(globals(), "WIDTH", 336)
    parts.append(write_clip(tmp_path / "a.h264", n=4, **CLOSED).read_bytes())
    (tmp_path / "a.h264").write_bytes(b"".join(parts))
    frames, _ = read_video(tmp_path / "a.h264", 8, 1000)
    assert frames.shape == (8, HEIGHT, 168, 3)
    assert [number_in(frame) for frame in frames] == [0, 1, 2, 3] * 2


def test_a_stream_that_begins_late():
    """PyAV's demux, after the last packet, looks for it among those of the beginning."""
    class Late:
        size = 1

        def demux(self, stream):
            yield self
            raise IndexError

    assert len(list(clips.packets_of(Late(), None))) == 1


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_key_frames_where_decoding_cannot_begin(tmp_path, ways, name):
    """Intra refresh: marked as key frames, they are shown only after some more frames."""
    options = {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}
    check(write_clip(tmp_path / name, **options), list(range(45)))
    assert ways == [GROUPS, COUNTING] * 3


def test_packets_that_are_not_those_of_a_closed_clip(tmp_path):
    """By their times alone: one after a key frame is shown before it, or the first before 0."""
    clip = clips.read_packets(write_clip(tmp_path / "a.mp4", b_frames=0, **CLOSED))
    packets, times = clip.packets, clip.expected_times()
    assert clip.suits_decord(times)
    exchanged = [*packets]
    for i, j in ((12, 13), (13, 12)):                       # of a key frame and the next
        exchanged[i] = packets[i]._replace(time=packets[j].time)
    late = [packet._replace(key=i > 0 and packet.key) for i, packet in enumerate(packets)]
    for other in (exchanged, late):
        assert not replace(clip, packets=other).suits_decord(times)
    clip.first.pts = -1
    assert not clip.suits_decord(times)


@pytest.mark.parametrize("made", [CLOSED, {"codec": "mpeg4"}])
def test_a_container_that_does_not_know_its_key_frames(tmp_path, made):
    path = write_clip(tmp_path / "a.mp4", b_frames=0, **made)
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))
    check(path, list(range(45)))


TURNED = {(0, False): "RGBW", (90, False): "GWRB", (180, False): "WBGR", (-90, False): "BRWG",
          (0, True): "GRWB"}                            # corners of the upright picture, row by row


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize("turn", TURNED)
def test_a_clip_filmed_on_its_side_is_upright(tmp_path, monkeypatch, name, turn):
    colours = {"R": (250, 0, 0), "G": (0, 250, 0), "B": (0, 0, 250), "W": (250, 250, 250)}
    corners = np.array([colours[c] for c in "RGBW"], np.uint8).reshape(2, 2, 3)
    image = corners.repeat(HEIGHT // 2, 0).repeat(WIDTH // 2, 1)
    monkeypatch.setitem(globals(), "picture", lambda number: image)
    frames, _ = read_video(write_clip(tmp_path / name, n=6, turn=turn, **CLOSED))
    _, height, width, _ = frames.shape
    assert (height, width) == ((WIDTH, HEIGHT) if turn[0] in (90, -90) else (HEIGHT, WIDTH))
    seen = [frames[-1, y, x] for y in (height // 4, 3 * height // 4)
            for x in (width // 4, 3 * width // 4)]
    nearest = [min(colours, key=lambda c: np.abs(colours[c] - p.astype(int)).sum()) for p in seen]
    assert "".join(nearest) == TURNED[turn]


def test_a_matrix_beside_side_data_that_pyav_does_not_know(tmp_path):
    """Cameras' motion JPEG: every frame a photo with EXIF."""
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(picture(5)).save(tmp_path / "a.jpg", exif=exif)
    with av.open(str(tmp_path / "a.mov"), "w") as file:
        stream = file.add_stream("mjpeg", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        for i in range(4):
            packet = av.Packet((tmp_path / "a.jpg").read_bytes())
            packet.pts, packet.dts, packet.time_base = i, i, Fraction(1, RATE)
            packet.stream, packet.is_keyframe = stream, True
            file.mux(packet)
    frames, _ = read_video(tmp_path / "a.mov")
    assert frames.shape == (4, WIDTH, HEIGHT, 3)
    assert number_in(np.rot90(frames[0])) == 5


# ------------------------------------------------------------------------------------------- times
VARIABLE = [*range(30), *range(30, 480, 30)]            # 30 frames in a second, then one a second


def record_of(name, kind="video"):
    return check_record({"problem": "?", "data_type": kind, "problem_type": "numerical",
                         "solution": "<answer>1</answer>", "path": name}, 0)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.flv"])
@pytest.mark.parametrize("start", [0, 75])
def test_times_of_a_clip_of_variable_rate_are_its_own(tmp_path, name, start):
    """From its first frame, wherever the file lets it begin."""
    times = [start + time for time in VARIABLE]
    path = write_clip(tmp_path / name, times=times, gop=10, b_frames=2, **CLOSED)
    frames, seconds = read_video(path, 8, 1000, stamped=True)
    places = spread(8, 45)
    assert [number_in(frame) for frame in frames] == places
    want = [VARIABLE[i] / RATE for i in places]
    assert seconds == pytest.approx(want, abs=0.0011)
    _, apart = read_video(path, 8, 1000)
    assert apart * 8 == pytest.approx(15, abs=1.05)         # the last one's length is unsure
    assert len(read_video(path, 64, sample_fps=1)[0]) == pytest.approx(15, abs=1)
    record, processor = record_of(name), cold_start.new_model("cpu", "qwen3")[1]
    media = load_media(record, tmp_path, Limits(max_frames=8, sample_fps=1000), processor.vision)
    assert media[1] == seconds
    said = families.stamp("<|vision_start|><|video_pad|><|vision_end|>", 8, 2, seconds)
    assert [float(time) for time in re.findall(r"<([\d.]+) seconds>", said)] == pytest.approx(
        [(a + b) / 2 for a, b in zip(want[::2], want[1::2])], abs=0.051)
    prompt = processor.prompt(record, *media)
    assert prompt.seconds == pytest.approx(2 * want[-1] / 7, abs=0.001)


@pytest.mark.parametrize("name, rate, n", [
    ("a.mkv", 24, 96), ("a.webm", 12, 36), ("a.flv", 30, 60), ("a.mp4", 24, 48)])
def test_whole_seconds_are_not_lost_to_units_of_a_millisecond(
        tmp_path, monkeypatch, name, rate, n):
    monkeypatch.setitem(globals(), "RATE", rate)
    made = VP9 if name == "a.webm" else CLOSED
    frames, apart = read_video(write_clip(tmp_path / name, n=n, **made))
    assert len(frames) == max(4, 2 * n // rate // 2 * 2) and apart * len(frames) == n / rate


# ----------------------------------------------------------------------- what is read, and how much
def test_only_groups_that_are_wanted_are_decoded(tmp_path, ways, monkeypatch):
    path = write_clip(tmp_path / "a.ts", n=300, gop=10, b_frames=2, **CLOSED)
    count, decoded = Counter(), clips.decoded

    def counting(*a):
        for frame in decoded(*a):
            count["frames"] += 1
            yield frame

    monkeypatch.setattr(clips, "decoded", counting)
    frames, _ = read_video(path, 4, 1000)
    assert [number_in(frame) for frame in frames] == [0, 100, 199, 299]
    assert ways == [GROUPS] and count["frames"] < 40


def test_frames_are_resized_as_they_come_and_as_all_at_once(tmp_path):
    """Equal to the bit; and never are all of them held before they are small."""
    for name, made in (("a.mp4", CLOSED), ("b.mp4", OPEN | {"b_frames": 3})):
        path, held = write_clip(tmp_path / name, **made), []
        whole = fit(read_video(path, 16, 1000)[0], 10000, Vision())
        limits = Limits(sample_fps=1000, max_pixels=10000)
        assert torch.equal(load_media(record_of(name), tmp_path, limits)[0], whole)
        read_video(path, 16, 1000, resize=lambda some, n: held.append((len(some), n)) or some)
        assert held == [(1, 16)] * 16


def test_another_reader_takes_over_from_decord(tmp_path, ways, monkeypatch):
    def broken(*_, **__):
        raise decord.DECORDError("no such stream")

    path = write_clip(tmp_path / "a.mp4", b_frames=2, **CLOSED)
    monkeypatch.setattr(decord, "VideoReader", broken)
    check(path, list(range(45)))
    assert ways == [DECORD, GROUPS] * 3


def test_both_readers_give_the_same_pixels(tmp_path):
    path = write_clip(tmp_path / "a.mp4", b_frames=2, **CLOSED)
    clip = clips.read_packets(path)
    one, other = (list(way(clip, clip.expected_times(), [0, 7, 30, 44]))
                  for way in (clips.by_decord, clips.by_groups))
    assert np.array_equal(one, other)


def test_mistakes_in_the_program_are_not_taken_for_damage(tmp_path, monkeypatch):
    def broken(*a):
        raise RuntimeError("a mistake")

    write_clip(tmp_path / "a.mp4", n=4, **CLOSED)
    monkeypatch.setattr(data, "fit", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        load_media(record_of("a.mp4"), tmp_path, Limits())


def test_what_cannot_be_shown_is_one_line_with_its_codec(tmp_path, capfd):
    path = write_clip(tmp_path / "a.mp4", n=3, b_frames=0, **CLOSED)
    content = path.read_bytes()
    with av.open(str(path)) as file:
        packets = [bytes(packet) for packet in file.demux(video=0) if packet.size]
    undecodable = content
    for packet in packets:
        undecodable = undecodable.replace(packet, b"\xff" * len(packet))
    for bad, says in ((undecodable, "h264: no frame can be decoded"), (content[:-900], "FFmpeg"),
                      (b"not a clip", "no clip that FFmpeg knows"), (b"", "FFmpeg")):
        path.write_bytes(bad)
        with pytest.raises(BadRecord, match=f"row 0.*a.mp4: cannot be decoded: .*{says}") as error:
            load_media(record_of("a.mp4"), tmp_path, Limits())
        assert len(str(error.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")


def test_a_clip_without_video(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
    with pytest.raises(BadRecord, match="no video of a codec that FFmpeg decodes"):
        load_media(record_of("a.wav"), tmp_path, Limits())


def test_a_file_that_may_not_be_opened_is_named(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied")

    write_clip(tmp_path / "a.mp4", n=2, **CLOSED)
    monkeypatch.setattr(data, "is_picture", refused)
    with pytest.raises(BadRecord, match="a.mp4: cannot be decoded: .*Permission denied"):
        load_media(record_of("a.mp4"), tmp_path, Limits())


# ---------------------------------------------------------------------------------------- pictures
def corners_of(image):
    return [tuple(int(v > 127) for v in image[0, y, x]) for y in (4, -4) for x in (4, -4)]


@pytest.mark.parametrize("orientation, upright", [
    (1, "RGBW"), (2, "GRWB"), (3, "WBGR"), (4, "BWRG"), (5, "RBGW"), (6, "BRWG"), (7, "WGBR"),
    (8, "GWRB")])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tiff", "a.webp"])
def test_photos_are_upright(tmp_path, orientation, upright, name):
    colours = {"R": (1, 0, 0), "G": (0, 1, 0), "B": (0, 0, 1), "W": (1, 1, 1)}
    corners = np.array([colours[c] for c in "RGBW"], np.uint8).reshape(2, 2, 3) * 250
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(corners.repeat(20, 0).repeat(40, 1)).save(tmp_path / name, exif=exif)
    image = read_image(tmp_path / name)
    assert image.shape == ((1, 40, 80, 3) if orientation < 5 else (1, 80, 40, 3))
    assert corners_of(image) == [colours[c] for c in upright]


def png(path, bits, kind, rows):
    """A PNG of rows of samples; Pillow writes no colours of 16 bits."""
    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    size = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], bits, kind, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size)
                     + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("kind, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits(tmp_path, kind, channels):
    ramp = np.linspace(0, 65535, 80).astype(">u2")[None, :, None].repeat(40, 0)
    rows = ramp.repeat(channels, 2).copy()
    if channels in (2, 4):
        rows[..., -1] = 65535                           # opaque
    png(tmp_path / "a.png", 16, kind, rows)
    assert read_image(tmp_path / "a.png")[0, 0, ::16, 1].tolist() == [0, 51, 103, 155, 207]


def test_sixteen_bits_of_other_formats(tmp_path):
    ramp = np.linspace(0, 65535, 80).astype(np.uint16)[None].repeat(40, 0)
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    (tmp_path / "a.pgm").write_bytes(b"P5\n80 40\n65535\n" + ramp.astype(">u2").tobytes())
    for name in ("a.tiff", "a.pgm"):
        assert read_image(tmp_path / name)[0, 0, ::16, 1].tolist() == [0, 51, 103, 155, 207]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_a_picture_that_does_not_say_what_is_white_is_refused(tmp_path, kind):
    Image.fromarray(np.ones((40, 80), kind)).save(tmp_path / "a.tiff")
    with pytest.raises(BadRecord, match="a.tiff: cannot be decoded: TIFF of 32 bits a pixel"):
        load_media(record_of("a.tiff", "image"), tmp_path, Limits())


@pytest.mark.parametrize("kind", ["image", "video"])
def test_heic_is_no_clip(tmp_path, kind):
    """FFmpeg would show a tile of it."""
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    with pytest.raises(BadRecord, match="a.jpg: cannot be decoded: cannot identify image file"):
        load_media(record_of("a.jpg", kind), tmp_path, Limits())


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF", "JPEG", "PNG", "WEBP", "CMYK"])
@pytest.mark.parametrize("name", ["a.mp4", "a.jfif", "a"])
def test_what_a_file_is_its_content_says(tmp_path, kind, name):
    """A picture under "video" is a clip of one frame, whatever its name."""
    image = Image.fromarray(picture(9)).convert("CMYK" if kind == "CMYK" else "RGB")
    image.save(tmp_path / name, "JPEG" if kind == "CMYK" else kind)
    assert clips.is_picture(tmp_path / name)
    for data_type in ("image", "video"):
        vision = Vision(timestamps=data_type == "video")
        frames, seconds = load_media(record_of(name, data_type), tmp_path, Limits(), vision)
        assert frames.shape[0] == 1 and number_in(frames[0].permute(1, 2, 0).numpy()) == 9
        assert seconds == (1.0 if vision.timestamps else 0.5)


def test_pictures_that_move_are_clips(tmp_path):
    pictures = [Image.fromarray(picture(i)) for i in range(4)]
    for kind in ("GIF", "PNG", "WEBP"):
        pictures[0].save(tmp_path / "a", kind, save_all=True, append_images=pictures[1:])
        assert not clips.is_picture(tmp_path / "a")
        frames, _ = load_media(record_of("a", "image"), tmp_path, Limits())
        assert len(frames) == 1                             # the first
    for kind in ("TIFF", "MPO"):                            # pages, or a photo's depth
        pictures[0].save(tmp_path / "a", kind, save_all=True, append_images=pictures[1:])
        assert clips.is_picture(tmp_path / "a")
    assert not clips.is_picture(write_clip(tmp_path / "a.m2v", "mpeg2video", kind="mpeg2video"))
    toy.write_y4m(tmp_path / "a.y4m", np.zeros((2, 56, 56, 3), np.uint8))
    assert not clips.is_picture(tmp_path / "a.y4m")
