"""Settings of trainings that take a moment."""

TINY_TRAINING = {
    "token_size": 16,
    "latent_size": 15,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "batch_size": 4,
    "behavioural_networks": 2,
    "behavioural_images": 5,
    "max_steps": 6,
    "eval_steps": 3,
    "save_steps": 2,
}
