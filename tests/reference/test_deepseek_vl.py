"""DeepSeek-VL beside transformers' classes: tiny random folders of both sizes, in and out."""

import json
import shutil

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, PreTrainedTokenizerFast

import vlm
from tests.tiny import picture
from tests.tokenizer_laws import check_laws, spec
from vlm import cli
from vlm.data.collate import collate
from vlm.data.example import Example, Turn
from vlm.image_tokens import ImageTokens
from vlm.lora import Lora, add_lora
from vlm.placement import IMAGE
from vlm.systems import deepseek_vl
from vlm.tokenizers import paired, sam_hybrid
from vlm.training.stages import FROZEN, assign_rates
from vlm.weights import WeightsError, same_bits

BOS, EOS, MARK = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", deepseek_vl.IMAGE_MARK
# The jinja that published folders hold, for contents in parts; its text is a fact of the system.
PUBLISHED_TEMPLATE = (
    "{% set seps = ['\n\n', '" + EOS + "'] %}" + deepseek_vl.SYSTEM_MESSAGE + "\n\n"
    "{% for message in messages %}"
    "{{ 'User: ' if message['role'] == 'user' else 'Assistant: ' }}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}" + MARK + "{% else %}"
    "{% set text = content['text'] %}"
    "{% if loop.first %}{% set text = text.lstrip() %}{% endif %}"
    "{% if loop.last %}{% set text = text.rstrip() %}{% endif %}"
    "{{ text }}{% endif %}{% endfor %}"
    "{% if not loop.last or add_generation_prompt %}"
    "{{ seps[0] if message['role'] == 'user' else seps[1] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SIGLIP = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
              image_size=32, patch_size=8, hidden_act="gelu", layer_norm_eps=1e-3,
              vision_use_head=False)  # fmt: skip
SAM = dict(hidden_size=16, output_channels=6, num_hidden_layers=3, num_attention_heads=2,
           image_size=64, patch_size=8, window_size=3, global_attn_indexes=[1, 2],
           mlp_dim=24)  # fmt: skip
LLAMA = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
             num_key_value_heads=3, max_position_embeddings=512, rms_norm_eps=1e-6)  # fmt: skip
KINDS = ("deepseek_vl", "deepseek_vl_hybrid")
SIDE = SIGLIP["image_size"] // SIGLIP["patch_size"]
TEXTS = ["what is it? a cat", "User: Describe the pictures.", "Assistant: two dogs and a tree"]


def text_tokenizer():
    """Byte-level BPE that begins every text with BOS, as the published one."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[BOS, EOS, MARK],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([*TEXTS, deepseek_vl.SYSTEM_MESSAGE], trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        extra_special_tokens={"image_token": MARK},
    )


def write_folder(folder, kind, seed=0, **more):
    """A tiny random folder, written by transformers' own classes; returns its model in fp32."""
    tokenizer = text_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    values = dict(
        text_config=LLAMA | {"model_type": "llama", "vocab_size": len(tokenizer), **ids},
        vision_config=SIGLIP | {"model_type": "siglip_vision_model"} | more.pop("vision", {}),
        image_token_id=tokenizer.convert_tokens_to_ids(MARK),
        tie_word_embeddings=more.pop("tied", False),
    )
    size = {"height": 32, "width": 32}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "size": size}
    if kind == "deepseek_vl":
        image_processor = transformers.DeepseekVLImageProcessor(**half)
        names = "DeepseekVL"
    else:
        values["high_res_vision_config"] = SAM | {"model_type": "sam_vision_model"}
        high = {"high_res_size": {"height": 64, "width": 64}}
        image_processor = transformers.DeepseekVLHybridImageProcessor(**half, **high)
        names = "DeepseekVLHybrid"
    torch.manual_seed(seed)
    config = getattr(transformers, f"{names}Config")(**values)
    model = getattr(transformers, f"{names}ForConditionalGeneration")(config).float().eval()
    with torch.no_grad():  # biases, norms and alpha start at 0 and 1: move them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    processor = getattr(transformers, f"{names}Processor")(
        image_processor,
        tokenizer,
        chat_template=PUBLISHED_TEMPLATE,
        num_image_tokens=SIDE**2,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    write_folder(path, request.param)
    return path


