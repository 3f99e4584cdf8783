"""SmolVLM2 on frames of videos, beside transformers' processor and model."""

import json
import re

import numpy as np
import pytest
import torch
from transformers.models.smolvlm import processing_smolvlm

import vlm
from tests.reference.images_in_text import close, our_logits, reopened, with_marks
from tests.reference.tiny_smolvlm import IMAGE_TOKENS, SIZES, write_folder
from tests.tiny import image as one_image
from vlm.data.example import BadRow, Example, Turn, Video
from vlm.families.decoder_only.batch import collate, collate_packed
from vlm.families.decoder_only.timed_frames import in_words

WORDS = {1: "one", 3: "three", 12: "twelve", 21: "twenty-one"}


@pytest.fixture(scope="module", name="folder")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("smolvlm")
    write_folder(path, "smolvlm")
    return path


@pytest.fixture(autouse=True)
def number_words(monkeypatch):
    monkeypatch.setattr(processing_smolvlm, "num2words", WORDS.__getitem__)


def video_of(count, fps, duration_s=None, size_hw=SIZES["portrait"], step=10):
    """Frames `step` apart, and what transformers takes for them."""
    frames = [one_image(seed, size_hw) for seed in range(count)]
    indices = [step * number for number in range(count)]
    video = Video(frames, [index / fps for index in indices], duration_s)
    metadata = dict(total_num_frames=step * count, fps=fps, duration=duration_s,
                    frames_indices=indices)  # fmt: skip
    return video, np.stack([np.array(frame) for frame in frames]), metadata


