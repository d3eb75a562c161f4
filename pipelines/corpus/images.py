"""What an image file is, from its header: format, size, what is odd about it, or why it is rejected. No pixels decoded.

JPEG: ITU T.81 annex B. PNG: W3C PNG 3rd edition, section 5. WebP: RFC 9649, section 2.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace

__all__ = ["MAX_FILE_BYTES", "MAX_PIXELS", "ImageFacts", "ImageRejected", "inspect_image"]

# The limits of vit_model.preprocess: what is let in here can be read there.
MAX_PIXELS = 100_000_000
MAX_FILE_BYTES = 100 << 20
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# SOF0..SOF15 without DHT (C4), JPG (C8) and DAC (CC).
JPEG_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
# DHT, DQT, DRI, COM, and APP0 with JFIF; EXIF, colour profiles and other pictures stand in the other APPn.
JPEG_PLAIN = frozenset({0xC4, 0xDB, 0xDD, 0xFE})
JPEG_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # Markers without a length: TEM, RST0..7.
OTHERS = (  # (offset, magic, name): images that we know and do not take.
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"8BPS", "Photoshop"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"),
)


class ImageRejected(Exception):
    """An image that goes to quarantine. `reason` is one of quarantine.REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True)
class ImageFacts:
    extension: str  # jpg, png, webp
    width: int  # Pixels as shown, after the EXIF rotation.
    height: int
    notes: tuple[str, ...] = ()  # Of quarantine.NOTES.
    is_plain: bool = field(default=False, compare=False)  # A grey or colour JPEG without EXIF and the like.