def reopened(folder):
    """transformers' model and processor of a folder, strictly opened."""
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True
    )
    found = {key: report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(found.values()), found
    return model.eval(), AutoProcessor.from_pretrained(folder)


CONVERSATIONS = {
    "no image": [("user", ("what is it?",))],
    "one image": [("user", (None, "what is it?"))],
    "two images": [("user", ("Describe ", None, " and", None, " the pictures. "))],
    "three turns": [
        ("user", (None, "\n  what is it?")),
        ("assistant", ("a cat",)),
        ("user", ("and this?", None)),
        ("assistant", ("two dogs ",)),
        ("user", ("Describe the tree.",)),
    ],
}


def conversation(turns):
    """Our example and theirs, with non-square pictures."""
    slots = sum(part is None for _, content in turns for part in content)
    images = [picture(i, (20 + 30 * (i % 2), 45 - 9 * i)) for i in range(slots)]
    ours = Example("row", tuple(Turn(role, content) for role, content in turns), tuple(images))
    left = iter(images)
    theirs = [
        {
            "role": role,
            "content": [
                {"type": "image", "image": next(left)}
                if part is None
                else {"type": "text", "text": part}
                for part in content
            ],
        }
        for role, content in turns
    ]
    return ours, theirs


def their_inputs(processor, messages, **options):
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", **options
    )


def with_marks(ids, model):
    """Our ids with the reference's image id at image places."""
    mark = model.processor.text_tokenizer.convert_tokens_to_ids(MARK)
    return torch.where(ids == IMAGE, mark, ids)


def our_logits(model, batch):
    """Logits at every place, float[B, T, Z]."""
    module = model.module
    vectors = module.embed(batch.ids, module.encode(batch.groups), batch.names)
    hidden = module.read(vectors, batch)
    return module.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


def close(ours, theirs, atol=1e-4):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("name", CONVERSATIONS)
@torch.no_grad()
def test_deepseek_vl_ids_pixels_and_logits_match_reference(folder, name):
    """Through the processors of both sides. Traps T6, T16 and T18."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    example, messages = conversation(CONVERSATIONS[name])
    row = model.processor.encode_prompt(example)
    inputs = their_inputs(processor, messages, add_generation_prompt=True)
    assert torch.equal(with_marks(row.ids, model)[None], inputs["input_ids"])
    batch = collate([row], model.processor.pad_id, "right")
    if example.images:
        pixels = [view for view, _ in row.views]
        names = ["high_res_pixel_values", "pixel_values"]
        if isinstance(pixels[0], torch.Tensor):
            pixels, names = [(view,) for view in pixels], names[1:]
        for views, key in zip(zip(*pixels), names, strict=True):
            close(torch.stack(views), inputs[key], atol=1e-5)
    close(our_logits(model, batch), peer(**inputs).logits)


@torch.no_grad()
def test_deepseek_vl_rows_of_unequal_length_match_reference_one_by_one(folder):
    """A row without images among rows with one and two, padded on either side. Trap T3."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    pairs = [conversation(turns) for turns in CONVERSATIONS.values()]
    rows = [model.processor.encode_prompt(ours) for ours, _ in pairs]
    for padding in ("right", "left"):
        batch = collate(rows, model.processor.pad_id, padding)
        logits = our_logits(model, batch)
        for number, (_, messages) in enumerate(pairs):
            inputs = their_inputs(processor, messages, add_generation_prompt=True)
            close(logits[number][batch.valid[number]], peer(**inputs).logits[0])


