"""The commands of `dalle-fast`, a module each; see `dalle_fast.cli`."""