def inspect_image(data: bytes) -> ImageFacts:
    """Walk the container. Raises ImageRejected."""
    if not data:
        raise ImageRejected("empty", "0 bytes")
    if len(data) > MAX_FILE_BYTES:
        raise ImageRejected("bomb", f"{len(data):,} bytes, the limit is {MAX_FILE_BYTES:,}")
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data.startswith(PNG_SIGNATURE):
            return _png(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp(data)
    except (struct.error, IndexError):
        raise ImageRejected("truncated", f"the header breaks off, the file has {len(data):,} bytes") from None
    if PNG_SIGNATURE.startswith(data) or b"\xff\xd8\xff".startswith(data):
        raise ImageRejected("truncated", f"the file has {len(data)} bytes")
    for offset, magic, name in OTHERS:
        if data.startswith(magic, offset):
            raise ImageRejected("unsupported_format", f"{name}; convert it to JPEG, PNG or WebP")
    raise ImageRejected("not_an_image", f"begins with {data[:8].hex(' ')}")


def _facts(extension: str, width: int, height: int, orientation: int, notes: list[str]) -> ImageFacts:
    if width == 0 or height == 0:
        raise ImageRejected("zero_size", f"{width}x{height}")
    if width * height > MAX_PIXELS:
        raise ImageRejected("bomb", f"{width}x{height} is {width * height:,} pixels, the limit is {MAX_PIXELS:,}")
    if orientation > 1:
        notes.append("exif_rotated")
    if orientation > 4:  # 5..8 turn by 90 degrees.
        width, height = height, width
    return ImageFacts(extension, width, height, tuple(notes))


def _jpeg(data: bytes) -> ImageFacts:
    position, orientation = 2, 1
    frame: tuple[int, int, int, int] | None = None  # precision, height, width, components
    is_plain = True
    while True:
        if data[position] != 0xFF:
            raise ImageRejected("corrupt", f"no JPEG marker at byte {position:,}")
        while data[position] == 0xFF:  # Fill bytes may stand before a marker.
            position += 1
        marker = data[position]
        position += 1
        if marker in JPEG_ALONE:
            continue
        if marker == 0xD9:
            raise ImageRejected("corrupt", "the JPEG ends before its first scan")
        (length,) = struct.unpack_from(">H", data, position)
        if marker in JPEG_FRAMES:
            frame = struct.unpack_from(">BHHB", data, position + 2)
        elif marker == 0xE0:
            is_plain &= length == 16 and data.startswith(b"JFIF\0", position + 2)
        elif marker not in JPEG_PLAIN and marker != 0xDA:
            is_plain = False
        if marker == 0xE1 and data.startswith(b"Exif\0\0", position + 2):
            orientation = _orientation(data[position + 8 : position + length])
        elif marker == 0xDA:
            break
        position += length
    if frame is None:
        raise ImageRejected("corrupt", "a JPEG scan without a frame header")
    # Inside a scan 0xFF is always followed by 0 or a restart marker, so an end marker found here is the real one.
    if data.rfind(b"\xff\xd9", position) < 0:
        raise ImageRejected("truncated", f"no end marker in {len(data):,} bytes")
    precision, height, width, components = frame
    notes = ["cmyk"] if components == 4 else []
    if precision > 8:
        raise ImageRejected("unsupported_format", f"JPEG of {precision} bits a channel; convert it to 8")
    facts = _facts("jpg", width, height, orientation, notes)
    return replace(facts, is_plain=True) if is_plain and components in (1, 3) else facts


def _png(data: bytes) -> ImageFacts:
    position, orientation = 8, 1
    notes: list[str] = []
    width = height = 0
    pixels = 0
    while True:
        length, kind = struct.unpack_from(">I4s", data, position)
        body = position + 8
        if position == 8:
            if kind != b"IHDR":
                raise ImageRejected("corrupt", "the first PNG chunk is not IHDR")
            width, height, depth, colour = struct.unpack_from(">IIBB", data, body)
            if depth == 16:
                notes.append("16bit")
            if colour in (4, 6):
                notes.append("alpha")
        elif kind == b"tRNS" and "alpha" not in notes:
            notes.append("alpha")
        elif kind == b"acTL" and struct.unpack_from(">I", data, body)[0] > 1:
            raise ImageRejected("animated", "an animated PNG")
        elif kind == b"eXIf":
            orientation = _orientation(data[body : body + length])
        elif kind == b"IDAT":
            pixels += length
        position = body + length + 4
        if position > len(data):
            raise ImageRejected("truncated", f"PNG chunk {kind!r} wants {position:,} bytes, the file has {len(data):,}")
        if kind == b"IEND":
            break
    if not pixels:
        raise ImageRejected("corrupt", "a PNG without pixels")
    return _facts("png", width, height, orientation, notes)


def _webp(data: bytes) -> ImageFacts:
    size = struct.unpack_from("<I", data, 4)[0] + 8
    if size > len(data):
        raise ImageRejected("truncated", f"WebP of {size:,} bytes, the file has {len(data):,}")
    notes: list[str] = []
    position, orientation = 12, 1
    shape: tuple[int, int] | None = None
    while position + 8 <= size:
        kind, length = struct.unpack_from("<4sI", data, position)
        body = position + 8
        if kind == b"VP8X":
            flags = data[body]
            if flags & 0x02:
                raise ImageRejected("animated", "an animated WebP")
            if flags & 0x10:
                notes.append("alpha")
        elif kind == b"VP8 " and shape is None:
            if data[body + 3 : body + 6] != b"\x9d\x01\x2a":
                raise ImageRejected("corrupt", "a WebP without a key frame")
            width, height = struct.unpack_from("<HH", data, body + 6)
            shape = (width & 0x3FFF, height & 0x3FFF)  # The upper two bits are a scale.
        elif kind == b"VP8L" and shape is None:
            bits = struct.unpack_from("<I", data, body + 1)[0]
            shape = ((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
            if bits >> 28 & 1 and "alpha" not in notes:
                notes.append("alpha")
        elif kind == b"EXIF":
            orientation = _orientation(data[body : body + length])
        position = body + length + (length & 1)
    if shape is None:
        raise ImageRejected("corrupt", "a WebP without an image")
    return _facts("webp", *shape, orientation, notes)


def _orientation(exif: bytes) -> int:
    """Tag 0x0112 of the first TIFF directory; 1 (upright) where there is none or the EXIF is broken."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(entries):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * entry)
            if tag == 0x0112:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1