def asked(processor, *videos, text="what happens?"):
    """transformers' prompt and inputs of videos with a question after them."""
    parts = [*[{"type": "video"}] * len(videos), {"type": "text", "text": text}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    return processor(
        text=[prompt], videos=[frames for _, frames, _ in videos], return_tensors="pt",
        video_metadata=[metadata for _, _, metadata in videos], add_special_tokens=False,
    )  # fmt: skip


def row_of(model, *videos, text="what happens?"):
    turn = Turn("user", (*[None] * len(videos), text))
    return model.processor.encode_prompt(Example("r", (turn,), tuple(v for v, *_ in videos)))


VIDEOS = {
    "three frames": dict(count=3, fps=2),
    "one frame": dict(count=1, fps=24),
    "minutes": dict(count=12, fps=0.5, duration_s=4000.7),
    "wide": dict(count=21, fps=30, duration_s=7.0, size_hw=SIZES["landscape"]),
}


@pytest.mark.parametrize("name", VIDEOS)
@torch.no_grad()
def test_smolvlm_reads_frames_as_reference(folder, name):
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    video = video_of(**VIDEOS[name])
    row, inputs = row_of(model, video), asked(processor, video)
    assert torch.equal(with_marks(row.ids, model), inputs["input_ids"][0])
    close(torch.stack([view for view, _ in row.views]), inputs["pixel_values"][0], 1e-6)
    (layout,) = row.layout.images
    assert [span.length for span in layout.spans] == [IMAGE_TOKENS] * len(video[0].frames)
    batch = collate([row], 0)
    close(our_logits(model, batch), peer(**inputs).logits)


@torch.no_grad()
def test_smolvlm_answers_about_videos_as_reference_and_beside_images(folder):
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    first, second = video_of(3, 2), video_of(1, 24)
    inputs = asked(processor, first)
    theirs = peer.generate(
        **inputs, max_new_tokens=8, do_sample=False, eos_token_id=list(model.stop_ids),
        bad_words_ids=[[id] for id in model.banned_ids],
    )  # fmt: skip
    expected = model.processor.decode(theirs[0, inputs["input_ids"].shape[1] :].tolist())
    asks = [first[0], one_image(1, (40, 90)), [one_image(2, (9, 7)), second[0]]]
    questions = ["what happens?", "what is it?", "which?"]
    together = model.answer(asks, questions, max_new_tokens=8)
    alone = [model.answer([a], [q], max_new_tokens=8)[0] for a, q in zip(asks, questions)]
    assert together == alone
    assert together[0] == expected
    parts = [{"type": "video", "video": first[0]}, {"type": "text", "text": "what happens?"}]
    messages = [{"role": "user", "content": parts}]
    assert model.chat(messages, max_new_tokens=8) == expected


def test_smolvlm_learns_from_videos_packed_as_padded(folder):
    model = vlm.load(folder, "cpu")
    answers = (Turn("assistant", ("a cat",)), Turn("assistant", ("two dogs",)))
    rows = [
        model.processor.encode(
            Example(f"r{i}", (Turn("user", (None, "what?")), answer), (video_of(3 - 2 * i, 2)[0],))
        )
        for i, answer in enumerate(answers)
    ]
    padded, packed = collate(rows, model.processor.pad_id), collate_packed(rows)
    close(model.module(padded), model.module(packed), 1e-5)
    measured = model.processor.measure(
        Example("r0", (Turn("user", (None, "what?")), answers[0]), (video_of(3, 2)[0],))
    )
    assert torch.equal(measured.ids, rows[0].ids)
    assert [v.shape for v, _ in measured.views] == [v.shape for v, _ in rows[0].views]


def test_smolvlm_native_layout_keeps_how_frames_are_read(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    model.save(tmp_path)
    again = vlm.load(tmp_path, "cpu")
    assert again.processor.frames == model.processor.frames
    video = video_of(3, 2)
    assert torch.equal(row_of(again, video).ids, row_of(model, video).ids)


def test_models_without_frames_refuse_videos(tmp_path):
    write_folder(tmp_path, "idefics3")
    model = vlm.load(tmp_path, "cpu")
    with pytest.raises(BadRow, match="this model reads no videos, found one; give it images"):
        model.answer([video_of(3, 2)[0]], ["what?"])


@pytest.mark.parametrize(
    ("frames", "times", "message"),
    [
        (2, [0.0], "expected frames with a time each, found 2 frames and 1 times"),
        (0, [], "found 0 frames and 0 times"),
        (2, [1.0, 0.5], "none before the one before it, found [1.0, 0.5]"),
        (1, [-1.0], "expected 0 or more, none before"),
        (1, [float("nan")], "none before the one before it, found [nan]"),
    ],
)
def test_video_refuses_times_that_do_not_fit(frames, times, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Video([one_image()] * frames, times)


@pytest.mark.parametrize("duration_s", [0.5, float("nan")])
def test_video_refuses_a_duration_that_ends_before_its_last_frame(duration_s):
    with pytest.raises(ValueError, match=f"expected 1.0 or more, .*, found {duration_s}"):
        Video([one_image()] * 2, [0.0, 1.0], duration_s)


def test_frames_of_another_side_than_the_encoders_are_refused_with_both(tmp_path):
    write_folder(tmp_path, "smolvlm")
    file = next(tmp_path.glob("*processor_config.json"))
    values = json.loads(file.read_text())
    values["video_processor"]["max_image_size"]["longest_edge"] += 14
    file.write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=r"frames of \d+ pixels, as the vision encoder has positions"
    ):
        vlm.load(tmp_path, "cpu")


def test_videos_of_too_many_frames_are_refused_with_their_row(folder):
    model = vlm.load(folder, "cpu")
    video = Video([one_image()] * 1000, [0.0] * 1000)
    with pytest.raises(BadRow, match="example 0: expected at most 999 frames, found 1000"):
        model.answer([video], ["what?"])


def test_numbers_are_written_in_words():
    found = [in_words(n) for n in (0, 1, 10, 13, 20, 21, 90, 99, 100, 101, 115, 999)]
    assert found == [
        "zero", "one", "ten", "thirteen", "twenty", "twenty-one", "ninety", "ninety-nine",
        "one hundred", "one hundred and one", "one hundred and fifteen",
        "nine hundred and ninety-nine",
    ]  # fmt: skip
