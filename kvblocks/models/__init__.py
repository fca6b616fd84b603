"""What a model's config says of its cache. Imports neither torch nor transformers until a config needs them."""
