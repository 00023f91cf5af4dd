"""Draws the six pictures of the workload image6: `python scripts/draw_pictures.py [FOLDER]`; needs Pillow.

All of it is lines, areas and Pillow's own font: nobody else's picture or font. What they show is what the NVLM study
asked about (`compare/questions.py`), the table's numbers and NVIDIA's share as published. Comparisons use the files in
the package: another Pillow may draw a pixel otherwise, and a workload's hash covers pixels.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import PIL
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

FOLDER = Path(__file__).resolve().parents[1] / "src" / "headrace" / "compare" / "pictures"
SCALE = 3
"""Drawn so many times as large, then made smaller: smooth edges."""
INK, WHITE = "#1f2430", "#ffffff"
Point = tuple[float, float]


class Canvas:
    """A picture that is drawn in its own final pixels, which may be fractions."""

    def __init__(self, width: int, height: int, colour: str) -> None:
        self.size = (width, height)
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), colour)
        self._draw = ImageDraw.Draw(self.image)

    def area(self, points: Sequence[Point], fill: str, edge: str | None = None, width: float = 0) -> None:
        """A polygon."""
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.polygon(scaled, fill=fill)
        if edge is not None:
            self.line([*points, points[0], points[1]], edge, width)

    def line(self, points: Sequence[Point], fill: str, width: float = 2) -> None:
        """With round corners and ends."""
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(scaled, fill=fill, width=round(width * SCALE), joint="curve")
        for x, y in (points[0], points[-1]):
            self.disc((x, y), width / 2, fill)

    def disc(self, centre: Point, radius: float, fill: str, edge: str | None = None, width: float = 0) -> None:
        self.oval(centre, radius, radius, fill, edge, width)

    def oval(self, centre: Point, rx: float, ry: float, fill: str, edge: str | None = None, width: float = 0) -> None:
        x, y = centre
        box = [(x - rx) * SCALE, (y - ry) * SCALE, (x + rx) * SCALE, (y + ry) * SCALE]
        self._draw.ellipse(box, fill=fill, outline=edge, width=round(width * SCALE))

    def box(self, left: float, top: float, right: float, bottom: float, fill: str, round_by: float = 0) -> None:
        corners = [left * SCALE, top * SCALE, right * SCALE, bottom * SCALE]
        self._draw.rounded_rectangle(corners, radius=round_by * SCALE, fill=fill)

    def ring(self, centre: Point, outer: float, inner: float, start: float, stop: float, fill: str) -> None:
        """A piece of a ring, clockwise from the top; start and stop in shares of the whole."""
        angles = [start + (stop - start) * step / 240 for step in range(241)]
        far, near = ([_around(centre, radius, angle) for angle in angles] for radius in (outer, inner))
        self.area([*far, *reversed(near)], fill)

    def curve(self, centre: Point, rx: float, ry: float, start: float, stop: float, fill: str, width: float) -> None:
        """A piece of an oval's edge with round ends; degrees, clockwise from the right."""
        angles = [math.radians(start + (stop - start) * step / 120) for step in range(121)]
        x, y = centre
        outer, middle, inner = (
            [(x + (rx + out) * math.cos(a), y + (ry + out) * math.sin(a)) for a in angles]
            for out in (width / 2, 0, -width / 2)
        )
        self.area([*outer, *reversed(inner)], fill)
        for end in (middle[0], middle[-1]):
            self.disc(end, width / 2, fill)

    def text(self, at: Point, text: str, size: float, fill: str = INK, anchor: str = "lm", bold: float = 0) -> None:
        """`anchor` as Pillow has it; `bold`: how much thicker the strokes are."""
        font = ImageFont.load_default(size=size * SCALE)
        x, y = at
        edge = round(bold * SCALE)
        self._draw.text((x * SCALE, y * SCALE), text, fill, font, anchor=anchor, stroke_width=edge, stroke_fill=fill)

    def finish(self, colours: int) -> Image.Image:
        """In its own size, with a palette of so many colours."""
        small = self.image.resize(self.size, Image.Resampling.LANCZOS)
        return small.quantize(colours, method=Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)


