import dataclasses

import pytest
import torch
from PIL import Image

from tests import tiny
from vlm.data.example import BadRow, Example, Skipped, Turn
from vlm.families.decoder_only.batch import IMAGE, collate
from vlm.pixels import BadImage
from vlm.pixels.image_ref import ImageRef
from vlm.training.loading.encoded import Encoded

LLAMA_2_STYLE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} <|im_end|>{% endif %}{% endfor %}"
)


@pytest.fixture
def processor():
    return tiny.processor(tiny.decoder_only())


def scored_text(processor, row):
    return processor.text_tokenizer.decode(row.ids[row.scored])


def test_exactly_the_answer_and_its_end_token_are_scored(processor):
    """Nothing at image, prompt or padding positions; the last label is the end token."""
    row = processor.encode(tiny.example(content=(None, "what?"), answer="a cat"))
    assert scored_text(processor, row) == "a cat<|im_end|>"
    assert row.ids[-1] == processor.end_id
    batch = collate([row, processor.encode(tiny.example(answer="a long answer"))], 256)
    assert not (batch.scored & (batch.ids == IMAGE)).any()
    assert not (batch.scored & ~batch.valid).any()
    assert batch.targets.tolist().count(processor.end_id) == 2


def test_padding_with_the_end_token_keeps_the_real_end_scored(processor):
    """Where the pad id is the end id, pads stay unscored and ends stay scored."""
    rows = [processor.encode(tiny.example(answer=a)) for a in ("x", "much longer")]
    batch = collate(rows, pad_id=processor.end_id)
    assert [int(row.sum()) for row in batch.scored] == [2, 12]


def test_text_that_spells_an_image_mark_stays_text(processor):
    """Labels stay aligned when question and answer hold a literal <image>."""
    plain = processor.encode(tiny.example(content=(None, "is <image> a tag?"), answer="<image>"))
    assert int((plain.ids == IMAGE).sum()) == 6
    assert scored_text(processor, plain) == "<image><|im_end|>"
    assert "is <image> a tag?" in processor.text_tokenizer.decode(plain.ids[plain.ids != IMAGE])


def test_a_text_tokenizer_that_has_an_image_token_keeps_labels_aligned():
    """Also where <image> is a special token of the vocabulary itself."""
    model = tiny.decoder_only()
    processor = tiny.processor(model, text_tokenizer=tiny.text_tokenizer(special=["<image>"]))
    row = processor.encode(tiny.example(content=(None, "a literal <image>"), answer="yes"))
    assert int((row.ids == IMAGE).sum()) == 6
    batch = collate([row], processor.pad_id)
    assert model(batch).shape[0] == len("yes") + 1


def test_ids_equal_the_chat_template_around_images(processor):
    """Images apart, the row is what the template writes; the image stands where its slot is."""
    row = processor.encode(tiny.example(content=("see ", None, " now"), answer="ok"))
    head = "<|im_start|>user\nsee "
    tail = " now<|im_end|>\n<|im_start|>assistant\nok<|im_end|>"
    tokenizer = processor.text_tokenizer
    expected = tokenizer(head)["input_ids"] + [IMAGE] * 6 + tokenizer(tail)["input_ids"]
    assert row.ids.tolist() == expected


def test_generation_prompt_is_the_start_of_the_training_row(processor):
    example = tiny.example(content=(None, "what?"), answer="a cat")
    row = processor.encode(example)
    question = Example("q", example.turns[:1], example.images)
    prompt = processor.encode_prompt(question)
    first = int(row.scored.nonzero()[0])
    assert prompt.ids.tolist() == row.ids[:first].tolist()
    assert not prompt.scored.any()


def test_every_answer_of_a_conversation_is_scored(processor):
    turns = (
        Turn("user", (None, "one?")),
        Turn("assistant", ("1",)),
        Turn("user", ("two?",)),
        Turn("assistant", ("2",)),
    )
    row = processor.encode(Example("chat", turns, (tiny.image(),)))
    assert scored_text(processor, row) == "1<|im_end|>2<|im_end|>"


def test_template_that_trims_and_spaces_answers_scores_up_to_its_end_token():
    model = tiny.decoder_only()
    tokenizer = tiny.text_tokenizer(chat_template=LLAMA_2_STYLE)
    processor = tiny.processor(model, text_tokenizer=tokenizer)
    row = processor.encode(tiny.example(content=(None, " what? "), answer=" a cat "))
    assert scored_text(processor, row) == "a cat <|im_end|>"


