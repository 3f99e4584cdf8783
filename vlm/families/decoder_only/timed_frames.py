"""How a video stands in the text stream: its frames as single views, each after its time.

Frames are taken from a video beforehand (`vlm.data.example.Video`); none is cut into tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from vlm.data.example import Video
from vlm.families.decoder_only.image_layout import ImageLayout, Span
from vlm.tokenizers.edge_tiles import EdgeTilesSpec

INTRODUCTION = (
    "You are provided the following series of {count} frames from a {duration} [H:MM:SS] video.\n"
)
TIME, CLOSE = "\nFrame from {minutes:02d}:{seconds:02d}:", "\n\n"
"""Before the frames, before each, and after the last.
Source: transformers, `video_processing_smolvlm.py`."""

MOST_FRAMES = 999


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedFrames:
    """SmolVLM2's way: the number of frames in words, the video's length, and each frame, as an
    image of one view, after its minute and second.

    pixel_spec: preprocessing of a frame, one view. mark, whole: of an image of one view, as in
        `vlm.families.decoder_only.view_order.Tagged`.
    Source: transformers, `processing_smolvlm.py`, `replace_video_token`.
    """

    pixel_spec: EdgeTilesSpec
    mark: str
    whole: str

    def __call__(self, video: Video, span: Span) -> ImageLayout:
        """The layout of a video each of whose frames is one `span` of image tokens.

        Raises ValueError for more than MOST_FRAMES frames, whose number is not spelled.
        """
        last_s = video.times_s[-1] if video.duration_s is None else video.duration_s
        pieces: list[Span | str] = [
            INTRODUCTION.format(
                count=in_words(len(video.frames)), duration=timedelta(seconds=int(last_s))
            )
        ]
        for time_s in video.times_s:
            minutes, seconds = divmod(int(time_s), 60)
            time = TIME.format(minutes=minutes, seconds=seconds)
            pieces += [f"{time}{self.mark}{self.whole}", span, self.mark]
        pieces.append(CLOSE)
        encoded = span.length * len(video.frames)
        return ImageLayout(pieces=tuple(pieces), encoded=encoded, is_video=True)


ONES = [
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"),
    *("seventeen", "eighteen", "nineteen"),
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_words(number: int) -> str:
    """A number of at most MOST_FRAMES in English. Raises ValueError for more.

    >>> [in_words(number) for number in (8, 20, 64, 100, 142)]
    ['eight', 'twenty', 'sixty-four', 'one hundred', 'one hundred and forty-two']
    """
    if number > MOST_FRAMES:
        raise ValueError(f"expected at most {MOST_FRAMES} frames, found {number}")
    hundreds, rest = divmod(number, 100)
    if hundreds:
        return f"{ONES[hundreds]} hundred" + (f" and {in_words(rest)}" if rest else "")
    if number < len(ONES):
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")