def _around(centre: Point, radius: float, share: float) -> Point:
    angle = 2 * math.pi * share
    return centre[0] + radius * math.sin(angle), centre[1] - radius * math.cos(angle)


def meme() -> Canvas:
    """The abstract is a crowned lion, the paper a kitten with a ball of wool."""
    canvas = Canvas(1200, 640, "#4b2a7b")
    _lion(canvas)
    _kitten(canvas)
    for outside in ((0, 0, 1200, 18), (0, 622, 1200, 640), (0, 0, 18, 640), (590, 0, 610, 640), (1182, 0, 1200, 640)):
        canvas.box(*outside, WHITE)
    for left, caption in ((18, "The abstract"), (610, "The paper")):
        canvas.box(left, 18, left + 572, 102, WHITE)
        corners = [(left, 18), (left + 572, 18), (left + 572, 622), (left, 622), (left, 18), (left + 572, 18)]
        canvas.line([(float(x), float(y)) for x, y in corners], INK, 4)
        canvas.line([(left, 102), (left + 572, 102)], INK, 4)
        canvas.text((left + 286, 60), caption, 44, anchor="mm", bold=0.8)
    return canvas


def _lion(canvas: Canvas) -> None:
    middle = (304.0, 400.0)
    for ray in range(20):
        canvas.area([middle, *(_around(middle, 900, (ray + side) / 20) for side in (0, 0.5))], "#6a3fa5")
    canvas.oval((304, 640), 220, 110, "#c98a3c")
    for ring, (radius, petal, colour) in enumerate(((168, 46, "#7a3b12"), (138, 42, "#a4551a"), (112, 36, "#c26c22"))):
        for share in range(22):
            canvas.disc(_around((304, 372), radius, (share + ring / 2) / 22), petal, colour)
        canvas.disc((304, 372), radius, colour)
    for side in (-1, 1):
        canvas.disc((304 + side * 92, 282), 32, "#e0a24a")
        canvas.disc((304 + side * 92, 284), 18, "#8a4a1c")
    canvas.oval((304, 380), 116, 122, "#ecb45c")
    for side in (-1, 1):
        x = 304 + side * 48
        canvas.oval((x, 352), 21, 17, WHITE)
        canvas.disc((x, 353), 13, "#c77f12")
        canvas.disc((x, 353), 7, INK)
        canvas.disc((x + 4, 348), 3, WHITE)
        canvas.line([(304 + side * 22, 330), (304 + side * 78, 318)], "#6a3410", 9)
        canvas.oval((304 + side * 31, 436), 38, 30, "#f8dfae")
        for row in (426, 438, 450):
            canvas.disc((304 + side * 36, row), 3, "#a4702e")
            canvas.line([(304 + side * 56, row), (304 + side * 128, row - 24 + (row - 426) * 1.6)], "#fff3d6", 2.5)
    canvas.oval((304, 470), 24, 16, "#f8dfae")
    canvas.area([(278, 402), (330, 402), (312, 424), (296, 424)], "#5a2412", "#5a2412", 6)
    canvas.line([(304, 424), (304, 448)], "#5a2412", 5)
    canvas.curve((283, 442), 21, 16, 10, 140, "#5a2412", 5)
    canvas.curve((325, 442), 21, 16, 40, 170, "#5a2412", 5)
    crown = [(214, 250), (204, 140), (254, 196), (304, 122), (354, 196), (404, 140), (394, 250)]
    canvas.area(crown, "#f7c531", "#8a5a00", 4)
    canvas.box(212, 236, 396, 260, "#f7c531", 6)
    canvas.line([(214, 236), (394, 236)], "#8a5a00", 3)
    for (x, y), colour in zip(crown[1::2], ("#e5484d", "#30a46c", "#e5484d"), strict=True):
        canvas.disc((x, y - 2), 10, colour, "#8a5a00", 2)
    for x, colour in ((254, "#3e63dd"), (304, "#e5484d"), (354, "#3e63dd")):
        canvas.disc((x, 248), 7, colour)


