"""Models: encoders, projectors, the dual encoder, the language model, and their checkpoints."""
