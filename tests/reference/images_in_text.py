"""What comparisons of models with images in the text stream share, ours beside transformers'."""

import torch
import transformers
from transformers import AutoProcessor


def reopened(folder):
    """transformers' model and processor of a folder, strictly opened."""
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True
    )
    found = {key: report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(found.values()), found
    return model.eval(), AutoProcessor.from_pretrained(folder)


def our_logits(model, batch):
    """Logits at every place, float[B, T, Z]."""
    module = model.module
    vectors = module.embed(batch.ids, module.encode(batch.groups, batch.arrangement), batch.names)
    hidden = module.read(vectors, batch)
    return module.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


def close(ours, theirs, atol=1e-4):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