def _kitten(canvas: Canvas) -> None:
    canvas.box(610, 104, 1182, 622, "#dbe7f0")
    canvas.box(610, 500, 1182, 622, "#c9a27a")
    canvas.line([(614, 500), (1178, 500)], "#8d6b49", 5)
    for x in (700, 850, 1000, 1130):
        canvas.line([(896 + (x - 896) * 0.9, 504), (896 + (x - 896) * 1.15, 618)], "#b58c63", 2)
    fur, dark, pale = "#9aa0aa", "#6f7682", "#eceef1"
    canvas.oval((900, 574), 84, 12, "#ab855d")
    canvas.curve((962, 536), 34, 40, -60, 100, dark, 13)
    canvas.oval((896, 528), 52, 50, fur)
    canvas.oval((896, 540), 28, 36, pale)
    for side in (-1, 1):
        canvas.oval((896 + side * 23, 572), 19, 11, pale, dark, 2.5)
        ear = [(896 + side * 16, 412), (896 + side * 58, 378), (896 + side * 61, 442)]
        canvas.area(ear, fur, dark, 3)
        canvas.area([(896 + side * 31, 412), (896 + side * 51, 395), (896 + side * 53, 430)], "#f0b7bd")
    canvas.oval((896, 452), 69, 55, fur)
    canvas.oval((896, 476), 34, 24, pale)
    for offset in (-15, 0, 15):
        canvas.line([(896 + offset, 401), (896 + offset * 0.8, 418)], dark, 5)
    for side in (-1, 1):
        x = 896 + side * 31
        canvas.oval((x, 452), 18, 20, INK)
        canvas.disc((x - 5, 444), 7, WHITE)
        canvas.disc((x + 6, 459), 3.5, WHITE)
        for end in (-7, 3, 13):
            canvas.line([(896 + side * 40, 481 + end / 3), (896 + side * 86, 480 + end)], dark, 1.8)
        canvas.curve((896 + side * 8, 482), 8, 7, 10, 170, dark, 2.5)
    canvas.area([(889, 470), (903, 470), (896, 478)], "#e58a96", "#e58a96", 2)
    canvas.disc((776, 556), 27, "#e5484d")
    for turn in (0, 55, 110):
        canvas.curve((776, 556), 25, 10 + turn / 9, turn, turn + 180, "#ffb3b5", 2.2)
    canvas.line([(800, 570), (830, 582), (846, 574), (862, 578)], "#e5484d", 3)
    canvas.text((896, 330), "meow?", 30, "#4b5563", "mm")


def objects() -> Canvas:
    """Three vessels: a mug, a glass of water, a paper cup."""
    canvas = Canvas(1200, 480, "#f3e9dc")
    canvas.box(0, 340, 1200, 480, "#a9774b")
    canvas.box(0, 340, 1200, 350, "#c08d5f")
    for y in (392, 436):
        canvas.line([(0, y), (1200, y)], "#986840", 2)
    _mug(canvas)
    _glass(canvas)
    _paper_cup(canvas)
    return canvas


def _mug(canvas: Canvas) -> None:
    canvas.oval((222, 402), 118, 18, "#7d5230")
    canvas.curve((292, 286), 56, 58, -80, 80, "#8f1d22", 30)
    canvas.curve((292, 286), 56, 58, -80, 80, "#d8343b", 22)
    canvas.area([(122, 196), (302, 196), (296, 392), (128, 392)], "#d8343b")
    canvas.oval((212, 392), 84, 17, "#d8343b")
    canvas.area([(122, 196), (150, 196), (152, 398), (128, 392)], "#e75a60")
    canvas.area([(123, 270), (301, 270), (299, 312), (125, 312)], WHITE)
    canvas.oval((212, 312), 87, 12, WHITE)
    canvas.oval((212, 270), 89, 12, "#d8343b")
    canvas.oval((212, 196), 90, 22, "#a8262c")
    canvas.oval((212, 198), 79, 16, "#4a2412")
    for x in (176, 212, 248):
        points = [(x + 9 * math.sin(step / 6 * math.pi), 166 - step * 9) for step in range(12)]
        canvas.line(points, "#b9b0a4", 5)


