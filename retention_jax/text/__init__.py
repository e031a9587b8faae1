"""From text to tokens and back: tokenizers of checkpoints, chat templates, conversations."""
