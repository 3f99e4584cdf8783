"""Fonts to draw text with: where they lie, which characters they hold, how they are opened.

Fonts come from the packages `fontpkg-*` that are installed, from the system's folders, from
matplotlib's own (so that there always are some), or from any folder. A font is asked whether it
holds a text before the text is drawn with it: what it lacks would be drawn as empty boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from vlm.compat.extras import needs

HANDS = frozenset({"caveat", "kalam", "dancing-script", "shadows-into-light"})
"""Families of fontpkg that look written by hand, of those named here."""

TRAIN_FAMILIES = (
    "roboto", "open-sans", "lato", "montserrat", "inter", "poppins", "nunito", "work-sans",
    "merriweather", "lora", "pt-serif", "eb-garamond", "libre-baskerville", "playfair-display",
    "inconsolata", "roboto-mono", "source-code-pro", "roboto-slab", "arvo", "oswald",
    "barlow-condensed", "caveat", "kalam", "dancing-script",
)  # fmt: skip
"""Families of fontpkg that the shipped reader learns from."""

HELD_OUT_FAMILIES = (
    "rubik", "raleway", "source-serif-4", "cormorant-garamond", "jetbrains-mono", "bitter",
    "saira-condensed", "shadows-into-light",
)  # fmt: skip
"""Families that it is evaluated on, and that nothing here learns from."""

SYSTEM_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "/Library/Fonts",
    "C:/Windows/Fonts",
)
SUFFIXES = (".ttf", ".otf", ".ttc")
LIGHTEST, HEAVIEST = 300, 800
"""The weights that are drawn from where a family has a range of them."""


class BadFont(ValueError):
    """A font that cannot be used, or of which there is none; the message names it."""


@dataclass(frozen=True, slots=True)
class Font:
    """One face: a file, at one weight where the file holds a range of them.

    family: in lower case, words joined by hyphens. weight: 100 to 900, 400 is regular.
    varies: whether the weight is set on the file's axes.
    """

    path: Path
    family: str
    style: str
    weight: int
    varies: bool = False

    @property
    def hand(self) -> bool:
        """Whether it looks written by hand."""
        return self.family in HANDS

    def at(self, size_px: int) -> ImageFont.FreeTypeFont:
        """The font for Pillow, `size_px` pixels to the em."""
        return _opened(self, size_px)

    @property
    def characters(self) -> frozenset[int]:
        """The code points that it has glyphs for."""
        return _characters(self.path)

    def lacks(self, text: str) -> list[str]:
        """The characters of a text that it has no glyph for, each once, in code order."""
        return [c for c in sorted(set(text)) if ord(c) not in self.characters]

    def holds(self, text: str) -> bool:
        """Whether it has a glyph for every character of a text."""
        return self.characters.issuperset(map(ord, text))


def find_fonts(names: str | Sequence[str] = "any") -> list[Font]:
    """The fonts that are named, in an order that hangs on names alone.

    names: any of, or several separated by commas: "any" (installed packages `fontpkg-*` but those
        held out; where there are none, the system's), "train" or "held_out" (the families listed
        here), "system", a family of fontpkg such as "lato", a folder, or a font file.
    Raises BadFont naming what gives no font, and how to install it.
    """
    names = names.split(",") if isinstance(names, str) else list(names)
    fonts = [font for name in names for font in _named(name.strip())]
    return list(dict.fromkeys(fonts))


def holding(fonts: Iterable[Font], characters: str) -> list[Font]:
    """The fonts that hold all of `characters`.

    Raises BadFont naming what each one lacks where none does.
    """
    fonts = list(fonts)
    fit = [font for font in fonts if font.holds(characters)]
    if not fit:
        lacking = {font.family: "".join(font.lacks(characters))[:40] for font in fonts}
        raise BadFont(
            f"expected a font that holds {characters[:80]!r}, found what they lack: {lacking}"
        )
    return fit


def _named(name: str) -> list[Font]:
    if name == "any":
        installed = [family for family in _installed() if family not in HELD_OUT_FAMILIES]
        return [font for f in installed for font in _of_family(f)] or _of_system()
    if name in ("train", "held_out"):
        families = TRAIN_FAMILIES if name == "train" else HELD_OUT_FAMILIES
        missing = [family for family in families if family not in _installed()]
        if missing:
            packages = " ".join(f"fontpkg-{family}" for family in missing)
            raise BadFont(f"fonts {name!r}: not installed; try: pip install {packages}")
        return [font for family in families for font in _of_family(family)]
    if name == "system":
        return _of_system()
    if Path(name).is_dir():
        return _of_folder(Path(name))
    if Path(name).is_file():
        return [_of_file(Path(name))]
    if name in _installed():
        return _of_family(name)
    raise BadFont(
        f"fonts {name!r}: expected any, train, held_out, system, a folder, a font file, or an "
        f"installed family ({', '.join(_installed()) or 'none is'}); try: pip install "
        f"fontpkg-{name}"
    )


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    """The families of the packages `fontpkg-*` that are here."""
    try:
        import fontpkg
    except ImportError:
        return ()
    return tuple(sorted(fontpkg.families()))


@lru_cache(maxsize=256)
def _of_family(family: str) -> list[Font]:
    import fontpkg

    found = []
    for file in fontpkg.family(family).files:
        if file.variable and file.wght_min is not None:
            low, high = max(file.wght_min, LIGHTEST), min(file.wght_max, HEAVIEST)
            weights = sorted({round(low), 400, 500, 600, 700, round(high)})
            weights = [weight for weight in weights if low <= weight <= high]
            found += [Font(file.path, family, file.style, weight, True) for weight in weights]
        elif file.weight is None or LIGHTEST <= file.weight <= HEAVIEST:
            found.append(Font(file.path, family, file.style, file.weight or 400))
    return sorted(found, key=lambda font: (font.path.name, font.weight))


@lru_cache(maxsize=1)
def _of_system() -> list[Font]:
    import matplotlib

    folders = [Path(folder) for folder in SYSTEM_FOLDERS if Path(folder).is_dir()]
    own = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    files = {path.name: path for path in sorted(own.glob("DejaVu*.ttf"))}
    for folder in folders:
        files |= {path.name: path for path in _files(folder)}
    fonts = [_of_file(path) for _, path in sorted(files.items())]
    return [font for font in fonts if font.holds("AaZz09")]


def _of_folder(folder: Path) -> list[Font]:
    files = _files(folder)
    if not files:
        raise BadFont(f"{folder}: expected font files ({', '.join(SUFFIXES)}), found none")
    return [_of_file(path) for path in files]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


@lru_cache(maxsize=4096)
def _of_file(path: Path) -> Font:
    with needs("ocr"):
        from fontTools.ttLib import TTFont, TTLibError

    try:
        with TTFont(path, lazy=True, fontNumber=0) as file:
            name, weight = file["name"], file["OS/2"].usWeightClass if "OS/2" in file else 400
            family = name.getBestFamilyName() or path.stem
            style = (name.getBestSubFamilyName() or "").lower()
    except (TTLibError, OSError, KeyError) as error:
        raise BadFont(f"{path}: expected a font file, found none that opens ({error})") from error
    slanted = "italic" in style or "oblique" in style
    return Font(path, family.lower().replace(" ", "-"), "italic" if slanted else "normal", weight)


@lru_cache(maxsize=4096)
def _characters(path: Path) -> frozenset[int]:
    with needs("ocr"):
        from fontTools.ttLib import TTFont

    with TTFont(path, lazy=True, fontNumber=0) as file:
        return frozenset(file.getBestCmap() or {})


@lru_cache(maxsize=1024)
def _opened(font: Font, size_px: int) -> ImageFont.FreeTypeFont:
    opened = ImageFont.truetype(str(font.path), size_px)
    if font.varies:
        # A variable file opens at its default instance, which may be Thin: every axis is set.
        values = []
        for axis in opened.get_variation_axes():
            name = axis["name"]
            name = name.decode() if isinstance(name, bytes) else name
            weight = name.lower() == "weight"
            values.append(font.weight if weight else axis["default"])
        opened.set_variation_by_axes(values)
    return opened