def _glass(canvas: Canvas) -> None:
    canvas.oval((612, 410), 84, 15, "#7d5230")
    outline = [(528, 88), (672, 88), (656, 404), (544, 404)]
    canvas.area(outline, "#e4f2fa")
    canvas.area([(535, 180), (665, 180), (656, 400), (544, 400)], "#a9d8f0")
    canvas.oval((600, 400), 56, 12, "#a9d8f0")
    canvas.oval((600, 180), 65, 13, "#cbe9f8")
    canvas.line([(640, 34), (592, 384)], "#2f9e5b", 10)
    canvas.line([(640, 34), (690, 22)], "#2f9e5b", 10)
    for x, y, turn in ((566, 210, 0.3), (622, 236, 1.0), (578, 262, 0.6)):
        corners = [
            (x + 20 * math.cos(turn + k * math.pi / 2), y + 20 * math.sin(turn + k * math.pi / 2)) for k in range(4)
        ]
        canvas.area(corners, "#dff3fc", "#83bedd", 2)
    canvas.line([(548, 120), (560, 372)], WHITE, 6)
    canvas.line([(528, 88), (544, 400)], "#6fa9c7", 4)
    canvas.line([(672, 88), (656, 400)], "#6fa9c7", 4)
    canvas.curve((600, 400), 56, 12, 0, 180, "#6fa9c7", 5)
    canvas.curve((600, 88), 72, 13, 0, 360, "#6fa9c7", 4)


def _paper_cup(canvas: Canvas) -> None:
    canvas.oval((1000, 408), 92, 15, "#7d5230")
    canvas.area([(908, 130), (1068, 130), (1046, 402), (930, 402)], "#f7f4ee")
    canvas.oval((988, 402), 58, 10, "#e2dccf")
    canvas.area([(1040, 130), (1068, 130), (1046, 402), (1030, 404)], "#e2dccf")
    canvas.area([(914, 204), (1062, 204), (1050, 340), (926, 340)], "#b98a57")
    canvas.area([(1038, 204), (1062, 204), (1050, 340), (1032, 340)], "#a37645")
    canvas.disc((984, 272), 36, "#f7f4ee")
    canvas.oval((984, 272), 15, 24, "#7a4a21")
    canvas.curve((992, 272), 12, 22, 120, 240, "#f7f4ee", 4)
    canvas.box(896, 106, 1080, 136, "#33363f", 8)
    canvas.area([(916, 108), (926, 74), (1050, 74), (1060, 108)], "#454955")
    canvas.box(926, 68, 1050, 82, "#5a5f6d", 6)
    canvas.oval((958, 75), 11, 3.5, "#1b1d23")


HORIZON, BOTTOM, LANE, CENTRE = 300.0, 720.0, 290.0, 480.0
"""Of the road: y of the horizon and of the lower edge, width of a lane at the lower edge, x of its middle."""


def road() -> Canvas:
    """Three lanes: the left one is closed, the middle one goes straight on, the right one leaves."""
    canvas = Canvas(960, 720, "#a9d6f5")
    canvas.disc((820, 90), 44, "#ffe08a")
    for x, y, size in ((150, 80, 1.0), (560, 60, 0.8)):
        for dx, dy, radius in ((-44, 6, 24), (-12, -8, 32), (26, 0, 28), (54, 10, 18)):
            canvas.disc((x + dx * size, y + dy * size), radius * size, WHITE)
    hills = ((0, 300), (0, 246), (140, 208), (330, 262), (520, 222), (700, 266), (860, 214), (960, 240), (960, 300))
    canvas.area(hills, "#7fa8a0")
    canvas.box(0, 296, 960, 720, "#7cb35b")
    canvas.area([_ground(-0.25, 0), _ground(3.25, 0), _ground(3.25, 60), _ground(-0.25, 60)], "#8b8f96")
    canvas.area([_ground(0, 0), _ground(3, 0), _ground(3, 60), _ground(0, 60)], "#565b63")
    for lane in (0, 3):
        _marking(canvas, lane, 0, 60, 0.05)
    for lane in (1, 2):
        for begin in (0.0, 0.45, 0.95, 1.6, 2.5, 3.8, 5.8, 9.0, 14.0):
            _marking(canvas, lane, begin, begin * 1.14 + 0.22, 0.045)
    _arrows(canvas)
    _gantry(canvas)
    _closure(canvas)
    _lorry(canvas)
    return canvas


