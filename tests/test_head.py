"""Logits of training and scores are those that the language model's own forward makes."""

import dataclasses

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests import tiny, training
from vlm.families.decoder_only.head import head_logits, require_own_logits
from vlm.vocabulary import train_rows

GPT2 = dict(vocab_size=300, n_embd=32, n_layer=2, n_head=4)
OPT = dict(vocab_size=300, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2,
           num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
MPT = dict(vocab_size=300, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
LLAMA_LIKE = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "smollm3": {},
    "olmo2": {},
    "gemma": {},
    "gemma2": dict(final_logit_softcapping=3.0),
    "gemma3_text": dict(final_logit_softcapping=3.0),
    "granite": dict(logits_scaling=3.0),
    "hyperclovax": dict(logits_scaling=3.0),
    "cohere": dict(logit_scale=0.5),
    "cohere2": dict(logit_scale=0.5, head_dim=8),
    "nanochat": dict(final_logit_softcapping=3.0),
    "recurrent_gemma": dict(logits_soft_cap=3.0, lru_width=32),
    "falcon_h1": dict(lm_head_multiplier=0.3, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16,
                      mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=4, head_dim=8),
}  # fmt: skip


def text_model(kind, **more):
    if kind in LLAMA_LIKE:
        return tiny.text_model(kind, **LLAMA_LIKE[kind] | more)
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{"gpt2": GPT2, "opt": OPT, "mpt": MPT}[kind] | more)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", [*LLAMA_LIKE, "gpt2", "opt", "mpt"])
@torch.no_grad()
def test_logits_of_final_states_are_the_models_own(kind):
    text = text_model(kind)
    vectors = text.get_input_embeddings()(torch.tensor([[5, 6, 7, 8]]))
    own = text(inputs_embeds=vectors, use_cache=False).logits
    states = text.get_decoder()(inputs_embeds=vectors, use_cache=False).last_hidden_state
    torch.testing.assert_close(head_logits(text, states), own, atol=1e-5, rtol=1e-5)
    require_own_logits(text)


def test_head_whose_rows_are_trained_apart_is_compared_too():
    text = text_model("cohere")
    train_rows(text, [5, 7])
    require_own_logits(text)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("mpt", dict(logit_scale=0.5)),  # which transformers' own forward leaves out
        ("inkling_text", dict()),  # whose head leaves padded rows of its vocabulary out
    ],
)
def test_language_model_whose_own_logits_are_others_is_refused(kind, more):
    with torch.device("meta"):  # no weight is read
        text = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**more))
    with pytest.raises(ValueError, match=f"^{kind}: expected a language model whose logits"):
        require_own_logits(text)


def test_model_is_refused_when_it_is_put_together():
    chosen = training.model()
    real = type(chosen.module.text)

    class Doubled(real):
        def forward(self, *_, **given):
            out = real.forward(self, **given)
            out.logits = 2 * out.logits
            return out

    chosen.module.text.__class__ = Doubled
    with pytest.raises(ValueError, match=r"^llama: .*; Doubled makes others of its final states"):
        dataclasses.replace(chosen)


def test_trying_a_head_draws_no_random_number_and_leaves_the_model_as_it_was():
    text = tiny.text_model("gemma2")
    before = text.get_decoder(), text.get_output_embeddings(), {**text.state_dict()}
    seed = torch.get_rng_state()
    require_own_logits(text)
    assert torch.equal(torch.get_rng_state(), seed)
    assert (text.get_decoder(), text.get_output_embeddings()) == before[:2]
    for name, value in text.state_dict().items():
        assert value.data_ptr() == before[2][name].data_ptr()