@torch.no_grad()
def test_deepseek_vl_greedy_ids_match_reference_and_batches(folder):
    """Trap T13."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    images = [[], [picture(1, (40, 22))], [picture(2, (17, 60)), picture(3)]]
    prompts = ["Assistant:", f"User: {MARK}what?\n\nAssistant:", f"{MARK} and {MARK} are"]
    together = model.generate(images, prompts, max_new_tokens=8)
    for pictures, prompt, written in zip(images, prompts, together):
        inputs = processor(images=pictures or None, text=prompt, return_tensors="pt")
        expected = peer.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = expected[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(written.ids) == new
        (alone,) = model.generate([pictures], [prompt], max_new_tokens=8)
        assert alone.ids == written.ids


@torch.no_grad()
def test_deepseek_vl_score_matches_reference(folder):
    """Literal prompts bear the published mark; answers end with EOS."""
    model, (peer, processor) = vlm.load(folder, "cpu"), reopened(folder)
    image, prompt, answer = picture(4, (50, 30)), f"User: {MARK}what?\n\nAssistant:", " a cat"
    inputs = processor(images=[image], text=prompt + answer + EOS, return_tensors="pt")
    logprobs = peer(**inputs).logits[0, :-1].log_softmax(-1)
    length = len(processor.tokenizer(prompt)["input_ids"]) + SIDE**2 - 1
    targets = inputs["input_ids"][0, 1:]
    expected = logprobs.gather(1, targets[:, None])[length - 1 :].sum()
    close(model.score([[image]], [prompt], [answer])[0], expected)
    with pytest.raises(ValueError, match=f"0 {MARK} marks, there are 1 images"):
        model.score([[image]], ["<image> what?"], ["a cat"])


def test_deepseek_vl_training_rows_score_every_answer_and_its_end(folder):
    """The ids are the published conversation's and one EOS more. Traps T5 and T6."""
    model, processor = vlm.load(folder, "cpu"), AutoProcessor.from_pretrained(folder)
    example, messages = conversation(CONVERSATIONS["three turns"][:4])
    row = model.processor.encode(example)
    theirs = their_inputs(processor, messages)["input_ids"][0].tolist()
    end = model.processor.end_id
    assert with_marks(row.ids, model).tolist() == [*theirs, end]
    decode = processor.tokenizer.decode
    assert decode(row.ids[row.scored]) == f" a cat{EOS} two dogs{EOS}"
    assert not row.scored[row.ids == IMAGE].any()


def test_deepseek_vl_prompt_matches_snapshot(folder):
    processor = vlm.load(folder, "cpu").processor
    turns = (Turn("user", (None, "what?")), Turn("assistant", ("a cat",)), Turn("user", ("why?",)))
    text = processor.text_tokenizer.decode(
        processor.encode_prompt(Example("row", turns, (picture(),))).ids.clamp(min=0)
    )
    images = processor.text_tokenizer.decode([0] * SIDE**2)
    assert text == (
        f"{BOS}You are a helpful language and vision assistant. You are able to understand the "
        "visual content that the user provides, and assist the user with a variety of tasks using "
        f"natural language.\n\nUser: {images}what?\n\nAssistant: a cat{EOS}User: why?\n\nAssistant:"
    )


def test_deepseek_vl_system_message_stands_in_place_of_the_fixed_one(folder):
    """As in the authors' code."""
    processor = vlm.load(folder, "cpu").processor
    for said, start in (("Be brief.", "Be brief.\n\nUser: why?"), ("", "User: why?")):
        turns = (Turn("system", (said,)), Turn("user", ("why?",)))
        ids = processor.encode_prompt(Example("row", turns)).ids
        assert processor.text_tokenizer.decode(ids) == f"{BOS}{start}\n\nAssistant:"


@pytest.mark.parametrize("through_native", [False, True])
@torch.no_grad()
def test_deepseek_vl_reference_layout_opens_in_transformers(folder, tmp_path, through_native):
    """Every tensor returns under its bits, every small file as it was, straight or after a save in
    our own layout."""
    model = vlm.load(folder, "cpu")
    if through_native:
        model.save(tmp_path / "native")
        model = vlm.load(tmp_path / "native", "cpu")
    model.save(tmp_path / "out", layout="reference")
    peer, processor = reopened(folder)
    again, its_processor = reopened(tmp_path / "out")
    assert same_bits(again.state_dict(), peer.state_dict())
    kept = {path.name for path in folder.iterdir()} - {"config.json", "model.safetensors"}
    assert {"processor_config.json", "chat_template.jinja", "generation_config.json"} <= kept
    for name in kept:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    _, messages = conversation(CONVERSATIONS["two images"])
    inputs = their_inputs(processor, messages, add_generation_prompt=True)
    for key, value in their_inputs(its_processor, messages, add_generation_prompt=True).items():
        assert torch.equal(value, inputs[key])
    assert torch.equal(again(**inputs).logits, peer(**inputs).logits)