def _ground(lane: float, depth: float) -> Point:
    """Where on the picture a place of the road is: 0 to 3 across, 0 (here) to infinity ahead."""
    near = 1 / (1 + depth)
    return CENTRE + (lane - 1.5) * LANE * near, HORIZON + (BOTTOM - HORIZON) * near


def _marking(canvas: Canvas, lane: float, begin: float, end: float, width: float) -> None:
    half = width / 2
    corners = ((lane - half, begin), (lane + half, begin), (lane + half, end), (lane - half, end))
    canvas.area([_ground(*corner) for corner in corners], "#f4f4f0")


def _arrows(canvas: Canvas) -> None:
    """On the road: straight on in the middle, to the right in the right lane."""
    straight = ((1.44, 0.12), (1.56, 0.12), (1.56, 0.42), (1.68, 0.42), (1.5, 0.68), (1.32, 0.42), (1.44, 0.42))
    canvas.area([_ground(*corner) for corner in straight], "#f4f4f0")
    tip = ((2.46, 0.34), (2.62, 0.38), (2.62, 0.28), (2.82, 0.45), (2.62, 0.64), (2.62, 0.53), (2.34, 0.47))
    canvas.area([_ground(*corner) for corner in ((2.34, 0.12), (2.46, 0.12), *tip)], "#f4f4f0")


def _gantry(canvas: Canvas) -> None:
    """Signs over the road, one a lane."""
    for x in (236, 724):
        canvas.box(x - 7, 120, x + 7, 470, "#6b7280", 3)
    canvas.box(229, 132, 731, 146, "#6b7280", 3)
    for x in (340, 480, 620):
        canvas.box(x - 60, 104, x + 60, 204, "#15181f", 8)
    for start, stop in (((312, 126), (368, 182)), ((368, 126), (312, 182))):
        canvas.line([start, stop], "#ff4d4f", 13)
    canvas.line([(480, 122), (480, 170)], "#3ddc84", 13)
    canvas.area([(450, 154), (510, 154), (480, 190)], "#3ddc84")
    canvas.text((620, 130), "EXIT", 28, WHITE, "mm", 0.6)
    canvas.line([(592, 188), (632, 166)], WHITE, 9)
    canvas.area([(625, 152), (652, 155), (639, 180)], WHITE)


def _closure(canvas: Canvas) -> None:
    """What is in the way in the left lane."""
    (left, y), (right, _) = _ground(0.04, 0.9), _ground(0.96, 0.9)
    for x in (left + 18, right - 18):
        canvas.box(x - 4, y - 70, x + 4, y + 4, "#3f444d")
        canvas.disc((x, y - 88), 9, "#ffb020", "#8a5a00", 2)
    for top in (y - 78, y - 44):
        canvas.area([(left, top), (right, top), (right, top + 24), (left, top + 24)], WHITE)
        width = (right - left) / 6
        for stripe in range(6):
            x = left + stripe * width
            ends = [(x, top + 24), (x + width / 2, top + 24), (x + width, top), (x + width / 2, top)]
            canvas.area(ends, "#e5282d")
    for lane, depth in ((0.94, 0.62), (0.68, 0.46), (0.4, 0.32), (0.12, 0.2)):
        x, foot = _ground(lane, depth)
        size = 62 / (1 + depth)
        for low, low_half, high, high_half, colour in (
            (0, 0.42, 0.1, 0.34, "#c4531a"),
            (0.08, 0.28, 1, 0.05, "#ff7a26"),
            (0.38, 0.19, 0.62, 0.14, WHITE),
        ):
            halves = ((low, -low_half), (low, low_half), (high, high_half), (high, -high_half))
            canvas.area([(x + size * half, foot - size * up) for up, half in halves], colour)


