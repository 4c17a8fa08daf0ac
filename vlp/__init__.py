"""vlp: vision-language pretraining in JAX."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`vlp.load_params`; imported when asked for, since `import vlp` costs nothing."""
    if name == "load_params":
        from vlp.ckpt.params import load_params

        return load_params
    raise AttributeError(f"module 'vlp' has no attribute {name!r}")
