"""What comparisons of contrastive models share, ours beside transformers'."""

import torch
import transformers
from safetensors.torch import load_file

import vlm
from tests.tiny import image
from vlm.weights import same_bits

IMAGES = [image(0, (40, 71)), image(1, (90, 33)), image(2, (20, 21))]


def outputs_of(folder, images, texts, padding):
    """transformers' unit vectors and logits of a folder, strictly opened; and what its model was
    given."""
    model, report = transformers.AutoModel.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    found = {key: report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(found.values()), found
    processor = transformers.AutoProcessor.from_pretrained(folder)
    given = processor(
        images=list(images), text=list(texts), return_tensors="pt", padding=padding,
        truncation=True,
    )  # fmt: skip
    with torch.no_grad():
        return model.eval()(**given), given


def check_vectors(folder, theirs, images, texts, atol_logits):
    """Our vectors and logits are theirs; returns our model."""
    model = vlm.load(folder, device="cpu")
    ours = model.embed_images(images), model.embed_texts(texts)
    torch.testing.assert_close(ours[0], theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[1], theirs.text_embeds, atol=1e-5, rtol=0)
    scores = model.module.logits(*ours).detach()
    torch.testing.assert_close(scores, theirs.logits_per_image, atol=atol_logits, rtol=1e-5)
    return model


def check_saved_as_reference(folder, tmp_path, through, reference_outputs, check_same):
    """Outputs, files and weights of a folder return under their bits, straight or after a save in
    our own layout; returns the weights that were written."""
    before = reference_outputs(folder)
    model = vlm.load(folder)
    if through == "native":
        model.save(tmp_path / "native")
        model = check_same(tmp_path / "native", before)
    out = tmp_path / "out"
    model.save(out, layout="reference")
    after = reference_outputs(out)
    torch.testing.assert_close(after.logits_per_image, before.logits_per_image, atol=0, rtol=0)
    assert {path.name for path in out.iterdir()} == {path.name for path in folder.iterdir()}
    states = [load_file(path / "model.safetensors") for path in (folder, out)]
    assert same_bits(*states)
    return states[1]