def _lorry(canvas: Canvas) -> None:
    """Far ahead in the middle lane."""
    x, foot = _ground(1.5, 4.2)
    canvas.oval((x, foot), 27, 5, "#3f444d")
    for wheel in (x - 16, x + 16):
        canvas.box(wheel - 5, foot - 10, wheel + 5, foot, "#15181f", 2)
    canvas.box(x - 24, foot - 58, x + 24, foot - 6, "#3e63dd", 3)
    canvas.line([(x, foot - 56), (x, foot - 10)], "#2b478f", 2)
    for side in (-1, 1):
        canvas.box(x + side * 18 - 4, foot - 14, x + side * 18 + 4, foot - 9, "#ff6b6b", 1)


PSEUDO_CODE = (
    "1. Set the minimum to the",
    "    first element (index 0).",
    "2. Find the smallest element.",
    "3. Swap it with the item",
    "    at index[min].",
    "4. Increment the index",
    "    of [min].",
    "5. Repeat until sorted.",
)


def pseudo_code() -> Canvas:
    """A page of a notebook, written by hand."""
    canvas = Canvas(720, 1040, "#fbf7e9")
    for y in range(150, 1030, 52):
        canvas.line([(0, y), (720, y)], "#b9d3e8", 1.6)
    canvas.line([(96, 0), (96, 1040)], "#e79aa0", 2.4)
    for y in (130, 520, 910):
        canvas.disc((44, y), 17, "#d9d2bd")
        canvas.disc((45, y + 1), 15, "#c5bda4")
    hand = random.Random(7)
    _write(canvas, (122, 106), "Pseudo code", 56, "#8c2f39", hand)
    canvas.line([(122 + step * 6, 122 + 3 * math.sin(step / 4)) for step in range(56)], "#8c2f39", 3.5)
    for number, line in enumerate(PSEUDO_CODE):
        _write(canvas, (122, 248 + number * 104), line, 41, "#1d3a8f", hand)
    return canvas


def _write(canvas: Canvas, at: Point, text: str, size: float, ink: str, hand: random.Random) -> None:
    """Letter by letter, each a little turned, moved, slanted and sized: `at` is where the first one stands."""
    x, y = at[0] * SCALE, at[1] * SCALE
    drift = hand.uniform(-0.004, 0.004)
    for letter in text:
        font = ImageFont.load_default(size=size * SCALE * hand.uniform(0.95, 1.05))
        advance = font.getlength(letter)
        if letter != " ":
            side = round(size * SCALE * 2)
            mask = Image.new("L", (side, side))
            pen = ImageDraw.Draw(mask)
            pen.text((side / 2, side * 0.6), letter, 255, font, anchor="ms", stroke_width=round(SCALE * 0.55))
            slant = hand.uniform(0.08, 0.2)
            mask = mask.transform(
                mask.size, Image.Transform.AFFINE, (1, slant, -slant * side * 0.6, 0, 1, 0), Image.Resampling.BICUBIC
            )
            mask = mask.rotate(hand.uniform(-4, 4), Image.Resampling.BICUBIC, center=(side / 2, side * 0.6))
            rise = hand.uniform(-1.6, 1.6) * SCALE + drift * (x - at[0] * SCALE)
            corner = (round(x + advance / 2 - side / 2), round(y + rise - side * 0.6))
            canvas.image.paste(Image.new("RGB", mask.size, ink), corner, mask)
        x += advance * hand.uniform(0.99, 1.07) * (1.3 if letter == " " else 1)


FOODS = (
    ("Cold chicken", 86, 34),
    ("Potato salad", 54, 38),
    ("Egg sandwiches", 76, 40),
    ("Fruit pie and cream", 32, 12),
    ("Cheese", 48, 12),
)
"""Who ate of it, and how many of them got sick."""