THINKING = (  # Qwen3's way: an answer opens with an empty line of thought
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
NO_SYSTEM = (  # Gemma's way
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + tiny.CHAT_TEMPLATE
)


def test_prompt_of_a_thinking_template_is_what_was_trained_on():
    tokenizer = tiny.text_tokenizer(chat_template=THINKING)
    processor = tiny.processor(tiny.decoder_only(), text_tokenizer=tokenizer)
    example = tiny.example(content=(None, "what?"), answer="a cat")
    row, prompt = processor.encode(example), processor.encode_prompt(example.question())
    assert prompt.ids.tolist() == row.ids[: int(row.scored.nonzero()[0])].tolist()
    assert "</think>" in tokenizer.decode(prompt.ids[prompt.ids != IMAGE])
    assert scored_text(processor, row) == "a cat<|im_end|>"


def test_template_whose_prompt_is_not_what_it_trains_on_is_refused():
    tokenizer = tiny.text_tokenizer(chat_template=THINKING.replace("enable_thinking", "nothing"))
    with pytest.raises(BadRow, match=r"before an answer it writes .* but to ask for one"):
        tiny.processor(tiny.decoder_only(), text_tokenizer=tokenizer)


def test_empty_system_message_is_none_where_the_template_takes_none():
    tokenizer = tiny.text_tokenizer(chat_template=NO_SYSTEM)
    processor = tiny.processor(tiny.decoder_only(), text_tokenizer=tokenizer, system="")
    assert processor.system is None
    with pytest.raises(BadRow, match="no system role"):
        tiny.processor(tiny.decoder_only(), text_tokenizer=tokenizer, system="Be brief.")


def test_prompt_longer_than_the_context_is_refused():
    processor = tiny.processor(tiny.decoder_only(), max_tokens=40)
    with pytest.raises(BadRow, match=r"long: 79 tokens, the context takes 40"):
        processor.encode_prompt(tiny.example("long", ("y" * 60,)).question())
    with pytest.raises(BadRow, match="prompt: 60 tokens, the context takes 40"):
        processor.encode_literal([], "y" * 60)


def test_image_too_long_to_resize_is_named_with_its_row():
    model = tiny.decoder_only()
    model.tokenizer.pixel_spec = dataclasses.replace(
        model.tokenizer.pixel_spec, fit="crop", size_hw=(224, 224)
    )
    thread = Image.new("RGB", (20000, 1))
    with pytest.raises(BadImage, match="rows:4: "):
        tiny.processor(model).encode(tiny.example("rows:4", images=(thread,)))


def test_system_message_is_added_where_a_conversation_has_none():
    model = tiny.decoder_only()
    processor = tiny.processor(model, system="Be brief.")
    row = processor.encode(tiny.example())
    text = processor.text_tokenizer.decode(row.ids[row.ids != IMAGE])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_literal_prompt_places_images_at_its_marks(processor):
    row = processor.encode_literal([tiny.image()], "a <image> b", answer="yes")
    tokenizer = processor.text_tokenizer
    expected = tokenizer("a ")["input_ids"] + [IMAGE] * 6 + tokenizer(" byes")["input_ids"]
    assert row.ids.tolist() == [*expected, processor.end_id]
    assert scored_text(processor, row) == "yes<|im_end|>"
    with pytest.raises(BadRow, match="has 2 <image> marks, there are 1 images"):
        processor.encode_literal([tiny.image()], "<image><image>")


def long_example(answer="yes"):
    return tiny.example("long", (None, "a", None, "b"), answer)


def test_row_longer_than_the_context_is_dropped_with_both_numbers():
    processor = tiny.processor(tiny.decoder_only(), max_tokens=40)
    skipped = processor.encode(long_example("y" * 90))
    assert isinstance(skipped, Skipped)
    assert skipped.reason.endswith("tokens, the context takes 40")


@pytest.mark.parametrize("limit", range(3, 70))
def test_shrinking_never_cuts_an_image_run(limit):
    """Whatever the limit, each image that is left has all its tokens, and its pixels stay."""
    turns = (
        Turn("user", (None, "one?")),
        Turn("assistant", ("1",)),
        Turn("user", (None, None, "?")),
        Turn("assistant", ("2",)),
    )
    example = Example("chat", turns, tuple(tiny.image(i) for i in range(3)))
    processor = tiny.processor(tiny.decoder_only(), max_tokens=limit, overflow="shrink")
    row = processor.encode(example)
    if isinstance(row, Skipped):
        assert limit < 50
        return
    assert len(row.ids) <= limit
    assert int((row.ids == IMAGE).sum()) == 6 * len(row.layout.images)
    assert [image for _, (image, _) in row.views] == list(range(len(row.layout.images)))
    assert row.scored[-1]
    whole = tiny.processor(tiny.decoder_only()).encode(example)
    assert row.cut == int((whole.ids != IMAGE).sum() - (row.ids != IMAGE).sum())


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example("r:7", (Turn("user", ("hi",)),)), "r:7: expected an assistant turn"),
        (tiny.example("r:8", ("hi",), "  "), "r:8: expected an answer, found an empty"),
        (tiny.example("r:9", ("\ue5c0",)), "r:9: the text holds one of the private characters"),
    ],
)
def test_bad_conversation_is_named(processor, example, message):
    with pytest.raises(BadRow, match=message):
        processor.encode(example)


def test_template_without_an_end_token_is_refused_at_once():
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = tiny.text_tokenizer(chat_template=template)
    with pytest.raises(BadRow, match="writes no end token after an answer"):
        tiny.processor(tiny.decoder_only(), text_tokenizer=tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        tiny.processor(tiny.decoder_only(), text_tokenizer=tokenizer)


def test_unreadable_image_is_named_and_never_replaced(processor, tmp_path):
    path = tmp_path / "cut.png"
    Image.new("RGB", (64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:60])
    bad = tiny.example("rows.jsonl:3", images=(ImageRef(path, "cut.png"),))
    with pytest.raises(BadImage, match=r"rows.jsonl:3: .*cut.png"):
        Encoded([bad], processor)[0]
    skipped = Encoded([bad], processor, on_bad_row="skip")[0]
    assert isinstance(skipped, Skipped)
    assert skipped.name == "rows.jsonl:3"


def test_owner_says_whose_view_it_is(processor):
    rows = [processor.encode(tiny.example("a")), processor.encode(long_example())]
    (group,) = collate(rows, processor.pad_id).groups
    assert torch.equal(group.owner, torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0]]))


def test_text_that_is_no_unicode_is_named():
    with pytest.raises(BadRow, match=r"row: expected valid Unicode text, found '.*udcff"):
        tiny.processor(tiny.decoder_only()).encode(tiny.example(content=("\udcff what?",)))
