from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

DEMO = ["gradio>=6.31"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30"]
PEFT = ["peft>=0.17"]
EVALUATE = ["evaluate>=0.4.6"]
FAISS = ["faiss-cpu>=1.12"]
MILVUS = ["pymilvus>=3", "milvus-lite>=3.2"]
ONNX = ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"]
BROWSER = ["playwright>=1.50"]
COMPARE = ["implicit>=0.7.2", "threadpoolctl>=3.5"]
PAPER = [*COMPARE, "matplotlib>=3.9"]
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=1"]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6",
    "sentencepiece>=0.2",
    "tensorboard>=2.18",
    *DEMO,
    *SERVE,
    *PEFT,
    *EVALUATE,
    *FAISS,
    *MILVUS,
    *ONNX,
    *PAPER,
]

setup(
    name="tokenrec-hf",
    version="0.1.0",
    description="TokenRec for the Hugging Face stack: users and items as tokens of T5, recommendations by vector retrieval",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["tokenrec_hf", "tokenrec_hf.*"]),
    package_data={"tokenrec_hf": ["py.typed", "assets/*", "assets/recipes/*", "evaluation/modules/*/*"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "transformers>=5.23,<6",
        "tokenizers>=0.22",
        "datasets>=4",
        "accelerate>=1.10",
        "huggingface-hub>=2",
        "filelock>=3.20.1",
        "safetensors>=0.6",
        "numpy>=2",
        "pandas>=2.2",
        "pooch>=1.8",
        "pyarrow>=17",
        "pydantic>=2.5",
        "protobuf>=5",
        "pyyaml>=6",
        "requests>=2.32",
        "rich>=13",
        "scipy>=1.15",
        "tqdm>=4.60",
        "typer>=0.29",
        "wrapt>=1.16",
    ],
    extras_require={
        "test": TEST,
        "demo": DEMO,
        "serve": SERVE,
        # Beside Debian's chromium, for the walk through the page.
        "browser": BROWSER,
        "peft": PEFT,
        "compare": COMPARE,
        "evaluate": EVALUATE,
        "milvus": MILVUS,
        "faiss": FAISS,
        "onnx": ONNX,
        "bench": [*FAISS, *ONNX],
        "paper": PAPER,
        "docs": DOCS,
        "dev": [*TEST, *DOCS, *BROWSER, "ruff>=0.15", "mypy>=1.15", "types-PyYAML", "pre-commit>=4"],
    },
    entry_points={"console_scripts": ["tokenrec=tokenrec_hf.cli.app:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: OS Independent",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
