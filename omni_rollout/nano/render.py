"""What the nano model learns to draw: one short text in one colour on a light sign. Pillow only, no system fonts."""

import functools
import hashlib
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 64
"""Height and width of every image, in pixels."""

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (210, 15, 30),
    "green": (0, 125, 35),
    "blue": (15, 50, 215),
    "orange": (235, 115, 0),
    "purple": (140, 15, 165),
    "black": (10, 10, 10),
}
"""Colour word -> RGB. Saturated and darker than the background: the VAE must keep them, OCR must read them."""

DIGITS = tuple("0123456789")
WORDS = ("cat", "dog", "sun", "hat", "box", "key", "pen", "bus")
NUMBERS = tuple(f"{value:02d}" for value in range(100))
HELD_OUT = tuple(f"{tens}{(3 * tens + 4) % 10}" for tens in range(10)) + tuple(
    f"{tens}{(7 * tens + 9) % 10}" for tens in range(0, 10, 2)
)
"""Two-digit numbers no training image and no training prompt shows. Every digit stays trained in both positions."""
TRAIN_NUMBERS = tuple(number for number in NUMBERS if number not in HELD_OUT)

STROKE_WIDTH = 1


@dataclass(frozen=True)
class Sign:
    """One image, fully described: drawing it twice gives the same bytes."""

    text: str
    color: str
    """Key of `COLORS`."""
    background: tuple[int, int, int]
    font_size: int
    shift: tuple[int, int]
    """Offset of the text's centre from the image's centre, in pixels (right, down)."""


def prompt_for(text: str, color: str) -> str:
    article = "an" if color[0] in "aeiou" else "a"
    return f'{article} {color} sign that says "{text}"'


@functools.cache
def typeface(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError(
            "Pillow was built without FreeType, so its scalable font is missing; install a Pillow wheel from PyPI."
        )
    # Raqm is optional in Pillow builds and kerns differently: the basic layout is the one every build has.
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


def sample_text(rng: random.Random) -> str:
    """What training images say: eight of ten a two-digit number, the rest one digit or a word of the list."""
    return rng.choice(rng.choices((TRAIN_NUMBERS, DIGITS, WORDS), weights=(8, 1, 1))[0])


def sample_sign(rng: random.Random, text: str, color: str) -> Sign:
    """Vary what a prompt leaves open: background, size and place."""
    low, high = (34, 40) if len(text) <= 2 else (25, 28)
    level = rng.randint(226, 250)
    background = (level + rng.randint(-5, 5), level + rng.randint(-5, 5), level + rng.randint(-5, 5))
    font_size = rng.randint(low, high)
    left, top, right, bottom = typeface(font_size).getbbox(text, anchor="mm", stroke_width=STROKE_WIDTH)
    room_x = max(0, min(4, int(IMAGE_SIZE - (right - left)) // 2 - 2))
    room_y = max(0, min(6, int(IMAGE_SIZE - (bottom - top)) // 2 - 2))
    shift = (rng.randint(-room_x, room_x), rng.randint(-room_y, room_y))
    return Sign(text=text, color=color, background=background, font_size=font_size, shift=shift)


def draw(sign: Sign) -> np.ndarray:
    """uint8 RGB image, shape (IMAGE_SIZE, IMAGE_SIZE, 3)."""
    font = typeface(sign.font_size)
    left, top, right, bottom = font.getbbox(sign.text, anchor="mm", stroke_width=STROKE_WIDTH)
    middle = IMAGE_SIZE // 2
    corner = (middle + sign.shift[0] - round((left + right) / 2), middle + sign.shift[1] - round((top + bottom) / 2))
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), sign.background)
    ImageDraw.Draw(image).text(corner, sign.text, font=font, fill=COLORS[sign.color], anchor="mm", stroke_width=STROKE_WIDTH)
    return np.asarray(image)


def glyph_color(image: np.ndarray) -> np.ndarray:
    """Mean RGB (float, 0 to 255) of the text of one uint8 RGB image, whoever drew it.

    Text is what differs from the border's median colour by more than 0.7 of the largest difference in the image.
    """
    pixels = image.astype(np.float64)
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3)])
    distance = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1)
    return pixels[distance >= 0.7 * distance.max()].mean(axis=0)


def nearest_color(rgb: np.ndarray) -> str:
    """The colour word of `COLORS` closest to one RGB value in 0 to 255."""
    return min(COLORS, key=lambda name: float(np.linalg.norm(rgb - np.array(COLORS[name]))))


def digest() -> str:
    """Short hash of what the renderer draws, to recognise results made with another font, palette or list of texts."""
    rng = random.Random(0)
    digest = hashlib.sha256(repr((COLORS, WORDS, HELD_OUT)).encode())
    for text in (*TRAIN_NUMBERS, *DIGITS, *WORDS):
        digest.update(draw(sample_sign(rng, text, rng.choice(list(COLORS)))).tobytes())
    return digest.hexdigest()[:16]
