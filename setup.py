import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, find_packages, setup

PLOT = ["matplotlib>=3.8"]
# Builds of torch for GPUs bring the Triton that fits them. Without a GPU only its own test uses it, which needs none.
GPU = ['triton>=3.3; platform_system == "Linux"']
# Older versions do not know MXFP4.
GGUF = ["gguf>=0.18"]
TEST = ["pytest>=8", "pytest-xdist>=3.2", "hypothesis>=6", "ruff>=0.9", "mypy>=1.14", *PLOT, *GPU, *GGUF]

# ruff formats the signatures of the API reference.
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.29", "ruff>=0.9"]

SOURCES = Path("flexgen/kernels/cpp")
HEADERS = sorted(SOURCES.glob("*.h"))

# Only baseline flags: each file asks for its instruction set function by function, and the module chooses
# among them when it is loaded. Without a compiler the install goes on and flexgen computes in torch alone.
kernels = Extension(
    "flexgen.kernels._native",
    sources=sorted(str(path) for path in SOURCES.glob("*.cpp")),
    depends=[str(path) for path in HEADERS],
    # Without -g0, debugging symbols, which Python's own options often ask for, are 85% of the library and take a
    # third of the build. GCC 12 takes the "undefined" registers of its own intrinsics for uninitialised variables.
    extra_compile_args=[
        "-O3",
        "-g0",
        "-std=c++17",
        "-pthread",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ],
    extra_link_args=["-pthread", "-ldl"],
    language="c++",
    optional=True,
)


def is_outdated(compiled: str, source: str) -> bool:
    """Whether its source, a header or this file with the options is newer than an object file."""
    newest = max(path.stat().st_mtime for path in (Path(source), Path(__file__), *HEADERS))
    return Path(compiled).stat().st_mtime < newest


ParallelCompile(needs_recompile=is_outdated).install()

setup(
    name="flexgen",
    version="1.0.0.dev0",
    description="Throughput-oriented language model inference with offloading over GPU, CPU and disk",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["flexgen", "flexgen.*"]), "flexllmgen"],
    package_dir={"flexllmgen": "flexgen/flex_opt/flexllmgen"},
    entry_points={"console_scripts": ["flexgen = flexgen.__main__:main"]},
    package_data={
        "flexgen": ["py.typed", "demo/model/*", "models/*.toml", "predict/*.toml", "kernels/*.pyi"]
    },
    ext_modules=[kernels],
    # Object files stay here, so that a second install of the same sources only links them.
    options={"build_ext": {"build_temp": f"build/{sys.implementation.cache_tag}"}},
    zip_safe=False,  # the demo model is read in place
    # transformers brings huggingface_hub and tokenizers, in the versions it works with.
    install_requires=[
        "torch>=2.6",
        "numpy",
        "transformers>=5",
        "safetensors",
        "scipy>=1.11",
        "psutil",
        "tqdm",
        # transformers reads a tokenizer.model with them, where a model has no tokenizer.json.
        "sentencepiece",
        "protobuf",
    ],
    extras_require={
        "gguf": GGUF,
        "gpu": GPU,
        "plot": PLOT,
        "test": TEST,
        "docs": DOCS,
        "dev": [*TEST, *DOCS, "build"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
