"""How files become frames and their times: those that a player shows.

decord returns wrong frames, without a word, for open GOPs, hidden packets, transport streams and
more. So a clip's packets are read first, and one frame: they tell what is shown and when, and
whether decord reads it rightly. PyAV reads all others; where its frames are not those that the
packets promised, it decodes from the start and counts. Pixel aspect ratio, interlacing and a clip's
alpha are left alone.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, chain, tee
from pathlib import Path
from typing import NamedTuple

import av           # before decord, whose older libvpx and libx264 would answer PyAV's calls
import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

DECORD = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")   # H.264 in these
STORE_TIMES = (*DECORD, "flv", "mpegts", "mpeg")        # others: times of decoding, or none
ANIMATED = ("AVIF", "FLI", "GIF", "PNG", "WEBP")        # a TIFF of many pages is no clip
HEIF = (b"heic", b"heix", b"mif1")                      # Pillow reads none, FFmpeg a part of it
UPRIGHT = {                     # by EXIF's orientation (exif_transpose fails on untidy EXIF)
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90}
DAMAGED = (MemoryError, OSError, OverflowError, RuntimeError, SyntaxError, ValueError,
           Image.DecompressionBombError)                # what Pillow raises, by its fuzzer and ours


class FramesDiffer(ValueError):
    """What a reader decodes is not what was expected of it."""


# ---------------------------------------------------------------------------------------- pictures
def is_picture(path: Path) -> bool:
    """Whether a file is one still picture, by its content. OSError if it cannot be opened."""
    try:
        with Image.open(path) as image:                 # which knows MPEG, but does not read it
            return image.format != "MPEG" and not (image.format in ANIMATED and image.is_animated)
    except UnidentifiedImageError:
        with open(path, "rb") as file:
            return file.read(12)[8:] in HEIF
    except DAMAGED:                                     # `read_image` will say how
        return True


def read_image(path: Path) -> np.ndarray:
    """(1, H, W, 3) uint8: upright, the upper 8 of 16 bits, what is transparent on white.
    ValueError where there is no such picture."""
    try:
        with Image.open(path) as image:
            image.load()                                # here a TIFF turns itself
            kind, way = image.format, UPRIGHT.get(image.getexif().get(274))
            image = image if way is None else image.transpose(way)
            if image.mode == "F" or image.mode == "I" and kind not in ("PNG", "PPM"):
                raise ValueError(f"{kind} of 32 bits a pixel does not say how bright white is")
            if image.mode.startswith("I"):              # convert("RGB") would clip it to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))[None]
    except DAMAGED as error:
        raise ValueError(str(error) or type(error).__name__) from None


# ----------------------------------------------------------------------------------------- packets
class Packet(NamedTuple):
    time: int | None                    # when its frame is shown, in the clip's units
    length: int                         # how long; 0: unknown
    key: bool                           # decoding can begin here
    hidden: bool                        # the file cuts it away
    damaged: bool
    idr: bool                           # decoding is known to begin anew here


@dataclass
class Clip:
    path: Path
    codec: str
    container: str
    unit: Fraction                      # seconds
    rate: Fraction                      # frames a second, as the container says or FFmpeg guesses
    packets: list[Packet]               # in decoding order
    first: av.VideoFrame                # that the decoder returns

    def expected_times(self) -> list[int]:
        """The times of the frames shown, as the packets tell; empty where that is not sure."""
        if self.container not in STORE_TIMES and (self.container, self.codec) != ("avi", "mpeg4"):
            return []                                   # (of MPEG-4, FFmpeg finds out the order)
        first = self.first.pts                          # leading pictures of nothing are not shown
        whole = self.packets[:-1] if self.packets[-1].damaged else self.packets     # a cut download
        if first is None or any(p.time is None or p.damaged for p in whole):
            return []
        times = sorted(p.time for p in whole if not p.hidden and p.time >= first)
        return times if len(set(times)) == len(times) else []

    def suits_decord(self, times: list[int]) -> bool:
        """Whether decord is known to read it rightly: H.264 (of others, damaged, it shows wrong
        frames), all packets shown, and none of them before a key frame that is decoded earlier."""
        packets, first = self.packets, self.first.pts
        if self.container not in DECORD or len(times) != len(packets) or not packets[0].key:
            return False
        if first < 0 or any(orientation_of(self.first)) or any(p.key > p.idr for p in packets):
            return False
        begun = accumulate((p.time if p.key else first for p in packets), max)
        return all(packet.time >= key for packet, key in zip(packets, begun))

    def timing(self, times: list[int | None]) -> tuple[list[float], Fraction]:
        """(each frame's seconds after the first, the duration) of frames shown at these times."""
        n, known = len(times), sorted(set(times) - {None})
        if len(known) < n:                              # some have none, or another's
            return [float(i / self.rate) for i in range(n)], n / self.rate
        span = (known[-1] - known[0]) * self.unit
        last = max((p.length for p in self.packets if p.time == known[-1]), default=0) * self.unit
        duration = span + (last or span / max(1, n - 1) or 1 / self.rate)
        if abs(duration - n / self.rate) <= 2 * self.unit:      # only rounded to units of 1 ms
            duration = n / self.rate
        return [float((time - known[0]) * self.unit) for time in known], duration


# ---------------------------------------------------------------------------------------- decoding
@contextmanager
def opened(path: Path) -> Iterator[tuple]:
    """A file's container and its video stream. ValueError if it has none that can be decoded."""
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise ValueError("no video of a codec that FFmpeg decodes")
        stream.codec_context.thread_count = 1
        yield container, stream


def packets_of(container, stream) -> Iterator:
    """All of a stream, up to damage of the file. (PyAV's demux ends with an IndexError where
    another stream begins late.)"""
    with suppress(av.error.InvalidDataError, IndexError):
        yield from (packet for packet in container.demux(stream) if packet.size)


def decoded(stream, packets: Iterable) -> Iterator:
    """The frames of packets, and those that the decoder holds then. A damaged one shows nothing."""
    for packet in chain(packets, [None]):
        with suppress(av.error.InvalidDataError, av.error.ArgumentError):
            yield from stream.codec_context.decode(packet)


def in_order(path: Path) -> Iterator:
    with opened(path) as (container, stream):
        yield from decoded(stream, packets_of(container, stream))


def read_packets(path: Path) -> Clip:
    with opened(path) as (container, stream):
        codec = stream.codec_context.codec.canonical_name
        feed, ahead = tee(packets_of(container, stream))
        first = next(decoded(stream, ahead), None)
        if first is None:
            raise ValueError(f"{codec}: no frame can be decoded")
        del ahead                                       # for which all packets would be kept
        packets = [Packet(p.pts, max(p.duration or 0, 0), p.is_keyframe, p.is_discard, p.is_corrupt,
                          codec == "h264" and p.is_keyframe and has_idr(p, stream)) for p in feed]
        rate = stream.guessed_rate or stream.average_rate or Fraction(25)
        return Clip(path, codec, container.format.name, stream.time_base, rate, packets, first)


def has_idr(packet, stream) -> bool:
    """Whether an H.264 packet holds an IDR picture (NAL unit type 5), where decoding begins anew.
    Key frames of open GOPs and of intra refresh hold none."""
    data, setup, at = memoryview(packet), stream.codec_context.extradata or b"", 0
    if len(setup) < 5 or setup[0] != 1:                 # not in the form of mp4 and Matroska
        return False
    size = (setup[4] & 3) + 1                           # bytes of each unit's length
    while at + size < len(data) and data[at + size] & 31 != 5:
        at += size + int.from_bytes(data[at:at + size])
    return at + size < len(data)


def orientation_of(frame) -> tuple[bool, bool, bool]:
    """What makes a frame upright: (rows become columns, then rows flip, columns flip). A display
    matrix moves a pixel from (x, y) to (a x + c y, b x + d y)."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5] if matrix else (1, 0, 0, 0, 1)
    except ValueError:                                  # beside side data that PyAV does not know
        turn = 1j ** round(frame.rotation / 90)
        a, b, c, d = turn.real, -turn.imag, turn.imag, turn.real
    across = abs(b) > abs(a)
    return across, (b if across else d) < 0, (c if across else a) < 0


def pixels(frame, clip: Clip) -> np.ndarray:
    """(1, H, W, 3) uint8, upright, of the first frame's size."""
    array = frame.to_ndarray(format="rgb24", width=clip.first.width, height=clip.first.height,
                             threads=1)
    across, rows, columns = orientation_of(frame)
    array = array.swapaxes(0, 1) if across else array
    return array[None, ::-1 if rows else 1, ::-1 if columns else 1]


def by_decord(clip: Clip, times: list[int], indices: list[int]) -> Iterator[np.ndarray]:
    """Frame by frame, since a batch would take twice the memory."""
    import decord                                       # half a second, which not all need wait
    decord.logging.set_level(decord.logging.QUIET)
    keys = [i for i, packet in enumerate(clip.packets) if packet.key]
    try:
        reader = decord.VideoReader(str(clip.path), num_threads=1)
        if len(reader) != len(times) or reader.get_key_indices() != keys:
            raise FramesDiffer
        for index in indices:
            yield reader[index].asnumpy()[None]
    except (decord.DECORDError, RuntimeError, AssertionError, StopIteration) as error:
        raise FramesDiffer(error) from None


def by_groups(clip: Clip, times: list[int], indices: list[int]) -> Iterator[np.ndarray]:
    """Reads all packets, so needs no seek, but decodes only from the key frame before each frame
    wanted. FramesDiffer if a frame on the way is not the next of `times`."""
    keys = sorted((p.time, i) for i, p in enumerate(clip.packets) if p.key and not p.damaged)
    fed = place = -1

    def packets_from(start: int) -> Iterator:
        nonlocal fed
        for fed, packet in numbered:
            if fed >= start:
                yield packet

    with opened(clip.path) as (container, stream):
        numbered = enumerate(packets_of(container, stream))
        for index in indices:
            group = bisect_right(keys, (times[index], len(clip.packets))) - 1
            if group < 0:
                raise FramesDiffer
            if keys[group][1] > fed:                    # a group that is not begun yet
                begins, start = keys[group]
                stream.codec_context.flush_buffers()
                frames, place = decoded(stream, packets_from(start)), bisect_left(times, begins)
            while place <= index:
                frame = next(frames, None)
                if (frame is None or frame.pts != times[place]
                        or frame.pts == begins and not frame.key_frame):
                    raise FramesDiffer
                place += 1
            yield pixels(frame, clip)
        if place == len(times) and next(frames, None):
            raise FramesDiffer                                # more than the packets promised


def by_counting(clip: Clip, times: list, indices: list[int]) -> Iterator[np.ndarray]:
    wanted = set(indices)
    yield from (pixels(frame, clip) for i, frame in enumerate(in_order(clip.path)) if i in wanted)


def ways_to_read(clip: Clip) -> Iterator[tuple]:
    """(times of the frames shown, how to read some of them), from the quickest to the surest."""
    times = clip.expected_times()
    if clip.suits_decord(times):
        yield times, by_decord
    if times:
        yield times, by_groups
    yield [frame.pts for frame in in_order(clip.path)], by_counting


def read_clip(path: Path, choose: Callable, keep: Callable) -> tuple[list, list[float], float]:
    """(what is kept of some frames, their seconds after the first, the duration). ValueError, with
    the codec, if none can be shown. choose(number of frames, frames a second) -> indices;
    keep(frames (k, H, W, 3) uint8, number of indices) -> what is kept of frames as they come."""
    codec = "no clip that FFmpeg knows"
    try:
        clip = read_packets(path)
        codec = clip.codec
        for times, way in ways_to_read(clip):
            seconds, duration = clip.timing(times)
            indices = choose(len(times), len(times) / duration)
            with suppress(FramesDiffer):
                frames = [keep(some, len(indices)) for some in way(clip, times, indices)]
                return frames, [seconds[index] for index in indices], float(duration)
    except (av.FFmpegError, MemoryError) as error:
        raise ValueError(f"{codec}: {getattr(error, 'strerror', error)}") from None