def food_table() -> Canvas:
    canvas = Canvas(1000, 560, WHITE)
    canvas.text((40, 52), "Food eaten and food poisoning", 34, bold=0.7)
    columns, right, top, height = (40.0, 380.0, 660.0), 960.0, 92.0, 72.0
    canvas.box(columns[0], top, right, top + height, "#24527a")
    titles = ("Food", "People who ate it", "Ate it and got sick")
    for left, stop, title in zip(columns, (*columns[1:], right), titles, strict=True):
        at, anchor = (left + 22, "lm") if left == columns[0] else ((left + stop) / 2, "mm")
        canvas.text((at, top + height / 2), title, 27, WHITE, anchor, 0.5)
    for number, (food, ate, sick) in enumerate(FOODS, 1):
        y = top + number * height
        canvas.box(columns[0], y, right, y + height, "#eaf1f7" if number % 2 else WHITE)
        canvas.text((columns[0] + 22, y + height / 2), food, 29)
        for left, stop, count in ((columns[1], columns[2], ate), (columns[2], right, sick)):
            canvas.text(((left + stop) / 2, y + height / 2), str(count), 31, anchor="mm")
    bottom = top + (len(FOODS) + 1) * height
    for x in (*columns, right):
        canvas.line([(x, top), (x, bottom)], "#8fa9c0", 2)
    for number in range(len(FOODS) + 2):
        canvas.line([(columns[0], top + number * height), (right, top + number * height)], "#8fa9c0", 2)
    return canvas


SHARES = (("Vendor A", 36), ("Vendor B", 29), ("Vendor C", 12), ("Vendor D", 9), ("Others", 14))
"""Made up: beside the chart that is asked about is another one, as in the published picture."""
NOTES = (
    "Illustration. NVIDIA's share is as it was published for 2023; all others are the rest to 100 %.",
    "The model platforms, Vendors A to D, and their shares are made up.",
)


def market_share() -> Canvas:
    canvas = Canvas(900, 900, WHITE)
    canvas.box(0, 0, 900, 12, "#0b5c6b")
    canvas.text((44, 62), "Generative AI: market share of leading vendors, 2023", 28.5, bold=0.7)
    canvas.line([(44, 96), (856, 96)], "#c6ced6", 2)
    canvas.text((44, 138), "Data center GPUs", 29, "#0b5c6b", bold=0.6)
    centre = (300.0, 330.0)
    canvas.ring(centre, 160, 92, 0, 0.92, "#76b900")
    canvas.ring(centre, 160, 92, 0.92, 1, "#9aa5b1")
    for share in (0, 0.92):
        canvas.line([_around(centre, 90, share), _around(centre, 162, share)], WHITE, 4)
    canvas.text((300, 318), "92 %", 50, anchor="mm", bold=0.9)
    canvas.text((300, 360), "NVIDIA", 25, "#47505c", "mm")
    for y, colour, name, told in ((292, "#76b900", "NVIDIA", "92 %"), (352, "#9aa5b1", "All others", "8 %")):
        canvas.box(540, y - 15, 570, y + 15, colour, 4)
        canvas.text((588, y), name, 28)
        canvas.text((850, y), told, 28, anchor="rm", bold=0.5)
    canvas.line([(44, 520), (856, 520)], "#c6ced6", 2)
    canvas.text((44, 560), "Model platforms", 29, "#0b5c6b", bold=0.6)
    for number, (vendor, percent) in enumerate(SHARES):
        y = 608 + number * 44
        canvas.text((44, y), vendor, 25)
        canvas.box(200, y - 14, 200 + percent * 15, y + 14, "#9aa5b1" if vendor == "Others" else "#2f83a0", 4)
        canvas.text((212 + percent * 15, y), f"{percent} %", 25)
    canvas.box(0, 828, 900, 900, "#eef2f5")
    for y, note in zip((850, 877), NOTES, strict=True):
        canvas.text((44, y), note, 18, "#47505c")
    return canvas


PICTURES: Mapping[str, tuple[Callable[[], Canvas], int]] = {
    "meme": (meme, 160),
    "objects": (objects, 128),
    "road": (road, 128),
    "pseudo_code": (pseudo_code, 48),
    "food_table": (food_table, 32),
    "market_share": (market_share, 64),
}
"""Name of the file -> what draws it, and how many colours it has."""


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (draw, colours) in PICTURES.items():
        path = folder / f"{name}.png"
        told = PngImagePlugin.PngInfo()
        told.add_text("Software", f"Pillow {PIL.__version__}")
        draw().finish(colours).save(path, optimize=True, pnginfo=told)
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
