import threading

import pytest
import torch

from tests import tiny, training
from vlm.data.example import BadRow
from vlm.families.decoder_only import generate as engine
from vlm.families.decoder_only.chat import Chat
from vlm.pixels import BadImage


def image_part(seed=0):
    return {"type": "image", "image": tiny.image(seed)}


def asked(*parts):
    """A user's message: images by seed, and texts."""
    return [
        image_part(part) if isinstance(part, int) else {"type": "text", "text": part}
        for part in parts
    ]


TURNS = (
    asked(1, "what?"),
    "and its colour?",
    asked("is this ", 2, " or ", 3, " alike?"),
    [{"type": "text", "text": "why?"}],
)


@pytest.fixture
def counted():
    """Makes a model of a kind and the list of images that its image tokenizer encodes."""

    def build(kind="llama", **options):
        model = training.model(kind=kind, **options)
        seen = []
        model.module.tokenizer.register_forward_hook(
            lambda _, inputs, __: seen.extend(inputs[0].unbind())
        )
        return model, seen

    return build


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_chat_session_equals_reading_everything_again(kind, counted):
    """The slow twin is one `Model.chat` call on the whole conversation so far."""
    model, seen = counted(kind)
    chat, messages = Chat(model), []
    options = {"max_new_tokens": 9, "repetition_penalty": 1.5}  # which makes the ids vary
    for content in TURNS:
        answer = chat.ask(content, **options)
        messages.append({"role": "user", "content": content})
        assert answer == model.chat(messages, **options)
        messages.append({"role": "assistant", "content": answer})
    assert chat.messages == messages
    assert len({message["content"] for message in messages[1::2]}) > 1
    assert len(seen) == 3 + (1 + 1 + 3 + 3)  # each once by the chat; the slow twin's, every time


def test_chat_encodes_each_image_once(counted):
    model, seen = counted()
    chat = Chat(model, [{"role": "system", "content": "Be brief."}])
    for content in TURNS:
        chat.ask(content, max_new_tokens=4)
    assert len(seen) == 3
    assert all(not torch.equal(seen[i], seen[j]) for i in range(3) for j in range(i))
    again = Chat(model, chat.messages)
    again.ask("and now?", max_new_tokens=4)
    assert len(seen) == 6


def test_chat_takes_images_whatever_mark_literal_prompts_have():
    """DeepSeek-VL's processor has a mark of its own."""
    model, content = training.model(), asked(1, "what?")
    said = Chat(model).ask(content, max_new_tokens=4)
    model.processor.image_mark = "<image_placeholder>"
    assert Chat(model).ask(content, max_new_tokens=4) == said


def test_single_turn_chat_equals_answer():
    model = training.model()
    image = tiny.image(4)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]
    said = model.chat([{"role": "user", "content": content}], max_new_tokens=12)
    assert [said] == model.answer([image], ["what?"], max_new_tokens=12)
    beams = {"num_beams": 3, "max_new_tokens": 6}
    said = model.chat([{"role": "user", "content": content}], **beams)
    assert [said] == model.answer([image], ["what?"], **beams)


def test_streamed_pieces_join_to_the_answer():
    """Bytes of characters that are not whole yet are held back."""
    model = training.model()
    several = 0
    for seed in range(4):
        messages = [{"role": "user", "content": asked(seed, "what?")}]
        pieces = list(model.chat(messages, stream=True, max_new_tokens=24))
        assert "".join(pieces) == model.chat(messages, max_new_tokens=24)
        several += len(pieces) > 3
    assert several
    chat, plain = Chat(model), Chat(model)
    for content in TURNS:
        assert "".join(chat.ask(content, stream=True)) == plain.ask(content)
    assert chat.messages == plain.messages


def test_streamed_pieces_come_while_the_rest_is_unwritten():
    model = training.model()
    ids = []
    model.module.text.get_output_embeddings().register_forward_hook(lambda *_: ids.append(1))
    pieces = model.chat([{"role": "user", "content": "tell"}], stream=True, max_new_tokens=400)
    assert not ids
    assert next(pieces)
    pieces.close()
    assert len(ids) < 200


def streaming_threads():
    return [t for t in threading.enumerate() if t.name.startswith("vlm-stream")]


def test_abandoned_stream_leaves_no_thread_and_no_turn():
    """What is asked next is answered as if the abandoned question, with its image, never was."""
    model = training.model()
    chat, plain = Chat(model), Chat(model)
    chat.ask(TURNS[0], max_new_tokens=5)
    plain.ask(TURNS[0], max_new_tokens=5)
    pieces = chat.ask(asked(7, "which?"), stream=True, max_new_tokens=300)
    next(pieces)
    assert streaming_threads()
    del pieces
    assert not streaming_threads()
    unread = chat.ask(asked(7, "which?"), stream=True, max_new_tokens=300)
    del unread
    assert not streaming_threads()
    assert chat.messages == plain.messages
    content = asked(8, "which?")
    assert chat.ask(content, max_new_tokens=9) == plain.ask(content, max_new_tokens=9)


def test_error_while_streaming_reaches_the_caller():
    model = training.model()

    def fail(*_):
        raise RuntimeError("out of memory, say")

    chat = Chat(model)
    hook = model.module.text.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory, say"):
        list(chat.ask("tell", stream=True))
    assert not streaming_threads()
    assert chat.messages == []
    hook.remove()
    assert "".join(chat.ask("tell", stream=True, max_new_tokens=5)) == Chat(model).ask(
        "tell", max_new_tokens=5
    )