@torch.no_grad()
def test_deepseek_vl_native_layout_returns_the_same_model(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    model.save(tmp_path)
    again = vlm.load(tmp_path, "cpu")
    assert same_bits(again.module.state_dict(), model.module.state_dict())
    assert again.parts.stop_ids == model.parts.stop_ids
    example, _ = conversation(CONVERSATIONS["three turns"])
    rows = [m.processor.encode_prompt(example) for m in (model, again)]
    assert torch.equal(rows[0].ids, rows[1].ids)
    ours, its = (our_logits(model, collate([row], 0, "right")) for row in rows)
    assert torch.equal(ours, its)
    question = [[[picture()]], [f"{MARK}what?"]]
    assert again.generate(*question)[0].ids == model.generate(*question)[0].ids


def test_native_folders_from_before_published_systems_still_open(folder, tmp_path):
    vlm.load(folder, "cpu").save(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: values[k] for k in values.keys() - {"reference", "image_mark"}}))
    model = vlm.load(tmp_path, "cpu")
    assert model.parts.reference is None
    assert model.processor.image_mark == "<image>"


def test_deepseek_vl_reference_layout_says_the_dtype_it_holds(folder, tmp_path):
    vlm.load(folder, "cpu", "bfloat16").save(tmp_path, layout="reference")
    state = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    peer, _ = reopened(tmp_path)
    assert {p.dtype for p in peer.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_deepseek_vl_with_more_tokens_opens_in_transformers(tmp_path):
    write_folder(tmp_path / "in", "deepseek_vl")
    model = vlm.load(tmp_path / "in", "cpu")
    tokenizer = model.processor.text_tokenizer
    tokenizer.add_tokens(["<loc0000>", "<loc0001>"])
    model.module.text.resize_token_embeddings(len(tokenizer))
    model.save(tmp_path / "out", layout="reference")
    peer, processor = reopened(tmp_path / "out")
    example, messages = conversation([("user", (None, "where is <loc0001>?"))])
    inputs = their_inputs(processor, messages, add_generation_prompt=True)
    row = model.processor.encode_prompt(example)
    assert torch.equal(with_marks(row.ids, model)[None], inputs["input_ids"])
    assert tokenizer.convert_tokens_to_ids("<loc0001>") in row.ids
    batch = collate([row], model.processor.pad_id, "right")
    close(our_logits(model, batch), peer(**inputs).logits)


@torch.no_grad()
def test_deepseek_vl_with_lora_opens_merged_in_transformers(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    add_lora(model.module, {"text": Lora(rank=2), "tokenizer": Lora(rank=2)})
    for name, parameter in model.module.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save(tmp_path, layout="reference")
    peer, processor = reopened(tmp_path)
    example, messages = conversation(CONVERSATIONS["one image"])
    inputs = their_inputs(processor, messages, add_generation_prompt=True)
    batch = collate([model.processor.encode_prompt(example)], 0, "right")
    close(our_logits(model, batch), peer(**inputs).logits)


def old_style(folder, tmp_path):
    """The folder as transformers 4 wrote it: nested names, files apart, an old dtype key."""
    out = shutil.copytree(folder, tmp_path / "old")
    nested, flat = "model.vision_model.vision_model.", "model.vision_model."
    state = {
        key.replace(flat, nested) if nested not in key else key: tensor
        for key, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(state, out / "model.safetensors", {"format": "pt"})
    values = json.loads((out / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    for part in ("vision_config", "text_config", "high_res_vision_config"):
        values.get(part, {}).pop("dtype", None)
    values["text_config"]["rope_theta"] = 10000.0
    values["text_config"].pop("rope_parameters", None)
    (out / "config.json").write_text(json.dumps(values))
    settings = json.loads((out / "processor_config.json").read_text())
    (out / "preprocessor_config.json").write_text(json.dumps(settings.pop("image_processor")))
    (out / "processor_config.json").write_text(json.dumps(settings))
    template = (out / "chat_template.jinja").read_text()
    (out / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (out / "chat_template.jinja").unlink()
    values = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(
        json.dumps(values | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True})
    )
    return out


@torch.no_grad()
def test_deepseek_vl_opens_folders_of_transformers_4(folder, tmp_path):
    """Published folders are of this style; their tokenizer says Llama but is byte-level."""
    old = old_style(folder, tmp_path)
    model, new = vlm.load(old, "cpu"), vlm.load(folder, "cpu")
    assert same_bits(model.module.state_dict(), new.module.state_dict())
    example, messages = conversation(CONVERSATIONS["three turns"])
    peer, processor = reopened(old)
    inputs = their_inputs(processor, messages, add_generation_prompt=True)
    row = model.processor.encode_prompt(example)
    assert torch.equal(with_marks(row.ids, model)[None], inputs["input_ids"])
    close(our_logits(model, collate([row], 0, "right")), peer(**inputs).logits)
    model.save(tmp_path / "out", layout="reference")
    state, out = (load_file(path / "model.safetensors") for path in (old, tmp_path / "out"))
    assert same_bits(state, out)


def test_deepseek_vl_names_all_wrong_keys_at_once(folder, tmp_path):
    """In the folder's own words."""
    broken = shutil.copytree(folder, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    del state["model.language_model.norm.weight"]
    state["model.extra.weight"] = torch.zeros(1)
    state["lm_head.weight"] = state["lm_head.weight"][:-1]
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError) as error:
        vlm.load(broken, "cpu")
    message = str(error.value)
    assert "missing (1): ['model.language_model.norm.weight']" in message
    assert "unused (1): ['model.extra.weight']" in message
    assert "wrong shape (1): ['lm_head.weight: expected" in message


def test_deepseek_vl_names_the_folder_whose_files_cannot_be_read(folder, tmp_path):
    cut = shutil.copytree(folder, tmp_path / "cut")
    (cut / "processor_config.json").unlink()
    with pytest.raises(ValueError, match=r"cut: expected the files .* AutoProcessor cannot read"):
        vlm.load(cut, "cpu")


@torch.no_grad()
def test_deepseek_vl_head_is_tied_only_where_the_weights_are(tmp_path):
    """The class default says tied; published folders are not, whatever their config leaves out."""
    write_folder(tmp_path / "tied", "deepseek_vl", tied=True)
    untied = write_folder(tmp_path / "untied", "deepseek_vl")
    path = tmp_path / "untied" / "config.json"
    values = json.loads(path.read_text())
    del values["tie_word_embeddings"]
    path.write_text(json.dumps(values))
    for name in ("tied", "untied"):
        model = vlm.load(tmp_path / name, "cpu")
        text = model.module.text
        is_tied = text.get_output_embeddings().weight is text.get_input_embeddings().weight
        assert is_tied == (name == "tied")
        for layout in ("native", "reference"):
            model.save(tmp_path / f"{name}-{layout}", layout)
        saved = json.loads((tmp_path / f"{name}-reference" / "config.json").read_text())
        assert saved["tie_word_embeddings"] == is_tied
        peer, processor = reopened(tmp_path / f"{name}-reference")
        again = vlm.load(tmp_path / f"{name}-native", "cpu").module
        assert same_bits(again.state_dict(), model.module.state_dict())
        inputs = processor(text="what?", return_tensors="pt")
        row = model.processor.encode_literal([], "what?")
        close(our_logits(model, collate([row], 0, "right")), peer(**inputs).logits)
    assert not torch.equal(untied.lm_head.weight, untied.get_input_embeddings().weight)


@torch.no_grad()
def test_deepseek_vl_leaves_out_a_pooling_head_and_says_so(tmp_path):
    write_folder(tmp_path / "in", "deepseek_vl", vision={"vision_use_head": True})
    peer, processor = reopened(tmp_path / "in")
    assert any(".head." in key for key in peer.state_dict())
    model = vlm.load(tmp_path / "in", "cpu")
    model.save(tmp_path / "out", layout="reference")
    again, _ = reopened(tmp_path / "out")
    assert again.config.vision_config.vision_use_head is False
    _, messages = conversation(CONVERSATIONS["one image"])
    inputs = their_inputs(processor, messages, add_generation_prompt=True)
    assert torch.equal(again(**inputs).logits, peer(**inputs).logits)


def test_deepseek_vl_reads_activation_and_eps_from_the_folder(folder):
    """A wrong eps moves logits too little to be seen in them."""
    tokenizer = vlm.load(folder, "cpu").module.tokenizer
    siglip = getattr(tokenizer, "low", tokenizer).backbone
    assert siglip.encoder.layers[0].layer_norm1.eps == siglip.post_layernorm.eps == 1e-3
    x = torch.linspace(-3, 3, 50)
    activation = siglip.encoder.layers[0].mlp.activation_fn
    assert torch.equal(activation(x), torch.nn.functional.gelu(x))
    with torch.device("meta"):
        published = deepseek_vl.build("1.3b").tokenizer.backbone
    assert published.encoder.layers[0].layer_norm1.eps == 1e-6
    assert torch.equal(published.encoder.layers[0].mlp.activation_fn(x), activation(x))


def test_deepseek_vl_ignores_leftover_stop_ids_that_are_plain_text(folder, tmp_path):
    """Classes write their default ids into generation_config.json; 2 is a plain token here."""
    out = shutil.copytree(folder, tmp_path / "leftover")
    path = out / "generation_config.json"
    tokenizer = vlm.load(folder, "cpu").processor.text_tokenizer
    plain, mark = (tokenizer.convert_tokens_to_ids(t) for t in ("a", MARK))
    path.write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [plain, mark]}))
    assert vlm.load(out, "cpu").parts.stop_ids == (tokenizer.eos_token_id, mark)


def test_deepseek_vl_raises_when_the_processor_counts_other_places(folder, tmp_path):
    """Trap T16."""
    out = shutil.copytree(folder, tmp_path / "miscounted")
    path = out / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_image_tokens": 15}))
    with pytest.raises(ValueError, match="writes 15 places for an image, the model gives 16"):
        vlm.load(out, "cpu")


HEAD_OF_SIGLIP = 1024 + 4 * (1024**2 + 1024) + 2 * 1024 + 2 * 1024 * 4096 + 4096 + 1024


@pytest.mark.parametrize(
    ("size", "reference", "gigabytes", "blocks"),
    [
        ("1.3b", "DeepseekVL", 3.95, 1.23e9),
        ("7b", "DeepseekVLHybrid", 14.69, 6.07e9),
    ],
)
def test_deepseek_vl_full_sizes_hold_the_published_parameters(size, reference, gigabytes, blocks):
    """The authors' files, in 16 bits, hold SigLIP's pooling head besides. Trap T16."""
    sizes = deepseek_vl.SIZES[size]
    config = getattr(transformers, f"{reference}Config")(
        text_config={"model_type": "llama"} | sizes.text,
        vision_config=sizes.vision,
        tie_word_embeddings=False,
        **({"high_res_vision_config": sizes.high} if sizes.high else {}),
    )
    with torch.device("meta"):
        module = deepseek_vl.build(size)
        peer = getattr(transformers, f"{reference}ForConditionalGeneration")(config)
    count = sum(p.numel() for p in module.parameters())
    assert count == sum(p.numel() for p in peer.parameters())
    assert round((count + HEAD_OF_SIGLIP) * 2 / 1e9, 2) == gigabytes
    assert round(sum(p.numel() for p in module.text.model.layers.parameters()), -7) == blocks
    assert module.tokenizer.tokens_for((300, 700)) == 576
    assert not any(p.is_complex() or p.device.type != "meta" for p in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_deepseek_vl_key_map_round_trips(kind, tmp_path):
    """Both ways, on all names of the full size's module and of transformers' class."""
    with torch.device("meta"):
        module = deepseek_vl.build("1.3b" if kind == "deepseek_vl" else "7b")
    key_map = deepseek_vl.KEY_MAPS[kind]
    names = [deepseek_vl.published_name(key, key_map) for key in module.state_dict()]
    assert len(set(names)) == len(names)
    assert all(deepseek_vl.first_names({n: None}, key_map, (), "") == {n: None} for n in names)
    theirs = set(write_folder(tmp_path, kind).state_dict())
    renamed = deepseek_vl.first_names(dict.fromkeys(theirs), key_map, deepseek_vl.UNUSED, "")
    ours = vlm.load(tmp_path, "cpu").module.state_dict()
    assert set(renamed) == {deepseek_vl.published_name(key, key_map) for key in ours}
    twice = dict.fromkeys([names[0], names[0].replace("vision_model.vision_model", "vision_model")])
    if len(twice) == 2:
        with pytest.raises(WeightsError, match="are the same weight"):
            deepseek_vl.first_names(twice, key_map, (), "folder")


def test_deepseek_vl_low_and_high_parameters_are_told_apart(tmp_path):
    """The authors' third stage freezes the tower that sees high resolution."""
    write_folder(tmp_path, "deepseek_vl_hybrid")
    module = vlm.load(tmp_path, "cpu").module
    names = [name for name, _ in module.named_parameters() if name.startswith("tokenizer.")]
    assert {name.split(".")[1] for name in names} == {"high", "low"}
    rates = (("tokenizer.high.*", FROZEN), ("tokenizer.low.*", 2e-5), ("adaptor.*", 2e-5))
    decided = assign_rates(module, (*rates, ("text.*", 2e-5)))
    frozen = {name for name, (_, rate) in decided.items() if rate is FROZEN}
    assert frozen == {f"tokenizer.high.{n}" for n, _ in module.tokenizer.high.named_parameters()}
    parts = module.tokenizer.parts()
    assert {name.split(".")[0] for name in parts} == {"high", "low"}
    high = {id(p) for p in module.tokenizer.high.parameters()}
    of_parts = {
        id(p) for name in parts if name.startswith("high") for p in parts[name].parameters()
    }
    assert high == of_parts
    example = Example("row", (Turn("user", (None,)), Turn("assistant", ("a",))), (picture(),))
    batch = collate([vlm.load(tmp_path, "cpu").processor.encode(example)], 0, "right")
    module(batch).square().sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []


def test_sam_hybrid_tokenizer_keeps_the_laws_on_non_square_pixels():
    """Traps T16 and T18."""
    config = sam_hybrid.SamHybridConfig(
        vision_config=SAM | {"model_type": "sam_vision_model"},
        grid_hw=(2, 3),
        pixel_spec=spec(32, 48),
    )
    tokenizer = sam_hybrid.build(config)
    torch.nn.init.constant_(tokenizer.alpha, 0.5)
    check_laws(tokenizer)


def test_paired_towers_of_different_grids_are_refused_by_the_neck_same():
    tokens = ImageTokens(tokens=torch.zeros(1, 6, 2), grid_hw=(2, 3))
    neck = paired.SameGridNeck(2)
    assert neck(tokens, (2, 3)) is tokens.tokens
    with pytest.raises(ValueError, match=r"grid \(2, 3\) is not the low tower's \(3, 2\)"):
        neck(tokens, (3, 2))


def test_saving_in_a_layout_that_a_model_lacks_raises(folder, tmp_path):
    model = vlm.load(folder, "cpu")
    with pytest.raises(
        ValueError, match="layout is one of native, reference, open_clip, found 'onnx'"
    ):
        model.save(tmp_path, layout="onnx")
    model.parts.reference = None
    with pytest.raises(ValueError, match="came from no published system"):
        model.save(tmp_path, layout="reference")
    assert not list(tmp_path.iterdir())


def test_systems_command_lists_both_sizes(capsys):
    cli.main(["systems"])
    listed = capsys.readouterr().out.replace("\n", " ")
    assert all(kind in listed for kind in KINDS)


def test_pictures_of_other_modes_are_read_as_rgb(folder):
    """transformers' processor fails on them."""
    model = vlm.load(folder, "cpu")
    grey = picture().convert("L")
    rows = [
        model.processor.encode_literal([image], MARK)
        for image in (grey, Image.merge("RGB", [grey] * 3))
    ]
    for (ours, _), (same, _) in zip(rows[0].views, rows[1].views):
        ours, same = (x if isinstance(x, tuple) else (x,) for x in (ours, same))
        assert all(torch.equal(a, b) for a, b in zip(ours, same))
