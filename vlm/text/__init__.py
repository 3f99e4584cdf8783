"""Text decoders and encoders of transformers, made fit to stand beside an image tokenizer."""