def test_callers_own_stopping_criteria_hold_while_streaming():
    from transformers import StoppingCriteriaList

    model = training.model()
    stop = StoppingCriteriaList([lambda ids, _, **__: torch.tensor([ids.shape[1] >= 2])])
    messages = [{"role": "user", "content": "tell"}]
    short = model.chat(messages, stopping_criteria=stop, max_new_tokens=9)
    assert "".join(model.chat(messages, stream=True, stopping_criteria=stop)) == short
    assert short != model.chat(messages, max_new_tokens=9)


def test_training_mode_is_put_back_part_by_part():
    model = training.model()
    model.module.train()
    model.module.tokenizer.eval()
    model.chat([{"role": "user", "content": asked(1, "what?")}], max_new_tokens=2)
    assert model.module.training
    assert model.module.text.training
    assert not model.module.tokenizer.training


def test_context_overflow_names_both_numbers_before_anything_is_encoded(counted):
    model, seen = counted()
    chat = Chat(model)
    length = len(model.processor.encode_prompt(tiny.example("q", (None, "hi")).question()).ids)
    model.processor.max_tokens = length + 3
    assert len(model.answer([tiny.image()], ["hi"], max_new_tokens=1)) == 1
    chat.ask(asked(0, "hi"), max_new_tokens=50)  # the answer ends where the context does
    seen.clear()
    with pytest.raises(
        BadRow, match=rf"messages\[2\]: .*\d+ tokens, the context takes {length + 3}"
    ):
        chat.ask(asked(1, "and this?"))
    assert not seen
    model.processor.max_tokens = length
    with pytest.raises(BadRow, match=f"has {length} tokens, the context takes {length} with"):
        Chat(model).ask(asked(0, "hi"), stream=True)


def test_conversation_goes_on_after_an_answer_without_text():
    said = ("user", "a"), ("assistant", ""), ("user", "b")
    messages = [{"role": role, "content": text} for role, text in said]
    assert isinstance(training.model().chat(messages, max_new_tokens=2), str)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages: expected a list of messages, found a str"),
        ([], "messages: expected the last to be the user's, found no message"),
        (
            [{"role": "user"}],
            r"messages\[0\]: expected the keys role and content, found \['role'\]",
        ),
        (["hi"], r"messages\[0\]: expected the keys role and content, found a str"),
        (
            [{"role": "bot", "content": "a"}],
            r"messages\[0\]: role 'bot' is not one of system, user",
        ),
        ([{"role": "user", "content": "  "}], r"messages\[0\]: expected a text or an image"),
        ([{"role": "user", "content": []}], r"messages\[0\]: expected a text or an image"),
        ([{"role": "user", "content": None}], r"messages\[0\]: content is a text or a list"),
        (
            [{"role": "assistant", "content": "a"}],
            r"messages\[0\]: expected the role system or user first, found assistant",
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
            r"messages\[1\]: expected the role assistant after 'user', found user",
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "messages: expected the last to be the user's, found assistant's",
        ),
        (
            [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}],
            r"messages\[0\]\.content\[0\]: expected a part of type text, image or video, found 'au",
        ),
        (
            [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}],
            r"messages\[0\]\.content\[0\]: expected a vlm\.data\.example\.Video, found a str",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "url": "http://a/b.png"}]}],
            r"\[0\]\.content\[0\]: expected the keys type and image, found \['type', 'url'\]",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": 3}]}],
            r"content\[0\]: expected a path, bytes, PIL image or array, found a int",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": None}]}],
            r"content\[0\]: expected a text, found a NoneType",
        ),
        (
            [
                {"role": "system", "content": [image_part()]},
                {"role": "user", "content": "b"},
            ],
            r"messages\[0\]: images stand in user messages, found one in system's",
        ),
    ],
)
def test_bad_messages_say_where_and_what_was_expected(messages, message):
    with pytest.raises(ValueError, match=message):
        training.model().chat(messages)


def test_bad_images_and_options_are_named_before_anything_is_computed(tmp_path, counted):
    model, seen = counted()
    gone = [{"type": "image", "image": tmp_path / "gone.png"}]
    with pytest.raises(BadImage, match=r"messages\[0\]: .*gone\.png"):
        model.chat([{"role": "user", "content": [*asked(1), *gone]}])
    for options, message in (
        ({"num_beams": 2, "stream": True}, "stream=True needs num_beams=1, found 2"),
        ({"seed": 3}, "seed: expected 0 or more, and do_sample=True to draw; found 3"),
        ({"max_new_tokens": 0, "stream": True}, "max_new_tokens must be at least 1, found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Chat(model).ask(asked(1), **options)
    with pytest.raises(ValueError, match="ends with the assistant's, found the user's"):
        Chat(model, [{"role": "user", "content": "a"}])
    assert not seen


def test_image_mark_in_a_message_stays_text():
    """What spells an image mark is no image."""
    model = training.model()
    marked = model.chat([{"role": "user", "content": "a <image> b"}], max_new_tokens=5)
    assert marked == model.answer([[]], ["a <image> b"], max_new_tokens=5)[0]


def test_seeded_chat_repeats_streamed_or_not_and_leaves_the_global_generator():
    model = training.model()
    messages = [{"role": "user", "content": asked(1, "what?")}]
    options = {"do_sample": True, "max_new_tokens": 12}
    before = torch.get_rng_state()
    drawn = [model.chat(messages, seed=seed, **options) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "".join(model.chat(messages, stream=True, seed=1, **options)) == drawn[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_stream_gives_what_start_returns():
    steps = engine.stream(lambda **_: ([1, 2], [0.0, 0.0]))
    with pytest.raises(StopIteration) as end:
        next(steps)
    assert end.value.value == ([1, 2], [0.0, 0.0])
