"""open_clip's layout of CLIP and SigLIP: configuration, weight names, text tokenizer."""
